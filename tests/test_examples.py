"""The short examples run as they stand; the long one, examples/cifar10_resnet18.py, is a command of the README."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def printed(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> str:
    """What the example of that name prints; what it writes lies in tmp_path."""
    file = str(EXAMPLES / f"{request.param}.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [file])
    runpy.run_path(file, run_name="__main__")
    return capsys.readouterr().out


@pytest.mark.parametrize("printed", ["lesions"], indirect=True)
def test_lesions_name_each_block_and_cost_accuracy(printed: str) -> None:
    assert len(re.findall(r"^stages\.\d\.\d ", printed, re.M)) == 9
    intact = re.search(r"whole net: (.+) %", printed)
    plain = re.search(r"without any shortcut: (.+) %", printed)
    assert intact is not None
    assert plain is not None
    assert float(intact[1]) > 90 > 50 > float(plain[1])
    curve = re.findall(r"^ +(\d) +([\d.]+) % to +([\d.]+) %", printed, re.M)
    assert [int(count) for count, *_ in curve] == list(range(10))
    assert float(curve[0][1]) == float(intact[1]) > float(curve[9][2])


@pytest.mark.parametrize("printed", ["loss_surface"], indirect=True)
def test_loss_surface_is_lowest_near_the_trained_nets(printed: str, tmp_path: Path) -> None:
    rows = [[float(cell) for cell in row] for row in re.findall(r"^ +(-?\d\.\d) +([\d.]+) +([\d.]+)$", printed, re.M)]
    assert [step for step, *_ in rows] == [step / 5 for step in range(-5, 6)]
    for losses in list(zip(*rows, strict=True))[1:]:
        assert losses[5] == min(losses) < 1 < 10 < losses[0]
    assert (tmp_path / "runs" / "loss_surface" / "surfaces.png").stat().st_size > 10_000


@pytest.mark.parametrize("printed", ["own_block"], indirect=True)
def test_own_block_learns_with_and_without_skips(printed: str) -> None:
    found = dict(re.findall(r"^(with.* skips): (.+) % on the test set", printed, re.M))
    assert sorted(found) == ["with skips", "without skips"]
    assert min(map(float, found.values())) > 90
    assert printed.count("InvertedResidual") == 10


@pytest.mark.parametrize("printed", ["torchvision_weights"], indirect=True)
def test_torchvision_weights_give_equal_results(printed: str) -> None:
    assert printed.startswith("all weights copied as they stand")
    apart = re.findall(r"relative difference (.+)$", printed, re.M)
    assert len(apart) == 4
    assert max(map(float, apart)) < 1e-4
    assert "every name and shape equal" in printed
