"""The sweep runs each cell once, writes one file a run, and loses nothing when it is cut short."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import sweep
import torch
from recompress import distances, through_jpeg

from resblocks import list_models
from resblocks.training import Ranks, Result


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """One programme more, "tiny", of one epoch of two nets on the digits."""
    tiny = sweep.cells(["resnet20", "resnet20_noskip"], "digits", dataset="digits", epochs=1)
    monkeypatch.setitem(sweep.PROGRAMMES, "tiny", tiny)


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, *programmes: str) -> int:
    options = ["--results", str(folder / "results"), "--work", str(folder / "work"), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["sweep.py", *programmes, *options])
    return sweep.main()


def test_sweep_writes_one_file_a_run_and_runs_it_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, tmp_path, "tiny") == 0
    files = sorted((tmp_path / "results" / "tiny").iterdir())
    assert [file.name for file in files] == [
        "resnet20_digits_epochs-1_seed-0.json",
        "resnet20_noskip_digits_epochs-1_seed-0.json",
    ]
    found = json.loads(files[0].read_text())
    assert (found["name"], len(found["epochs"]), found["settings"]["recipe"]["epochs"]) == ("resnet20", 1, 1)
    assert found["environment"]["versions"]["torch"]

    stamps = [file.stat().st_mtime_ns for file in files]
    for trace in (tmp_path / "work").rglob("*"):  # as on another machine, which has the results only
        if trace.is_file():
            trace.unlink()
    assert run(monkeypatch, tmp_path, "tiny") == 0
    assert [file.stat().st_mtime_ns for file in files] == stamps
    assert "0 runs done" in capsys.readouterr().out


def test_only_picks_runs_by_name_and_refuses_a_pattern_without_any(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, tmp_path, "tiny", "--list", "--only", "*noskip*") == 0
    assert capsys.readouterr().out.split() == ["tiny", "resnet20_noskip_digits_epochs-1_seed-0"]
    assert run(monkeypatch, tmp_path, "tiny", "--only", "*noskip*") == 0
    assert [file.stem for file in (tmp_path / "results" / "tiny").iterdir()] == [
        "resnet20_noskip_digits_epochs-1_seed-0"
    ]
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path, "tiny", "--only", "*wrong*")
    assert "--only must match the name of a run of the programmes, got '*wrong*'" in capsys.readouterr().err


def test_sweep_refuses_a_file_of_other_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "results" / "tiny" / "resnet20_digits_epochs-1_seed-0.json"
    file.parent.mkdir(parents=True)
    recipe = sweep.PROGRAMMES["tiny"][0].full_recipe().as_dict() | {"lr": 7.0}
    settings = {"dataset": {"name": "digits", "split": "test"}, "recipe": recipe, "seed": 0}
    file.write_text(json.dumps({"settings": settings}))
    with pytest.raises(ValueError, match=r"resnet20_digits_epochs-1_seed-0.json holds a run with recipe .*'lr': 7.0"):
        run(monkeypatch, tmp_path, "tiny")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dataset": {"name": "CIFAR-10", "split": "test"}}, "holds a run with dataset .*CIFAR-10"),
        ({"seed": 3}, "holds a run with seed 3, not 0"),
    ],
)
def test_file_of_another_cell_is_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    cell, file, digits = sweep.PROGRAMMES["tiny"][0], tmp_path / "file.json", sweep.load("digits", tmp_path)
    settings = sweep.wanted(cell, digits)
    file.write_text(json.dumps({"settings": settings}))
    assert sweep.is_finished(file, cell, digits)
    file.write_text(json.dumps({"settings": settings | change}))
    with pytest.raises(ValueError, match=said):
        sweep.is_finished(file, cell, digits)


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"settings": null}'])
def test_damaged_file_is_said(content: str, tmp_path: Path) -> None:
    cell, file = sweep.PROGRAMMES["tiny"][0], tmp_path / "file.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"file.json is damaged .*: remove it"):
        sweep.is_finished(file, cell, sweep.load("digits", tmp_path))


def test_cell_decides_the_seed_and_the_command_line_the_rest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nets, seeds, given = [], [], []

    def fit(net: torch.nn.Module, *args: Any, seed: int = 0, **options: Any) -> Result:
        nets.append(net)
        seeds.append(seed)
        given.append({name: value for name, value in options.items() if name not in ("out", "name", "ranks")})
        return Result("resnet20", 1, {}, {})

    tiny = sweep.cells(["resnet20"], "digits", seeds=2, dataset="digits")
    monkeypatch.setitem(sweep.PROGRAMMES, "tiny", tiny)
    monkeypatch.setattr(sweep, "fit", fit)
    assert run(monkeypatch, tmp_path, "tiny", "--precision", "bfloat16") == 0
    assert seeds == [0, 1]
    assert not torch.equal(*(net.head.weight for net in nets))
    how = {"device": "cpu", "precision": "bfloat16", "compile": False, "compile_mode": "default", "graph": False}
    assert given == [how, how]


@pytest.mark.parametrize("rank", [0, 1])
def test_first_process_alone_writes(rank: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ranks, file = Ranks(), tmp_path / "file.json"
    ranks.rank = rank
    monkeypatch.setattr(sweep, "fit", lambda *args, **options: Result("resnet20", 1, {}, {}))
    assert sweep.run_cell(sweep.PROGRAMMES["tiny"][0], sweep.load("digits", tmp_path), file, tmp_path, ranks, {})
    assert file.exists() is (rank == 0)


def test_run_from_before_an_option_existed_had_its_default(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for cell in sweep.PROGRAMMES["tiny"]:
        recipe = cell.full_recipe().as_dict()
        del recipe["start_scale"]
        settings = {"dataset": {"name": "digits", "split": "test"}, "recipe": recipe, "seed": 0}
        file = tmp_path / "results" / "tiny" / f"{cell.name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"settings": settings}))
    assert run(monkeypatch, tmp_path, "tiny") == 0
    assert "0 runs done" in capsys.readouterr().out


def test_record_of_a_failed_run_names_no_folder_of_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def diverge(*args: object, out: Path, **options: object) -> None:
        raise sweep.Diverged(f"the last good checkpoint is {out / 'step.pt'}")

    monkeypatch.setattr(sweep, "fit", diverge)
    assert run(monkeypatch, tmp_path, "tiny") == 1
    for cell in sweep.PROGRAMMES["tiny"]:
        failed = json.loads((tmp_path / "results" / "tiny" / f"{cell.name}.json").read_text())["failed"]
        assert failed == f"the last good checkpoint is {Path(cell.name, 'step.pt')}"


def test_run_that_diverges_is_written_down_and_the_next_one_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wild = sweep.cells(["resnet20"], "digits", dataset="digits", epochs=1, lr=1e30)
    monkeypatch.setitem(sweep.PROGRAMMES, "wild", (*wild, sweep.PROGRAMMES["tiny"][0]))
    assert run(monkeypatch, tmp_path, "wild") == 1
    files = sorted((tmp_path / "results" / "wild").iterdir(), key=lambda file: "lr-" not in file.name)
    diverged, fine = (json.loads(file.read_text()) for file in files)
    assert "infinite or NaN" in diverged["failed"]
    assert diverged["environment"]["versions"] == fine["environment"]["versions"]
    assert fine["epochs"]


def test_first_process_decides_for_all_what_is_left(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a node without the results it would train what the others do not, and wait for them for ever."""

    class Second(Ranks):
        def first(self, work: Any, group: Any = None) -> Any:
            return []

    monkeypatch.setattr(Ranks, "from_env", Second)
    assert run(monkeypatch, tmp_path, "tiny") == 0
    assert "0 runs done" in capsys.readouterr().out


def test_every_programme_names_nets_and_recipes_that_exist() -> None:
    for cells in sweep.PROGRAMMES.values():
        assert len({cell.name for cell in cells}) == len(cells)
        for cell in cells:
            cell.full_recipe()
            assert cell.model.removesuffix("_noskip").removesuffix("_bn").removesuffix("_torchinit") in list_models()


def test_unknown_programme_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path, "papper")
    assert "PROGRAMME must be of paper" in capsys.readouterr().err


def test_recompressed_images_are_a_little_worse_in_every_place() -> None:
    ramp = torch.arange(32, dtype=torch.uint8) * 7
    images = torch.stack([ramp.expand(32, 32), ramp.expand(32, 32).mT, 217 - ramp.expand(32, 32)])[None].contiguous()
    error = (through_jpeg(images).float() - images.float()).abs()
    assert 0 < error.mean() < 10
    assert error.max() < 60
    assert torch.equal(through_jpeg(images), through_jpeg(images))
    assert 20 < distances(images, through_jpeg(images)).item() < 40
    assert distances(torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 25.5)).tolist() == pytest.approx([20, 20])
