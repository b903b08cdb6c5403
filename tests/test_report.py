"""The tables and figures of README and docs are those of the result files."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from resblocks.training.result import Result, seeds_in_words

REPORT = Path(__file__).parent.parent / "benchmarks" / "report.py"


def finished(model: str, seed: int, accuracy: float, **recipe: object) -> dict[str, Any]:
    """A run as the sweep writes it."""
    epoch = {"train_loss": 1.0, "train_accuracy_percent": 50.0, "eval_loss": 2.0, "seconds": 3.0}
    last = {"eval_accuracy_percent": accuracy, "eval_loss": 0.25, "seconds": 4.0}
    layers = [{"name": f"layer{number}.weight", "mean_abs": 0.1, "norm": 1.0} for number in range(3)]
    return {
        "name": model,
        "params": 11173962,
        "settings": {
            "dataset": {"name": "CIFAR-10", "split": "test"},
            "recipe": {"name": "paper", "epochs": 2, "batch_size": 500, "tta": "none", **recipe},
            "precision": "bfloat16",
            "seed": seed,
        },
        "environment": {
            "device": "cpu",
            "threads": 1,
            "processes": 1,
            "versions": {"torch": "2.15.0"},
            "commit": "0123456789abcdef",
        },
        "epochs": [{**epoch, "epoch": 1, "eval_accuracy_percent": 10.0}, {**epoch, **last, "epoch": 2}],
        "gradients": [{"epoch": number, "layers": layers} for number in range(3)],
    }


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(str(REPORT.parent))
    return runpy.run_path(str(REPORT))


@pytest.fixture
def runs(report: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The module of the tables of runs, with folders of its own and one programme, "tiny", of which nothing is run."""
    module = report["runs"]
    tiny = module.sweep.cells(["resnet18", "resnet18_noskip"], "paper", seeds=2)
    monkeypatch.setattr(module.sweep, "PROGRAMMES", {"tiny": tiny})
    for name in ("ROOT", "RUNS", "FIGURES"):
        monkeypatch.setattr(module, name, tmp_path)
    (tmp_path / "tiny").mkdir()
    return module


def write(runs: Any, *results: dict[str, Any]) -> None:
    """As the files of the programme's cells, seed by seed."""
    for cell, result in zip(runs.sweep.PROGRAMMES["tiny"], results, strict=False):
        (runs.RUNS / "tiny" / f"{cell.name}.json").write_text(json.dumps(result))


def test_every_table_is_up_to_date() -> None:
    done = subprocess.run([sys.executable, str(REPORT), "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_check_says_what_is_out_of_date_and_changes_nothing(
    runs: Any,
    report: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def main(*options: str) -> int:
        monkeypatch.setattr(sys, "argv", ["report.py", *options])
        return report["main"]()

    stale, readme = "<!-- names-out:begin -->\nof yesterday\n<!-- names-out:end -->\n", tmp_path / "README.md"
    readme.write_text(stale)
    monkeypatch.setitem(report["main"].__globals__, "ROOT", tmp_path)
    assert main("--check") == 1
    assert "out of date, run python benchmarks/report.py: README.md" in capsys.readouterr().err
    assert readme.read_text() == stale
    assert main() == 0
    assert "of yesterday" not in readme.read_text()
    assert main("--check") == 0


def test_table_shows_the_last_epoch_of_all_seeds(runs: Any) -> None:
    write(runs, *(finished(model, seed, 90.0 + seed) for seed in (0, 1) for model in ("resnet18", "resnet18_noskip")))
    text = runs.tables("tiny")
    assert text.startswith(
        "CIFAR-10, test set, recipe `paper` with 2 epochs of batch 500, no test-time augmentation, bfloat16, seeds 0, 1"
    )
    assert (
        "| ResNet-18 | 11,173,962 | 90.50 ± 0.71 (n=2) | 84.15 to 96.85 | 89.90 (arXiv:2510.24036, abstract) "
        "| 0.250 ± 0.000 (n=2) | 7 ± 0 (n=2) |"
    ) in text
    assert "have not been made" not in text


def test_table_of_the_readme_compares_no_times(runs: Any) -> None:
    write(runs, finished("resnet18", 0, 90.0))
    assert "training, s" in runs.tables("tiny")
    assert "training, s" not in runs.tables("tiny", "training, s")


@pytest.mark.parametrize(
    ("seeds", "words"),
    [
        ({"one": [0]}, "seed 0"),
        ({"one": [1, 0], "two": [0, 1]}, "seeds 0, 1"),
        ({"one": [0, 1, 2], "two": [0]}, "1 to 3 of the seeds 0, 1, 2 a net"),
        ({"one": [0], "two": [1]}, "1 of the seeds 0, 1 a net"),
    ],
)
def test_seeds_are_said_of_all_nets_or_counted(seeds: dict[str, list[int]], words: str) -> None:
    assert seeds_in_words((net, seed) for net, own in seeds.items() for seed in own) == words


def test_interval_is_students(runs: Any) -> None:
    values = [93.43, 93.36, 93.53]
    low, high = stats.t.interval(0.95, 2, loc=sum(values) / 3, scale=stats.sem(values))
    assert runs.interval(values) == f"{low:.2f} to {high:.2f}"
    assert runs.interval(values[:1]) == ""
    assert runs.interval([99.9, 99.8, 100.0]) == "99.65 to 100.00"  # no accuracy is above
    assert runs.interval([17.0, 22.0]) == "0.00 to 51.27"  # nor below


def test_numbers_have_two_digits_and_no_exponent(report: dict[str, Any]) -> None:
    numbers = (1.0e-5, 0.0287, 2.04, 1_430_000.0)
    assert [report["two_digits"](number) for number in numbers] == ["0.00001", "0.029", "2", "1,400,000"]


def test_table_says_what_is_missing_and_what_diverged(runs: Any) -> None:
    assert runs.tables("tiny") == "Not run yet.\n"
    failed = {"name": "resnet18_noskip", "settings": {"seed": 0}, "failed": "the loss was infinite or NaN at step 3"}
    write(runs, finished("resnet18", 0, 90.0), failed)
    text = runs.tables("tiny")
    assert "- ResNet-18 without skips, seed 0: the loss was infinite or NaN at step 3" in text
    assert "2 of the programme's 4 runs have not been made." in text
    assert "±" not in text


def test_paper_is_not_shown_beside_another_data_set(runs: Any) -> None:
    run = finished("resnet18", 0, 90.0)
    run["settings"]["dataset"]["name"] = "CIFAR-100"
    write(runs, run)
    assert "89.9" not in runs.tables("tiny")


def test_runs_of_different_recipes_are_in_different_tables(runs: Any) -> None:
    write(runs, finished("resnet18", 0, 90.0), finished("resnet18", 0, 91.0, epochs=3))
    assert runs.tables("tiny").count("| net |") == 2
    assert runs.drawn("tiny") == []


def test_figures_are_those_of_the_table_with_most_runs(runs: Any) -> None:
    names = ("resnet18", "resnet18_noskip")
    write(runs, finished("resnet18", 0, 90.0, epochs=3), *(finished(name, 1, 80.0) for name in names))
    assert [run["name"] for run in runs.largest("tiny")] == list(names)
    assert "The figures show the runs of the second of these tables.\n\n![" in runs.section("tiny")
    assert len(runs.draw("tiny")) == len(runs.drawn("tiny")) == 3


@pytest.mark.parametrize(
    ("where", "option", "value", "said"),
    [
        ("settings", "channels_last", False, "channels_last False"),
        ("settings", "small_maps", True, "`--small-maps`"),
        ("environment", "compile", "default", "compile default"),
        ("environment", "graph", True, "`--graph`"),
    ],
)
def test_runs_of_different_options_are_in_different_tables(
    runs: Any, where: str, option: str, value: object, said: str
) -> None:
    other = finished("resnet18_noskip", 0, 80.0)
    other[where][option] = value
    write(runs, finished("resnet18", 0, 90.0), other)
    text = runs.tables("tiny")
    assert text.count("| net |") == 2
    assert text.count(f"bfloat16, {said}, seed 0") == 1


@pytest.mark.parametrize(
    ("where", "name", "value"),
    [
        ("settings", "precision", "float32"),
        ("settings", "dataset", {"name": "CIFAR-10", "split": "validation"}),
        ("settings", "dataset", {"name": "CIFAR-10", "split": "test", "sha256": "0123"}),
        ("environment", "device", "cuda"),
    ],
)
def test_runs_of_other_data_precision_or_device_are_in_different_tables(
    runs: Any, where: str, name: str, value: object
) -> None:
    other = finished("resnet18_noskip", 0, 80.0)
    other[where][name] = value
    write(runs, finished("resnet18", 0, 90.0), other)
    assert runs.tables("tiny").count("| net |") == 2


def test_depths_are_compared_where_both_kinds_are_there(runs: Any) -> None:
    both = ["resnet20", "resnet20_noskip", "resnet44", "resnet44_noskip"]
    names = [*both, "resnet32", "resnet32_noskip", "resnet56_noskip", "resnet110"]
    assert runs.compared_depths(names) == {20, 32, 44}
    ends = runs.ends([Result(**finished(name, 0, 90.0)) for name in names])
    assert [result.name for result in ends] == both


def test_older_run_that_says_less_shares_table_and_figures(runs: Any) -> None:
    newer = finished("resnet18_noskip", 0, 80.0)
    newer["settings"]["net"] = {"layers": "0123", "starting_weights": [1.5, 2.5]}
    newer["settings"]["dataset"]["classes"] = ["cat", "dog"]
    newer["settings"] |= {"channels_last": True}
    newer["environment"] |= {"compile": None, "graph": False, "deterministic": False, "commit": "f" * 40}
    write(runs, finished("resnet18", 0, 90.0), {**newer, "earlier_environments": []})
    assert runs.tables("tiny").count("| net |") == 1
    assert len(runs.draw("tiny")) == 3


def test_caption_says_all_with_which_the_runs_were_made(runs: Any) -> None:
    first, second = finished("resnet18", 0, 90.0), finished("resnet18_noskip", 0, 80.0)
    second["environment"] |= {"commit": "f" * 40 + "+changes", "versions": {"torch": "2.14.1"}, "threads": 2}
    earlier = {**first["environment"], "commit": "e" * 40}
    write(runs, first, {**second, "earlier_environments": [earlier]})
    assert "; cpu, 1 or 2 threads, torch 2.14.1 and 2.15.0, commit 012345678, eeeeeeeee, fffffffff+changes." in (
        runs.tables("tiny")
    )


def test_figures_are_drawn_again_when_a_run_changes(runs: Any) -> None:
    write(runs, finished("resnet18", 0, 90.0), finished("resnet18_noskip", 0, 80.0))
    assert runs.update_figures(check=True) == ["figures of tiny"]
    runs.update_figures(check=False)
    assert sorted(path.name for path in runs.FIGURES.glob("*.png")) == sorted(
        f"tiny_{name}.png" for name in runs.drawn("tiny")
    )
    assert runs.update_figures(check=True) == []
    write(runs, finished("resnet18", 0, 90.1))
    assert runs.update_figures(check=True) == ["figures of tiny"]


def test_unknown_region_raises(report: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"region must be one of complexity-imagenet, .*, got 'speed'"):
        report["rewrite"]("<!-- speed:begin -->\n<!-- speed:end -->\n")


def test_time_table_has_a_row_a_case_and_a_column_a_contestant(report: dict[str, Any]) -> None:
    def case(net: str, *names: str) -> dict[str, Any]:
        row = {"cpu_seconds": [1.0] * 3, "ratio_min": 0.5, "ratio_median": 1.25, "ratio_max": 2}
        environment = {"device": "cpu (x86_64, AVX2, 2 cores)"}
        return {
            "net": net,
            "batch": 4,
            "dtype": "float32",
            "environment": environment,
            "rows": dict.fromkeys(names, row),
        }

    cases = [case("one", "torchvision", "resblocks"), case("two", "pytorchcv", "resblocks")]
    header, rows, align = report["performance_tables"].turns(cases, "ratio")
    assert header == ["net", "setting", "torchvision", "pytorchcv", "resblocks", "rounds"]
    assert rows == [
        ["`one`", "batch 4, float32, AVX2", "1", "", "1.25 (0.50 to 2.00)", "3"],
        ["`two`", "batch 4, float32, AVX2", "", "1", "1.25 (0.50 to 2.00)", "3"],
    ]
    assert len(align) == len(header)
