"""Two real gloo processes: the same order and the same bits, and no hang when one of them fails."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import training_workers as workers
from safetensors.torch import load_file
from training_workers import STEPS, error_of, run, weights_of

from resblocks.training import FolderLock, Ranks, Result, load_checkpoint, load_weights
from resblocks.training.loop import Loop

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unbroken run of two ranks, with the rows that each step took."""
    out = tmp_path_factory.mktemp("two") / "run"
    out.mkdir()
    assert run(out, (workers.record_rows, (str(out),)), ranks=2) == [0, 0]
    return out


def _rows(out: Path, rank: int) -> list[list[int]]:
    return [json.loads(line) for line in (out / f"rows{rank}").read_text().splitlines()]


def test_two_ranks_take_the_images_that_one_takes(two: Path, tmp_path: Path) -> None:
    assert run(tmp_path, (workers.record_rows, (str(tmp_path),))) == [0]
    together = [first + second for first, second in zip(_rows(two, 0), _rows(two, 1), strict=True)]
    assert together == _rows(tmp_path, 0)
    assert len(together) == STEPS
    epoch = [row for step in together[:5] for row in step]
    assert len(set(epoch)) == 80  # no image twice in an epoch
    assert together[:5] != together[5:]  # another order in the next one


def test_result_says_how_many_processes_trained(two: Path) -> None:
    assert Result.read(two / "result.json").environment["processes"] == 2


def _epochs(out: Path) -> list[dict[str, Any]]:
    return Result.read(out / "result.json").epochs


def _plain_net() -> torch.nn.Module:
    """Without batch norm and dropout, whose results rightly depend on the division into ranks."""
    return workers.tiny_net(norm=False, dropout=0.0)


def _train_on_one_and_two(folder: Path, make_net: Callable[[], torch.nn.Module]) -> dict[str, torch.Tensor]:
    """The weights of two ranks, which are those of one."""
    assert run(folder / "one", make_net=make_net) == [0]
    assert run(folder / "two", make_net=make_net, ranks=2) == [0, 0]
    one, two = (load_file(folder / name / "weights.safetensors") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-6)
    return two


def test_two_ranks_equal_one_to_rounding(tmp_path: Path) -> None:
    _train_on_one_and_two(tmp_path, _plain_net)
    one_run, two_run = (Result.read(tmp_path / name / "result.json") for name in ("one", "two"))
    for a, b in zip(one_run.epochs, two_run.epochs, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-5)
        assert a["eval_loss"] == pytest.approx(b["eval_loss"], rel=1e-5)
        assert a["eval_accuracy_percent"] == pytest.approx(b["eval_accuracy_percent"])


class _Idle(torch.nn.Module):
    """A net with a weight that its forward does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.idle = _plain_net(), torch.nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.net(x)
        return logits


def test_weight_without_a_gradient_stays_on_two_ranks_as_on_one(tmp_path: Path) -> None:
    two = _train_on_one_and_two(tmp_path, _Idle)
    assert torch.equal(two["idle"], torch.ones(3))


@pytest.mark.parametrize("step", [0, 3, 5, 8])
def test_killed_ranks_go_on_to_the_same_bits(step: int, two: Path, tmp_path: Path) -> None:
    assert run(tmp_path, (workers.kill_at_step, (step,)), ranks=2) == [-signal.SIGKILL] * 2
    assert run(tmp_path, ranks=2) == [0, 0]
    assert weights_of(tmp_path) == weights_of(two)
    for broken, whole in zip(_epochs(tmp_path), _epochs(two), strict=True):
        assert broken["train_loss"] == pytest.approx(whole["train_loss"], rel=1e-12)
        assert broken["train_accuracy_percent"] == whole["train_accuracy_percent"] <= 100


def test_killed_ranks_go_on_to_the_same_bits_where_the_order_of_a_sum_matters(tmp_path: Path) -> None:
    """Of two numbers either order gives the same sum, of three it does not."""
    three = {"ranks": 3, "recipe": replace(workers.RECIPE, batch_size=15)}
    assert run(tmp_path / "whole", **three) == [0] * 3
    assert run(tmp_path / "broken", (workers.kill_at_step, (3,)), **three) == [-signal.SIGKILL] * 3
    assert run(tmp_path / "broken", **three) == [0] * 3
    assert weights_of(tmp_path / "broken") == weights_of(tmp_path / "whole")


def test_layers_that_communicate_in_training_do_not_hang(tmp_path: Path) -> None:
    assert run(tmp_path, ranks=2, make_net=workers.talking_net, timeout_seconds=6.0) == [0, 0]


def test_finished_run_reaches_ranks_that_have_another_disk(tmp_path: Path) -> None:
    elsewhere = (workers.disk_of_its_own, (str(tmp_path),))
    for _ in range(2):
        assert run(Path("run"), elsewhere, ranks=2, keep="net") == [0, 0]
    final = load_file(tmp_path / "0" / "run" / "weights.safetensors")
    assert not (tmp_path / "1" / "run").exists()
    for rank in (0, 1):
        kept = torch.load(tmp_path / str(rank) / f"net-{rank}.pt", weights_only=True)
        assert all(torch.equal(kept[name], tensor) for name, tensor in final.items())


def test_evaluation_counts_fewer_images_than_ranks(tmp_path: Path) -> None:
    recipe = replace(workers.RECIPE, batch_size=15, epochs=1)
    assert run(tmp_path, ranks=3, recipe=recipe, evaluated=1) == [0, 0, 0]
    (epoch,) = _epochs(tmp_path)
    assert epoch["eval_loss"] > 0
    assert epoch["eval_accuracy_percent"] in (0, 100)


def test_evaluation_of_two_ranks_is_that_of_the_saved_net(two: Path) -> None:
    """Batch norm statistics differ by rank until they are made equal."""
    net = workers.tiny_net()
    load_weights(two / "weights.safetensors", net)
    loop = Loop(net, workers.tiny_dataset(), workers.RECIPE, 0, torch.device("cpu"), torch.float32, Ranks())
    loss, accuracy = loop.evaluate() or (0, 0)
    assert _epochs(two)[-1]["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert _epochs(two)[-1]["eval_accuracy_percent"] == pytest.approx(accuracy)


def test_signal_to_one_rank_stops_both_and_saves(two: Path, tmp_path: Path) -> None:
    assert run(tmp_path, (workers.signal_on_rank, (1, signal.SIGTERM, 6)), ranks=2) == [143, 143]
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert found[1]["step"] == 7
    assert run(tmp_path, ranks=2) == [0, 0]
    assert weights_of(tmp_path) == weights_of(two)


@pytest.mark.parametrize("rank", [0, 1])
def test_other_rank_ends_when_one_is_killed_and_both_go_on_to_the_same_bits(
    rank: int, two: Path, tmp_path: Path
) -> None:
    codes = run(tmp_path, (workers.kill_rank_at_step, (rank, 7)), ranks=2, timeout_seconds=6.0)
    assert (codes[rank], codes[1 - rank]) == (-9, 1)
    assert "another process died or was silent too long at step" in error_of(tmp_path, 1 - rank)
    assert run(tmp_path, ranks=2) == [0, 0]
    assert weights_of(tmp_path) == weights_of(two)


def test_non_finite_loss_on_one_rank_stops_both(tmp_path: Path) -> None:
    out = tmp_path / "nccl timeout"  # the message names the folder, and is not to be taken for one of torch
    assert run(out, (workers.nan_on_rank, (1, 4)), ranks=2) == [1, 1]
    for rank in (0, 1):
        assert "loss or gradient norm of tiny was infinite or NaN at step 4" in error_of(out, rank)
    found = load_checkpoint(out)
    assert found is not None
    assert found[1]["step"] == 4
    assert all(tensor.isfinite().all() for tensor in found[1]["net"].values())


def test_non_finite_statistics_on_one_rank_stop_both(tmp_path: Path) -> None:
    assert run(tmp_path, (workers.bad_statistics_on_rank, (1,)), ranks=2, timeout_seconds=6.0) == [1, 1]
    for rank in (0, 1):
        assert "weights of tiny became infinite or NaN by step 2" in error_of(tmp_path, rank)


def test_silent_rank_ends_the_run_with_an_error(tmp_path: Path) -> None:
    codes = run(tmp_path, (workers.sleep_on_rank, (1, 4, 12.0)), ranks=2, timeout_seconds=6.0)
    assert codes[0] == 1
    assert "another process died or was silent too long at step 4; the last checkpoint stays" in error_of(tmp_path)


def test_first_rank_may_load_for_longer_than_a_rank_may_be_silent(tmp_path: Path) -> None:
    assert run(tmp_path, ranks=2, timeout_seconds=6.0, load_seconds=8.0) == [0, 0]


def test_batch_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    recipe = workers.Recipe(name="odd", epochs=1, batch_size=15, crop=0)
    assert run(tmp_path, ranks=2, recipe=recipe) == [1, 1]
    assert "batch_size must be a multiple of the 2 processes, got 15" in error_of(tmp_path, 1)


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("recipe", replace(workers.RECIPE, lr=0.5), "recipe.lr is 0.05 on process 0, 0.5 on 1"),
        ("seed", 1, "seed is 0 on process 0, 1 on 1"),
        ("evaluated", 39, "dataset.sha256 is "),
        ("checkpoint_steps", 3, "checkpoint_steps is 2 on process 0, 3 on 1"),
        ("gradients", False, "gradients is True on process 0, False on 1"),
    ],
)
def test_ranks_with_other_settings_do_not_train_together(option: str, value: Any, said: str, tmp_path: Path) -> None:
    assert run(tmp_path, (workers.other_option_on_rank, (1, option, value)), ranks=2) == [1, 1]
    for rank in (0, 1):
        assert f"ValueError: settings must be the same on all processes ({said}" in error_of(tmp_path, rank)
    assert not (tmp_path / "run.json").exists()


def test_ranks_may_start_from_other_weights_which_the_first_gives_to_all(two: Path, tmp_path: Path) -> None:
    assert run(tmp_path, (workers.other_weights_on_rank, (1,)), ranks=2) == [0, 0]
    assert weights_of(tmp_path) == weights_of(two)


@pytest.mark.parametrize("seconds", [-1.0, 0.0, float("nan"), float("inf")])
def test_silence_must_have_an_end(seconds: float) -> None:
    with pytest.raises(ValueError, match=f"timeout_seconds must be positive and finite, got {seconds}"):
        Ranks.from_env(seconds)


@pytest.mark.parametrize(("nccl", "backend"), [(True, "cpu:gloo,cuda:nccl"), (False, "gloo")])
def test_gpus_need_no_nccl(nccl: bool, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.distributed.is_nccl_available", lambda: nccl)
    monkeypatch.setattr("torch.distributed.init_process_group", lambda backend, timeout: asked.append(backend))
    Ranks.from_env()
    assert asked == [backend]


def test_error_of_the_first_rank_reaches_all(tmp_path: Path) -> None:
    with FolderLock(tmp_path):
        assert run(tmp_path, ranks=2) == [1, 1]
    assert "in use by another run" in error_of(tmp_path, 0)
    assert "on the first process: " in error_of(tmp_path, 1)
    assert "in use by another run" in error_of(tmp_path, 1)
