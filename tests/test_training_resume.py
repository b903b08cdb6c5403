"""kill -9, signals, full disks and damaged files, all of them real: the run goes on and ends with the same bits."""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import itertools
import json
import os
import pickle
import signal
import stat
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import training_workers as workers
from training_workers import RECIPE, STEPS, error_of, run, tiny_fit, tiny_net, weights_of

from resblocks import BasicBlock, Network, ResNet, set_skip
from resblocks.training import FolderLock, Result, folder, load_checkpoint, load_weights, save_checkpoint
from resblocks.training.checkpoint import digest_path, list_checkpoints
from resblocks.training.files import write_atomic, write_digested

resource = pytest.importorskip("resource", reason="limits of POSIX")
pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and resource limits of POSIX")
FIT = sys.modules["resblocks.training.fit"]  # the module, whose name is that of its function


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("unbroken") / "run"
    assert run(out) == [0]
    return weights_of(out)


@pytest.mark.parametrize("step", range(STEPS))
def test_kill_at_any_step_changes_no_bit(step: int, unbroken: bytes, tmp_path: Path) -> None:
    assert run(tmp_path / "run", (workers.kill_at_step, (step,))) == [-signal.SIGKILL]
    assert not (tmp_path / "run" / "weights.safetensors").exists()
    assert run(tmp_path / "run") == [0]
    assert weights_of(tmp_path / "run") == unbroken


@pytest.mark.parametrize("moment", ["half written", "before rename", "after rename"])
@pytest.mark.parametrize("call", [1, 2, 3, 4, 9, 14, 16])  # run.json, digests, checkpoints, weights, result.json
def test_kill_while_writing_changes_no_bit(call: int, moment: str, unbroken: bytes, tmp_path: Path) -> None:
    assert run(tmp_path / "run", (workers.kill_in_write, (call, moment))) == [-signal.SIGKILL]
    assert run(tmp_path / "run") == [0]
    assert weights_of(tmp_path / "run") == unbroken
    assert not list((tmp_path / "run").glob(".tmp-*"))


def test_killed_again_and_again_changes_no_bit(unbroken: bytes, tmp_path: Path) -> None:
    codes = [run(tmp_path / "run", (workers.kill_at_step, (step,)))[0] for step in (1, 3, 6, 9)]
    assert codes == [-signal.SIGKILL] * 4
    assert run(tmp_path / "run") == [0]
    assert weights_of(tmp_path / "run") == unbroken


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_saves_and_exits(number: int, code: int, unbroken: bytes, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run(out, (workers.signal_at_step, (number, 6)), checkpoint_steps=0) == [code]
    found = load_checkpoint(out)
    assert found is not None
    assert found[1]["step"] == 7  # the step in which it came is done and saved
    with FolderLock(out):
        pass
    assert run(out) == [0]
    assert weights_of(out) == unbroken


def test_signal_at_the_very_end_is_not_lost(tmp_path: Path, unbroken: bytes) -> None:
    assert run(tmp_path, (workers.signal_in_last_write, (signal.SIGTERM,))) == [143]
    assert weights_of(tmp_path) == unbroken
    assert len(Result.read(tmp_path / "result.json").epochs) == 2


@pytest.mark.parametrize("epoch", [1, 2])
def test_signal_during_evaluation_is_heard_at_once(epoch: int, tmp_path: Path, unbroken: bytes) -> None:
    assert run(tmp_path, (workers.signal_in_evaluation, (signal.SIGTERM, epoch))) == [143]
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert (found[1]["step"], len(found[1]["epochs"])) == (5 * epoch, epoch - 1)
    assert run(tmp_path) == [0]
    assert weights_of(tmp_path) == unbroken


@pytest.mark.parametrize("content", ["{", "[1]", "null"])
def test_damaged_settings_are_said(content: str, tmp_path: Path) -> None:
    tiny_fit(tmp_path)
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=r"run.json is damaged"):
        tiny_fit(tmp_path)


def test_handlers_come_back(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    tiny_fit(tmp_path / "run")
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_history_of_a_broken_run_is_that_of_an_unbroken_one(tmp_path: Path) -> None:
    whole = tiny_fit(tmp_path / "whole")
    assert run(tmp_path / "broken", (workers.kill_at_step, (8,))) == [-signal.SIGKILL]
    broken = tiny_fit(tmp_path / "broken")
    for key in ("epoch", "step", "lr", "train_loss", "train_accuracy_percent", "eval_loss", "eval_accuracy_percent"):
        assert [epoch[key] for epoch in broken.epochs] == [epoch[key] for epoch in whole.epochs]
    assert broken.gradients == whole.gradients


def _damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "flipped bit":
        content[len(content) // 2] ^= 1
    path.write_bytes(
        {"truncated": content[: len(content) // 2], "empty": b"", "text": b"no checkpoint"}.get(how, content)
    )
    if how == "no digest":
        digest_path(path).unlink()


@pytest.mark.parametrize("how", ["flipped bit", "truncated", "empty", "text", "no digest"])
def test_damaged_checkpoint_is_named_and_the_one_before_used(how: str, unbroken: bytes, tmp_path: Path) -> None:
    assert run(tmp_path, (workers.kill_at_step, (9,))) == [-signal.SIGKILL]
    older, newest = list_checkpoints(tmp_path)
    _damage(newest, how)
    with pytest.warns(UserWarning, match=newest.name):
        found = load_checkpoint(tmp_path)
    assert found is not None
    assert found[0] == older
    assert run(tmp_path) == [0]
    assert weights_of(tmp_path) == unbroken


def test_digest_that_is_no_text_is_damage(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, {"step": 3}, step=3, epochs_done=0)
    digest_path(path).write_bytes(b"\xff" + digest_path(path).read_bytes())
    with pytest.warns(UserWarning, match="is damaged or incomplete"):
        assert load_checkpoint(tmp_path) is None


def _count_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second between any two looks of a run at the clock, and many before the first."""
    clock = SimpleNamespace(monotonic=itertools.count(round(time.monotonic()) + 10**4).__next__)
    monkeypatch.setattr(FIT, "time", clock)


@pytest.mark.parametrize(("seconds", "steps"), [(0, [*range(1, 11)]), (8, [1, 5, 9, 10]), (1e9, [5, 10])])
def test_checkpoints_are_written_by_the_clock_and_after_an_epoch(
    seconds: float, steps: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []

    def save(*args: Any, step: int, **more: Any) -> Path:
        saved.append(step)
        return save_checkpoint(*args, step=step, **more)

    _count_seconds(monkeypatch)  # three in each step
    monkeypatch.setattr(FIT, "save_checkpoint", save)
    tiny_fit(tmp_path, checkpoint_steps=0, checkpoint_seconds=seconds)
    assert saved == steps


def test_time_of_an_epoch_is_its_own_and_outlives_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _count_seconds(monkeypatch)
    whole = tiny_fit(tmp_path / "whole")
    with pytest.raises(SystemExit, match="143"):
        _fit_with_fault(tmp_path / "broken", tiny_net(), "signal", 2)
    broken = tiny_fit(tmp_path / "broken")
    assert len({epoch["seconds"] for result in (whole, broken) for epoch in result.epochs}) == 1


def test_two_checkpoints_are_kept(tmp_path: Path) -> None:
    tiny_fit(tmp_path)
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        "step000000008-epoch00001.pt",
        "step000000010-epoch00002.pt",
    ]
    assert all(digest_path(path).exists() for path in list_checkpoints(tmp_path))


def test_full_disk_keeps_what_was_there(unbroken: bytes, tmp_path: Path) -> None:
    assert run(tmp_path, (workers.kill_at_step, (7,))) == [-signal.SIGKILL]
    before = {path: path.read_bytes() for path in list_checkpoints(tmp_path)}
    assert run(tmp_path, (workers.full_disk, (6000,))) == [1]
    message = error_of(tmp_path)
    assert "no checkpoint at step 8" in message
    assert "File too large" in message
    assert f"{max(before)} is kept" in message
    assert {path: path.read_bytes() for path in list_checkpoints(tmp_path)} == before
    assert not list(tmp_path.glob(".tmp-*"))
    assert run(tmp_path) == [0]
    assert weights_of(tmp_path) == unbroken


@pytest.mark.skipif(sys.platform != "linux", reason="counts its memory in /proc")
def test_full_memory_keeps_the_checkpoint_and_says_the_batch_size(unbroken: bytes, tmp_path: Path) -> None:
    assert run(tmp_path, (workers.full_memory, (7,))) == [1]
    assert "out of memory at step 7 with batch size 16" in error_of(tmp_path)
    assert run(tmp_path) == [0]
    assert weights_of(tmp_path) == unbroken


@pytest.mark.parametrize("name", ["step000000001-epoch00000-keep.pt", "step_best-epoch1.pt", "steps-epoch2.pt"])
def test_checkpoint_that_a_user_keeps_is_left_alone(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    for step in (1, 2, 3):
        assert save_checkpoint(tmp_path, {"step": step}, step=step, epochs_done=0).exists()
    assert len(list_checkpoints(tmp_path)) == 2
    assert load_checkpoint(tmp_path) == (list_checkpoints(tmp_path)[-1], {"step": 3})
    assert (tmp_path / name).read_text() == "mine"


def test_writers_of_one_process_number_do_not_meet(tmp_path: Path) -> None:
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        written = [pool.submit(write_atomic, tmp_path / "file", "same") for _ in range(40)]
    assert not [error for one in written if (error := one.exception()) is not None]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_digest_names_its_file_in_any_language(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    western = partial(Path.open, encoding="cp1252")
    monkeypatch.setattr(Path, "read_text", lambda path: western(path).read())
    write_digested(tmp_path / "\u0410\u0432\u0442\u043e\u0433\u043e\u043d\u043a\u0438", b"data")


def test_checkpoint_holds_tensors_and_plain_types(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {"net": {"weight": torch.ones(2)}, "step": 3}, step=3, epochs_done=0)
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert torch.equal(found[1]["net"]["weight"], torch.ones(2))
    save_checkpoint(tmp_path, {"step": Path("code")}, step=4, epochs_done=0)
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):  # what it holds is not run
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("fault", "ahead", "clip"), [("nan", 0, 0.0), ("nan", 1, 0.0), ("gradient", 0, 0.0), ("gradient", 1, 0.5)]
)
def test_non_finite_loss_or_gradient_stops_before_the_update(
    fault: str, ahead: int, clip: float, tmp_path: Path
) -> None:
    """The weights in memory are those of the last good step, and no bad checkpoint is written."""
    good, bad, recipe = tiny_net(), tiny_net(), replace(RECIPE, clip_norm=clip)
    with pytest.raises(SystemExit, match="143"):
        _fit_with_fault(tmp_path / "good", good, "signal", 4 - 1, recipe=recipe)
    with pytest.raises(
        RuntimeError, match=r"at step 4 \(epoch 1\), learning rate 0.03\d+; that update was not made .*step000000004"
    ):
        _fit_with_fault(tmp_path / "bad", bad, fault, 4, checkpoint_steps=2 - ahead, recipe=recipe)
    for name, tensor in good.named_parameters():
        assert torch.equal(tensor, dict(bad.named_parameters())[name]), name


def _fit_with_fault(out: Path, net: torch.nn.Module, fault: str, step: int, **options: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        from resblocks.training.loop import Loop

        patch.setattr(Loop, "batch", Loop.batch)  # the faults below replace it
        if fault == "nan":
            workers.nan_on_rank(0, step)
        elif fault == "gradient":
            workers.infinite_gradient(step)
        else:
            workers.signal_at_step(signal.SIGTERM, step)
        tiny_fit(out, net, **options)


def test_disk_that_does_not_answer_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_fit(tmp_path)
    (tmp_path / "result.json").unlink()
    checkpoints, read = list_checkpoints(tmp_path), Path.open

    def stale(path: Path, *args: Any, **options: Any) -> Any:
        if path.suffix == ".pt":
            raise OSError(errno.ESTALE, "Stale file handle")
        return read(path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", stale)
        with pytest.raises(RuntimeError, match=r"could not read .*\.pt: Stale file handle; the same command goes on"):
            tiny_fit(tmp_path)
    assert list_checkpoints(tmp_path) == checkpoints
    assert len(tiny_fit(tmp_path).epochs) == 2


def test_run_goes_on_with_or_without_gradients_as_it_began(tmp_path: Path) -> None:
    assert run(tmp_path / "run", (workers.signal_at_step, (signal.SIGTERM, 6)), gradients=False) == [143]
    with pytest.warns(UserWarning, match="holds a run with gradients=False: it goes on so"):
        assert tiny_fit(tmp_path / "run", gradients=True).gradients == []


def test_function_called_skip_is_no_setting() -> None:
    one, other = tiny_net(), tiny_net()
    one.skip, other.skip = (lambda x: x), (lambda x: x)
    assert folder.layers_digest(one) == folder.layers_digest(other)


def test_weights_in_another_order_are_others() -> None:
    state = tiny_net().state_dict()
    turned = {name: tensor.flip(0) for name, tensor in state.items()}
    assert folder.same_values(folder.fingerprint(state), folder.fingerprint(state))
    assert not folder.same_values(folder.fingerprint(state), folder.fingerprint(turned))
    one, other = torch.randn(20), torch.randn(20)
    first, second = ({"a": one, "b": other}, {"a": other, "b": one})
    assert not folder.same_values(folder.fingerprint(first), folder.fingerprint(second))


class _Scaled(torch.nn.Module):
    """A net whose forward depends on what neither names nor options tell; a head that starts at zero hides it."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head, self.scale = torch.nn.Conv2d(3, 8, 3), torch.nn.Linear(8, 3), scale
        torch.nn.init.zeros_(self.head.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.scale * self.conv(x).relu().mean((2, 3)))
        return logits


@pytest.mark.parametrize("finished", [True, False])
def test_net_with_another_forward_is_refused_the_folder(finished: bool, tmp_path: Path) -> None:
    if finished:
        tiny_fit(tmp_path / "run", _Scaled(1.0))
    else:
        _fit_and_stop(tmp_path / "run", _Scaled(1.0))
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    with pytest.raises(ValueError, match=r"holds a run of other settings \(net.first_gradient is \["):
        tiny_fit(tmp_path / "run", _Scaled(2.0))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before
    assert tiny_fit(tmp_path / "run", _Scaled(1.0001)).accuracy_percent > 0  # as another device rounds


def _fit_and_stop(out: Path, net: torch.nn.Module) -> None:
    with pytest.raises(SystemExit):
        _fit_with_fault(out, net, "signal", 4)


class _Says(torch.nn.Identity):
    def extra_repr(self) -> str:
        return repr(self.keep)


def test_address_in_what_a_layer_says_is_no_setting() -> None:
    one, other = _Says(), _Says()
    one.keep, other.keep = (lambda x: x), (lambda x: x)
    assert folder.layers_digest(one) == folder.layers_digest(other)


def test_weights_that_went_bad_are_not_saved(tmp_path: Path) -> None:
    net = tiny_net()
    net[1].register_buffer("spare", torch.zeros(1))  # which nothing reads

    def spoil(norm: Any, *_: object) -> None:
        norm.spare.fill_(float("inf"))

    net[1].register_forward_hook(spoil)
    with pytest.raises(RuntimeError, match="weights of tiny became infinite or NaN by step 2"):
        tiny_fit(tmp_path, net)
    assert list_checkpoints(tmp_path) == []


def test_finished_run_is_read_and_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first_net, second_net = tiny_net(), tiny_net()
    first = tiny_fit(tmp_path, first_net)
    monkeypatch.setattr("resblocks.training.loop.Loop.train_step", None)  # would raise
    second = tiny_fit(tmp_path, second_net)
    assert second == first
    assert all(
        torch.equal(a, b)
        for a, b in zip(first_net.state_dict().values(), second_net.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("how", ["flipped bit", "no digest"])
def test_damaged_final_weights_are_made_again(how: str, unbroken: bytes, tmp_path: Path) -> None:
    tiny_fit(tmp_path)
    _damage(tmp_path / "weights.safetensors", how)
    with pytest.raises(RuntimeError, match="damaged"):
        load_weights(tmp_path / "weights.safetensors", tiny_net())
    tiny_fit(tmp_path)
    assert weights_of(tmp_path) == unbroken


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed is 0 there, 1 now"),
        (
            {"recipe": RECIPE.__class__(**{**RECIPE.as_dict(), "milestones": (), "epochs": 3})},
            "recipe.epochs is 2 there, 3 now",
        ),
        ({"name": "other"}, "net.name is 'tiny' there, 'other' now"),
        ({"classes": ("b", "a", "c")}, r"dataset.classes is \['a', 'b', 'c'\] there, \['b', 'a', 'c'\] now"),
    ],
)
def test_folder_of_other_settings_is_refused(change: dict[str, object], message: str, tmp_path: Path) -> None:
    tiny_fit(tmp_path)

    def files() -> list[tuple[str, int]]:
        return sorted((path.name, path.stat().st_mtime_ns) for path in tmp_path.iterdir() if path.name != "lock")

    before = files()
    with pytest.raises(ValueError, match=message):
        tiny_fit(tmp_path, **change)
    assert files() == before


def test_finished_run_without_its_checkpoints_is_no_other_run(tmp_path: Path) -> None:
    tiny_fit(tmp_path)
    for checkpoint in list_checkpoints(tmp_path):
        checkpoint.unlink()
    with pytest.raises(ValueError, match="seed is 0 there, 1 now"):
        tiny_fit(tmp_path, seed=1)


def test_finished_run_of_a_layer_with_other_options_is_refused(tmp_path: Path) -> None:
    tiny_fit(tmp_path, tiny_net(dropout=0.3))
    with pytest.raises(ValueError, match=r"net.layers is .* there"):
        tiny_fit(tmp_path, tiny_net(dropout=0.1))


@pytest.mark.parametrize("content", ['{"name": "tiny", "params": 1, "settings": {}, "environment": {}}', "[]"])
def test_damaged_result_is_made_again(content: str, unbroken: bytes, tmp_path: Path) -> None:
    tiny_fit(tmp_path)
    (tmp_path / "result.json").write_text(content)
    assert len(tiny_fit(tmp_path).epochs) == 2
    assert weights_of(tmp_path) == unbroken


def _other_start(kind: str) -> torch.nn.Module:
    net = tiny_net()
    if kind == "frozen":
        net[0].requires_grad_(False)
    else:
        torch.nn.init.ones_(net[0].bias)
    return net


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("weights", r"net.starting_weights is \[.*\] there, \[.*\] now"),
        ("frozen", "net.frozen is None there, .*'0.weight'"),
    ],
)
def test_finished_run_from_another_start_is_refused(kind: str, message: str, tmp_path: Path) -> None:
    """A pretrained net and one from scratch would else get the same result, and lose their weights."""
    net = tiny_net()
    tiny_fit(tmp_path, net)
    tiny_fit(tmp_path, net)  # the trained net itself: nothing is lost
    other = _other_start(kind)
    before = other[0].bias.clone()
    with pytest.raises(ValueError, match=message):
        tiny_fit(tmp_path, other)
    assert torch.equal(other[0].bias, before)


def test_counts_of_batch_norm_do_not_hide_other_weights(tmp_path: Path) -> None:
    nets = tiny_net(), _other_start("weights")
    for net in nets:
        net[1].num_batches_tracked.fill_(10**6)
    tiny_fit(tmp_path, nets[0])
    with pytest.raises(ValueError, match=r"net.starting_weights is \[.*\] there, \[.*\] now"):
        tiny_fit(tmp_path, nets[1])


def test_finished_run_is_given_to_a_start_that_was_rounded_otherwise(tmp_path: Path) -> None:
    """As weights of one seed are on another processor."""
    tiny_fit(tmp_path)
    other = tiny_net()
    with torch.no_grad():
        other[0].weight.mul_(1 + 1e-7)
    before = (tmp_path / "result.json").stat().st_mtime_ns
    tiny_fit(tmp_path, other)
    assert (tmp_path / "result.json").stat().st_mtime_ns == before


def test_stopped_run_goes_on_with_its_own_weights_and_says_so(unbroken: bytes, tmp_path: Path) -> None:
    assert run(tmp_path, (workers.kill_at_step, (7,))) == [-signal.SIGKILL]
    with pytest.warns(UserWarning, match="started from other weights: it goes on with its own"):
        result = tiny_fit(tmp_path, _other_start("weights"))
    assert weights_of(tmp_path) == unbroken
    assert result.settings == json.loads((tmp_path / "run.json").read_text())


def test_run_without_a_checkpoint_starts_anew(tmp_path: Path) -> None:
    assert run(tmp_path, (workers.kill_at_step, (0,))) == [-signal.SIGKILL]
    result = tiny_fit(tmp_path, _other_start("weights"))
    assert result.settings == json.loads((tmp_path / "run.json").read_text())
    assert weights_of(tmp_path) != b""


@pytest.mark.filterwarnings("ignore:checkpoint .* is damaged")
def test_run_whose_checkpoints_are_damaged_starts_anew(tmp_path: Path) -> None:
    assert run(tmp_path / "run", (workers.kill_at_step, (7,))) == [-signal.SIGKILL]
    for checkpoint in list_checkpoints(tmp_path / "run"):
        _damage(checkpoint, "flipped bit")
    anew = tiny_fit(tmp_path / "run", _other_start("weights"))
    other = tiny_fit(tmp_path / "other", _other_start("weights"))
    assert anew.settings == other.settings == json.loads((tmp_path / "run" / "run.json").read_text())
    assert weights_of(tmp_path / "run") == weights_of(tmp_path / "other")


def test_settings_that_fail_in_the_first_step_do_not_keep_the_folder(tmp_path: Path) -> None:
    """An image of full size passes the net, the smaller ones of the training do not."""

    def net() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(108, 3))

    with pytest.raises(ValueError, match=r"in training \(start_scale=0.5, .*shapes cannot be multiplied"):
        tiny_fit(tmp_path, net(), recipe=replace(RECIPE, start_scale=0.5), gradients=False)
    assert len(tiny_fit(tmp_path, net()).epochs) == 2


def test_checkpoints_of_nobody_knows_whom_are_refused(tmp_path: Path) -> None:
    tiny_fit(tmp_path)
    (tmp_path / "run.json").unlink()
    with pytest.raises(ValueError, match=r"holds a run but no run.json, so whose it is is not known"):
        tiny_fit(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipe": replace(RECIPE, cutout=30)}, "cutout must fit"),
        ({"recipe": replace(RECIPE, batch_size=500)}, "batch_size must be at most"),
        ({"graph": True}, "graph must be False"),
    ],
)
def test_settings_that_cannot_work_do_not_keep_the_folder(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_fit(tmp_path, **change)
    assert len(tiny_fit(tmp_path).epochs) == 2


@pytest.mark.parametrize("other", ["plain", "switched", "activation"])
def test_folder_of_a_net_with_the_same_state_dict_is_refused(other: str, tmp_path: Path) -> None:
    """A plain net with shortcut A has the weights of the residual one: its result must not be taken for it."""

    def net(**options: object) -> Network:
        torch.manual_seed(0)
        return ResNet(BasicBlock, [1], [8], stem="cifar", stem_width=8, num_classes=3, shortcut="A", **options)

    tiny_fit(tmp_path, net())
    tiny_fit(tmp_path, net())
    changed = net(**{"plain": {"skip": False}, "activation": {"activation": torch.nn.GELU}}.get(other, {}))
    if other == "switched":
        set_skip(changed, False)
    with pytest.raises(ValueError, match=r"net.layers is .* there"):
        tiny_fit(tmp_path, changed)


def test_folder_from_before_an_option_of_the_recipe_still_counts(tmp_path: Path) -> None:
    tiny_fit(tmp_path)
    settings = json.loads((tmp_path / "run.json").read_text())
    del settings["recipe"]["alternate_flip"]
    (tmp_path / "run.json").write_text(json.dumps(settings))
    before = (tmp_path / "result.json").stat().st_mtime_ns
    tiny_fit(tmp_path)
    assert (tmp_path / "result.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("other", [{"seed": 1}, {"recipe": replace(RECIPE, epochs=1)}])
def test_result_of_another_run_is_not_taken_for_that_of_the_folder(other: dict[str, Any], tmp_path: Path) -> None:
    own = tiny_fit(tmp_path / "own")
    tiny_fit(tmp_path / "other", **other)
    (tmp_path / "other" / "result.json").replace(tmp_path / "own" / "result.json")
    assert tiny_fit(tmp_path / "own").epochs == own.epochs


def test_second_run_in_one_folder_is_refused(tmp_path: Path) -> None:
    with FolderLock(tmp_path), pytest.raises(RuntimeError, match=f"in use by another run .process {os.getpid()}"):
        tiny_fit(tmp_path)
    with FolderLock(tmp_path):
        assert run(tmp_path) == [1]
    assert "in use by another run" in error_of(tmp_path)
    assert run(tmp_path) == [0]


@pytest.mark.parametrize("content", ["", "process 1 on elsewhere"])  # killed while locking; another's, or ours again
def test_lock_file_of_a_dead_run_does_not_count(content: str, tmp_path: Path) -> None:
    (tmp_path / "lock").write_text(content)
    with FolderLock(tmp_path) as lock:
        assert lock.path.read_text().startswith(f"process {os.getpid()} on ")


def test_lock_is_given_back_although_a_forked_child_lives(tmp_path: Path) -> None:
    with FolderLock(tmp_path):
        read, write = os.pipe()
        if (child := os.fork()) == 0:
            os.read(read, 1)
            os._exit(0)
    with FolderLock(tmp_path):
        os.write(write, b"x")
    os.waitpid(child, 0)


def test_old_checkpoint_that_cannot_be_deleted_yet_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def in_use(path: Path, **options: Any) -> None:
        raise PermissionError(errno.EACCES, "The process cannot access the file because it is being used")

    for step in (1, 2, 3):
        with monkeypatch.context() as patch:
            patch.setattr(
                Path, "unlink", lambda path, **options: in_use(path) if path.name.startswith("step") else None
            )
            save_checkpoint(tmp_path, {"step": step}, step=step, epochs_done=0)
    assert len(list_checkpoints(tmp_path)) == 3
    save_checkpoint(tmp_path, {"step": 4}, step=4, epochs_done=0)
    assert len(list_checkpoints(tmp_path)) == 2


@pytest.mark.parametrize("name", ["lock", "log.jsonl"])
def test_link_in_a_folder_of_others_does_not_lead_out_of_it(name: str, tmp_path: Path) -> None:
    thesis = tmp_path / "thesis"
    thesis.write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(thesis)
    with pytest.raises(RuntimeError, match="symbolic links"):
        tiny_fit(tmp_path / "run")
    assert thesis.read_text() == "precious"


def test_folder_on_a_file_system_without_locks_costs_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*args: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    warned = pytest.warns(UserWarning, match=r"has no lock \(.*No locks available\): no other run may use it")
    with warned, FolderLock(tmp_path):
        pass


@contextlib.contextmanager
def _no_file_beyond(limit: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", ["lock", "log.jsonl"])
def test_disk_that_is_full_from_the_start_is_said(name: str, unbroken: bytes, tmp_path: Path) -> None:
    assert run(tmp_path, (workers.kill_at_step, (7,))) == [-signal.SIGKILL]
    limit = 5 if name == "lock" else (tmp_path / name).stat().st_size
    with _no_file_beyond(limit), pytest.raises(RuntimeError, match=f"could not write .*{name}: .*; free space there"):
        tiny_fit(tmp_path)
    tiny_fit(tmp_path)
    assert weights_of(tmp_path) == unbroken


@pytest.mark.parametrize(("number", "fine"), [(errno.EINVAL, True), (errno.ENOTSUP, True), (errno.EIO, False)])
def test_file_system_that_cannot_sync_a_folder_will_do(
    number: int, fine: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    with contextlib.nullcontext() if fine else pytest.raises(RuntimeError, match="could not write"):
        write_atomic(tmp_path / "file", "content")
    assert (tmp_path / "file").read_text() == "content"


def test_file_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    rename = os.replace

    def fsync(descriptor: int) -> None:
        done.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("rename"), rename(*paths)))
    write_atomic(tmp_path / "file", "content")
    assert done == ["file", "rename", "folder"]


def test_file_that_does_not_read_back_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = os.replace

    def faulty(source: Path, target: Path) -> None:
        if target.suffix == ".pt":
            source.write_bytes(b"other bytes")
        rename(source, target)

    monkeypatch.setattr(os, "replace", faulty)
    with pytest.raises(RuntimeError, match=r"a\.pt does not read back as it was written"):
        write_digested(tmp_path / "a.pt", b"bytes")


def test_folder_that_cannot_be_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RuntimeError, match="file cannot be an output folder: File exists"):
        FolderLock(tmp_path / "file").acquire()


def test_gradients_are_recorded_without_a_trace_in_the_training(unbroken: bytes, tmp_path: Path) -> None:
    tiny_fit(tmp_path / "with", gradients=True)
    tiny_fit(tmp_path / "without", gradients=False)
    assert weights_of(tmp_path / "with") == weights_of(tmp_path / "without") == unbroken
    recorded = Result.read(tmp_path / "with" / "result.json").gradients
    assert [record["epoch"] for record in recorded] == [0, 1, 2]
    assert [layer["name"] for layer in recorded[0]["layers"]] == ["0.weight", "6.weight"]
    assert all(layer["mean_abs"] > 0 for layer in recorded[0]["layers"])


def test_result_says_all_that_a_run_was_made_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step, commit in ((3, "first"), (6, "first"), (8, "second")):
        monkeypatch.setattr(FIT, "environment", lambda *args, commit=commit, **more: {"commit": commit})
        with pytest.raises(SystemExit, match="143"):
            _fit_with_fault(tmp_path, tiny_net(), "signal", step)
    monkeypatch.setattr(FIT, "environment", lambda *args, **more: {"commit": "third"})
    result = tiny_fit(tmp_path)
    assert result.environment == {"commit": "third"}
    assert result.earlier_environments == [{"commit": "first"}, {"commit": "second"}]
    assert Result.read(tmp_path / "result.json") == result


def test_log_tells_the_story(tmp_path: Path) -> None:
    assert run(tmp_path, (workers.kill_at_step, (7,))) == [-signal.SIGKILL]
    tiny_fit(tmp_path)
    events = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["start", "epoch", "resume", "epoch", "end"]
    assert events[2]["step"] == 6


@pytest.mark.parametrize("from_the_start", [True, False])
def test_tensorboard_shows_every_epoch_once(from_the_start: bool, tmp_path: Path) -> None:
    """Also where it is asked for in the middle of a run."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with pytest.raises(SystemExit, match="143"):
        _fit_with_fault(tmp_path, tiny_net(), "signal", 6, tensorboard=from_the_start)
    result = tiny_fit(tmp_path, tensorboard=True)
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    shown = [(event.step, event.value) for event in events.Scalars("eval_loss")]
    assert shown == [(epoch["step"], pytest.approx(epoch["eval_loss"])) for epoch in result.epochs]


def test_line_of_an_epoch_that_a_kill_kept_from_the_log_is_made_up_for(tmp_path: Path) -> None:
    assert run(tmp_path, (workers.kill_before_the_line_of_an_epoch, (1,))) == [-signal.SIGKILL]
    result = tiny_fit(tmp_path)
    events = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["start", "epoch", "resume", "epoch", "end"]
    assert [event for event in events if event["event"] == "epoch"] == [
        {"time": event["time"], "event": "epoch", **epoch}
        for event, epoch in zip((events[1], events[3]), result.epochs, strict=True)
    ]


@pytest.mark.parametrize("line", ["[1]", "{}", "1", '{"event": "epoch"}'])
def test_line_of_the_log_that_says_something_else_does_not_stop_a_run(line: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="143"):
        _fit_with_fault(tmp_path, tiny_net(), "signal", 6)
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write(line + "\n")
    assert len(tiny_fit(tmp_path).epochs) == 2
