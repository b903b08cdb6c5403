"""The tables of README and docs are those of the result files."""

from __future__ import annotations

import copy
import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPORT = Path(__file__).parent.parent / "benchmarks" / "report.py"
RUN = {
    "name": "resnet18",
    "params": 11173962,
    "settings": {
        "dataset": {"name": "CIFAR-10", "split": "test"},
        "recipe": {"epochs": 2, "batch_size": 500},
        "precision": "bfloat16",
        "seed": 0,
    },
    "environment": {"device": "cpu", "versions": {"torch": "2.15.0"}, "commit": "0123456789abcdef"},
    "epochs": [
        {"eval_accuracy_percent": 10.0, "eval_loss": 2.0, "seconds": 3.0},
        {"eval_accuracy_percent": 90.0, "eval_loss": 0.25, "seconds": 4.0},
    ],
}


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(str(REPORT.parent))
    return runpy.run_path(str(REPORT))


@pytest.fixture
def runs() -> list[dict[str, Any]]:
    """Two seeds of one net."""
    second = copy.deepcopy(RUN)
    second["settings"]["seed"] = 1
    second["epochs"][-1]["eval_accuracy_percent"] = 91.0
    return [copy.deepcopy(RUN), second]


def results_region(report: dict[str, Any], folder: Path, runs: list[dict[str, Any]]) -> str:
    (folder / "example.json").write_text(json.dumps({"results": runs}))
    report["result_tables"].__globals__.update(RESULTS=folder, ROOT=folder)
    return report["rewrite"]("a\n<!-- results:begin -->\nold\n<!-- results:end -->\nb\n")


def test_every_table_is_up_to_date() -> None:
    done = subprocess.run([sys.executable, str(REPORT), "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_table_shows_the_last_epoch_of_all_seeds(
    report: dict[str, Any], tmp_path: Path, runs: list[dict[str, Any]]
) -> None:
    text = results_region(report, tmp_path, runs)
    assert text.startswith("a\n<!-- results:begin -->\nCIFAR-10, test set, 2 epochs, batch 500, bfloat16, seeds 0, 1")
    assert "| ResNet-18 | 11,173,962 | 90.50 ± 0.71 (n=2) | 89.9 | 0.250 ± 0.000 (n=2) | 7 ± 0 (n=2) |" in text
    assert "old" not in text
    assert text.endswith("<!-- results:end -->\nb\n")


def test_paper_is_not_shown_beside_another_data_set(
    report: dict[str, Any], tmp_path: Path, runs: list[dict[str, Any]]
) -> None:
    for run in runs:
        run["settings"]["dataset"]["name"] = "CIFAR-100"
    assert "89.9" not in results_region(report, tmp_path, runs)


def test_runs_of_different_recipes_in_one_file_raise(
    report: dict[str, Any], tmp_path: Path, runs: list[dict[str, Any]]
) -> None:
    runs[1]["settings"]["recipe"]["epochs"] = 3
    with pytest.raises(ValueError, match="same recipe"):
        results_region(report, tmp_path, runs)


def test_unknown_region_raises(report: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"region must be one of complexity, .*, got 'speed'"):
        report["rewrite"]("<!-- speed:begin -->\n<!-- speed:end -->\n")
