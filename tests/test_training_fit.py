"""Training itself: it learns, on the device and in the precision asked for, and what it leaves behind is complete."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import os
import re
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from training_workers import RECIPE, tiny_dataset, tiny_fit, tiny_net

import resblocks.training.__main__ as entry
from resblocks.diagnostics import GradientFlow
from resblocks.training import (
    Dataset,
    Diverged,
    FolderLock,
    Recipe,
    Result,
    build_net,
    draw_figures,
    environment,
    fit,
    load_digits,
    load_weights,
)
from resblocks.training.augment import draw_first_flips, normalise
from resblocks.training.check import check_net
from resblocks.training.device import cudnn_search, has_fast_bfloat16, pick_device, pick_precision
from resblocks.training.files import write_json
from resblocks.training.loop import Loop
from resblocks.training.meter import Meter
from resblocks.training.ranks import Ranks
from resblocks.training.signals import Signals

EXAMPLE = Path(__file__).parents[1] / "examples" / "cifar10_resnet18.py"


def _loop(net: nn.Module, dataset: Dataset | None = None, recipe: Recipe = RECIPE, seed: int = 0) -> Loop:
    return Loop(net, dataset or tiny_dataset(), recipe, seed, torch.device("cpu"), torch.float32, Ranks())


def test_resnet20_learns_the_digits(tmp_path: Path) -> None:
    data = load_digits()
    recipe = Recipe(epochs=2, batch_size=50, lr=0.1, crop=0, flip=False)
    result = fit(
        build_net("resnet20", data), data, recipe, out=tmp_path, device="cpu", precision="float32", progress=False
    )
    assert result.accuracy_percent > 85
    assert result.epochs[-1]["train_loss"] < 0.6 * result.epochs[0]["train_loss"]


def test_gradients_are_of_images_of_all_classes() -> None:
    """Image files come class by class: the first ones would all show the same thing."""
    images, labels = torch.zeros(400, 3, 8, 8, dtype=torch.uint8), torch.arange(2).repeat_interleave(200)
    dataset = Dataset(
        "two", ("dark", "bright"), images + 255 * labels[:, None, None, None].byte(), labels, images, labels
    )
    net, seen = tiny_net(), []
    loop = _loop(net, dataset, Recipe(epochs=1, batch_size=100, crop=0, flip=False))
    loop.net.register_forward_pre_hook(lambda module, args: seen.append(args[0].mean((1, 2, 3))))
    loop.gradient_layers()
    assert 0.25 < float((seen[0] > 0).float().mean()) < 0.75


@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_step_equals_plain_pytorch(clip: float) -> None:
    """One step of the loop is forward, cross-entropy, backward and torch's SGD at the recipe's rate."""
    recipe = Recipe(epochs=1, batch_size=20, lr=0.1, label_smoothing=0.1, crop=0, flip=False, clip_norm=clip)
    ours, theirs = tiny_net(dropout=0.0), tiny_net(dropout=0.0)
    loop = _loop(ours, recipe=recipe)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=1.0, momentum=0.9, nesterov=True, weight_decay=5e-4)
    for step in range(3):
        images, labels = loop.batch(step)
        loop.train_step(step)
        optimizer.param_groups[0]["lr"] = recipe.lr_at(step, loop.total_steps)
        optimizer.zero_grad()
        nn.functional.cross_entropy(theirs(images), labels, label_smoothing=0.1).backward()
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), clip or float("inf"))
        assert norm > 0.1  # the clipping has something to do
        optimizer.step()
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)


def test_training_images_grow_and_evaluated_ones_do_not() -> None:
    loop = _loop(net := tiny_net(), recipe=replace(RECIPE, epochs=2, start_scale=0.5, full_scale_at=0.5))
    sides = {step: loop.batch(step)[0].shape[-1] for step in range(loop.total_steps)}
    assert sides[0] == 3
    assert set(sides.values()) == {3, 4, 6}
    assert all(sides[step] == 6 for step in range(loop.total_steps // 2, loop.total_steps))
    seen: list[int] = []
    net.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[-1]))
    loop.train_step(0)
    loop.evaluate()
    assert (seen[0], set(seen[1:])) == (3, {6})


def test_alternate_flip_shows_each_image_in_turns() -> None:
    loop = _loop(tiny_net(), recipe=replace(RECIPE, epochs=3, crop=0, cutout=0, alternate_flip=True))
    as_they_are = normalise(loop.images, loop.mean, loop.std)
    for epoch in range(3):
        for index in range(loop.steps_per_epoch):
            images, _ = loop.batch(epoch * loop.steps_per_epoch + index)
            rows = loop.order(epoch)[index * len(images) : (index + 1) * len(images)]
            mirrored = rearrange(loop.first_flips[rows] ^ (epoch == 1), "b -> b 1 1 1")
            assert torch.equal(images, torch.where(mirrored, as_they_are[rows].flip(3), as_they_are[rows]))
    assert 0.25 < loop.first_flips.float().mean() < 0.75
    assert not torch.equal(draw_first_flips(50, seed=0), draw_first_flips(50, seed=1))


def test_evaluation_sees_each_image_once_and_flip_averages() -> None:
    data, net = tiny_dataset(), tiny_net().eval()
    images = (data.test_images.float() / 255 - data.mean.view(3, 1, 1)) / data.std.view(3, 1, 1)
    with torch.no_grad():
        logits, mirrored = net(images), net(images.flip(3))
    for tta, expected in (("none", logits), ("flip", (logits + mirrored) / 2)):
        got = _loop(net, recipe=Recipe(epochs=1, batch_size=16, crop=1, tta=tta)).evaluate()
        assert got is not None
        assert got[0] == pytest.approx(nn.functional.cross_entropy(expected, data.test_labels).item(), rel=1e-5)
        assert got[1] == pytest.approx(100 * (expected.argmax(1) == data.test_labels).float().mean().item())


def test_evaluation_leaves_the_net_as_it_was() -> None:
    net = tiny_net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    _loop(net).evaluate()
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_result_and_weights_are_complete(tmp_path: Path) -> None:
    net = tiny_net()
    result = tiny_fit(tmp_path, net)
    assert Result.read(tmp_path / "result.json") == result
    assert [epoch["epoch"] for epoch in result.epochs] == [1, 2]
    assert result.accuracy_percent == result.epochs[-1]["eval_accuracy_percent"]  # the last, not the best
    assert result.params == sum(weight.numel() for weight in net.parameters())
    assert result.settings["dataset"]["sha256"] == tiny_dataset().key
    assert set(result.environment) >= {"command", "commit", "versions", "device", "processes", "compile", "graph"}
    assert result.environment["images"] == {"train": 81, "eval": 40}
    fresh = tiny_net()
    load_weights(tmp_path / "weights.safetensors", fresh)
    assert all(torch.equal(a, b) for a, b in zip(fresh.state_dict().values(), net.state_dict().values(), strict=True))


def test_seed_decides(tmp_path: Path) -> None:
    runs = [tiny_fit(tmp_path / str(index), seed=seed) for index, seed in enumerate((0, 0, 1))]
    assert runs[0].epochs[-1]["train_loss"] == runs[1].epochs[-1]["train_loss"] != runs[2].epochs[-1]["train_loss"]


def test_seed_decides_order_and_augmentation_each() -> None:
    one, other = _loop(tiny_net(), seed=0), _loop(tiny_net(), seed=1)
    assert not torch.equal(one.order(0), other.order(0))
    other._order_of = 0, one.order(0)
    assert torch.equal(one.batch(0)[1], other.batch(0)[1])
    assert not torch.equal(one.batch(0)[0], other.batch(0)[0])


def _drawn(seed: int, step: int, rank: int) -> tuple[float, ...]:
    """What a net draws in a step."""
    drawn: list[float] = []
    loop = _loop(net := tiny_net(), seed=seed)
    net[3].register_forward_hook(lambda *_: drawn.extend(torch.rand(4).tolist()))
    loop.ranks.rank = rank
    loop.batch = lambda step: (loop.images[:16].float(), loop.labels[:16])  # type: ignore[method-assign]
    loop.train_step(step)
    return tuple(drawn)


def test_dropout_differs_by_seed_step_and_rank() -> None:
    places = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    drawn = [_drawn(*place) for place in places]
    assert len(set(drawn)) == 4
    assert drawn == [_drawn(*place) for place in places]


class _Always(nn.Module):
    """Dropout in evaluation, too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(x, 0.5)


def test_evaluation_of_a_net_that_draws_is_that_of_its_epoch() -> None:
    loop = _loop(nn.Sequential(tiny_net(), _Always()))
    assert loop.evaluate(1) == loop.evaluate(1) != loop.evaluate(2)


def test_record_of_an_epoch_is_what_was_done(tmp_path: Path) -> None:
    recipe = replace(RECIPE, lr=1e-9, weight_decay=0.0, cutout=0, crop=0, flip=False, batch_size=27)
    result = tiny_fit(tmp_path, net := tiny_net(norm=False, dropout=0.0), recipe)  # which stays as it was
    assert [epoch["lr"] for epoch in result.epochs] == [recipe.lr_at(2, 6), recipe.lr_at(5, 6)]
    right = (net(_loop(net).normalised(tiny_dataset().train_images)).argmax(1) == tiny_dataset().train_labels).double()
    for epoch in result.epochs:
        assert epoch["train_accuracy_percent"] == pytest.approx(100 * right.mean().item())
        assert epoch["images_per_second"] * epoch["seconds"] == pytest.approx(81)


def test_batch_larger_than_the_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch_size must be at most the 81 training images, got 500"):
        tiny_fit(tmp_path, recipe=Recipe(crop=1))
    assert _loop(tiny_net(), recipe=replace(RECIPE, batch_size=81)).steps_per_epoch == 1  # all of them will do


def test_bfloat16_trains_close_to_float32(tmp_path: Path) -> None:
    low = tiny_fit(tmp_path / "low", precision="bfloat16")
    full = tiny_fit(tmp_path / "full", precision="float32")
    assert low.settings["precision"] == "bfloat16"
    assert low.epochs[-1]["eval_loss"] == pytest.approx(full.epochs[-1]["eval_loss"], rel=0.05)
    assert low.epochs[-1]["eval_loss"] != full.epochs[-1]["eval_loss"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_missing_gpu_is_an_error_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="device cuda was asked for, but there are 0 CUDA devices"):
        tiny_fit(tmp_path / "run", device="cuda")
    assert not (tmp_path / "run").exists()
    assert pick_device("auto").type == "cpu"


def test_gpu_is_that_of_the_process_or_the_one_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for asked, device in (("auto", "cuda:1"), ("cuda", "cuda:1"), ("cuda:0", "cuda:0"), ("cpu", "cpu")):
        assert pick_device(asked, 1) == torch.device(device)
    with pytest.raises(RuntimeError, match="device cuda:2 was asked for, but there are 2 CUDA devices"):
        pick_device("cuda:2")


def test_auto_precision_follows_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for has, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("resblocks.training.device.platform.machine", lambda: "x86_64")
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=has: has, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
        assert has_fast_bfloat16(cpu) is has
        assert pick_precision("auto", cpu) is dtype
    with pytest.raises(ValueError, match="precision must be auto, float32 or bfloat16, got 'half'"):
        pick_precision("half", cpu)


@pytest.fixture
def free_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's own test tools forbid the process to set the flags of back ends."""
    monkeypatch.setitem(torch.backends.flags_frozen.__globals__, "__allow_nonbracketed_mutation_flag", True)


@pytest.mark.usefixtures("free_flags")
def test_gpu_of_a_run_is_the_current_one_until_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeds, streams, events and graphs of torch are those of the current GPU, which is the first one by itself."""
    picked, entered, ranks = torch.device("cuda", 1), [], Ranks()
    ranks.local_rank = 1

    @contextlib.contextmanager
    def made_current(device: torch.device) -> Iterator[None]:
        entered.append(device)
        yield
        entered.remove(device)

    def asked(**options: bool) -> bool:
        assert entered == [picked]
        return True

    class Reached(Exception):
        pass

    def loop(*args: Any, **options: Any) -> None:
        assert entered == [picked]
        assert args[4] == picked
        assert torch.backends.cudnn.deterministic
        raise Reached

    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: contextlib.nullcontext())
    module = sys.modules["resblocks.training.fit"]
    monkeypatch.setattr(torch.cuda, "device", made_current)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", asked)
    monkeypatch.setattr(module, "pick_device", lambda device, local_rank=0: torch.device(device, local_rank))
    monkeypatch.setattr(module, "Loop", loop)
    with pytest.raises(Reached):
        tiny_fit(tmp_path, device="cuda", precision="auto", ranks=ranks, deterministic=True)


@pytest.mark.usefixtures("free_flags")
@pytest.mark.parametrize("deterministic", [False, True])
def test_choice_of_convolutions_leaves_tf32_to_the_user(deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "allow_tf32", False)
    before = cudnn.benchmark, cudnn.deterministic
    with cudnn_search(deterministic):
        assert (cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32) == (not deterministic, deterministic, False)
    assert (cudnn.benchmark, cudnn.deterministic) == before


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_out_of_memory_says_the_batch_size(error: RuntimeError, tmp_path: Path) -> None:
    class Hungry(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = tiny_net()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training:
                raise error
            return self.net(x)  # one image fits

    with pytest.raises(
        RuntimeError,
        match=r"out of memory at step 0 with batch size 16 \(16 on each of 1 processes\): give a smaller --batch-size",
    ):
        tiny_fit(tmp_path, Hungry(), gradients=False)


def test_net_that_changes_in_training_is_refused_before_the_folder_is_taken(tmp_path: Path) -> None:
    class Auxiliary(nn.Sequential):
        def forward(self, x: torch.Tensor) -> Any:
            return (super().forward(x), 0) if self.training else super().forward(x)  # type: ignore[no-untyped-call]

    with pytest.raises(ValueError, match=r"a logit for each class, \(16, 3\) .* in training \(.*\), got tuple"):
        tiny_fit(tmp_path, Auxiliary(tiny_net()))
    norm = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"in training \(start_scale=1.0, 1 images a process .*more than 1 value"):
        tiny_fit(tmp_path, norm, recipe=Recipe(epochs=1, batch_size=1, crop=1))
    assert not (tmp_path / "run.json").exists()


def test_nets_of_a_script_start_differently_and_are_found_again(tmp_path: Path) -> None:
    for _ in range(2):
        nets = [tiny_net() for _ in "abc"]  # which seed themselves
        torch.manual_seed(0)
        results = []
        for name, net in zip("abc", nets, strict=True):
            nn.init.normal_(net[0].weight)
            results.append(tiny_fit(tmp_path / name, net))
        starts = [result.settings["net"]["starting_weights"][0] for result in results]
        assert len(set(starts)) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda net: nn.init.constant_(net[0].weight, math.nan), "net must start from finite weights, got .* 0.weight"),
        (lambda net: net.to("meta"), "net must have memory for weights, got 0.weight on the meta device"),
        (lambda net: net.append(nn.LazyLinear(3)), "net must know its shapes before training, got a lazy"),
        (lambda net: net.append(Extra()), "net must have a state dict of tensors alone, got dict under"),
    ],
)
def test_net_that_cannot_be_trained_or_saved_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    net = tiny_net()
    change(net)
    with pytest.raises(ValueError, match=message):
        tiny_fit(tmp_path, net)


class Extra(nn.Identity):
    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 1}

    def set_extra_state(self, state: Any) -> None:
        pass


def test_weights_that_follow_their_input_start_as_they_were_given(tmp_path: Path) -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean = nn.Parameter(torch.zeros(3, 1, 1), requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training:
                self.mean.data.copy_(x.mean((0, 2, 3), keepdim=True)[0])
            return x - self.mean

    loop = _loop(nn.Sequential(Centred(), tiny_net()))
    check_net(loop, tiny_dataset())
    assert not loop.net[0].mean.any()  # type: ignore[index]


def test_infinite_mask_is_no_divergence(tmp_path: Path) -> None:
    net = tiny_net()
    net.register_buffer("mask", torch.full((3, 3), -math.inf).triu(1))
    assert len(tiny_fit(tmp_path, net).epochs) == 2


@pytest.mark.parametrize("device", ["gpu", "meta", "mps"])
def test_device_that_cannot_be_is_named(tmp_path: Path, device: str) -> None:
    with pytest.raises(ValueError, match=f"device must be .*, got '{device}'"):
        tiny_fit(tmp_path, device=device)


def test_signal_that_the_shell_wants_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGINT)
            assert signals.number == 0
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.number == signal.SIGTERM
    finally:
        signal.signal(signal.SIGINT, before)


def test_second_signal_does_what_it_did_before() -> None:
    """Else a run that hangs could only be killed."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGINT)
            assert signals.number == signal.SIGINT
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_errors_come_through_as_they_are(tmp_path: Path) -> None:
    net = tiny_net()
    net[1].register_forward_pre_hook(lambda module, args: [][module.training - 1])  # only in training
    with pytest.raises(IndexError):
        tiny_fit(tmp_path, net)
    with FolderLock(tmp_path):
        pass


class Sometimes(nn.Module):
    """Stochastic depth for a whole batch: in some steps a weight gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.shift = tiny_net(), nn.Parameter(torch.zeros(3, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.net(x + self.shift if torch.rand(()) < 0.5 or not self.training else x)
        return logits


def test_weight_may_get_its_first_gradient_later_than_others(tmp_path: Path) -> None:
    net = Sometimes()
    assert tiny_fit(tmp_path, net).loss > 0
    assert net.shift.any()


class Silent(nn.Module):
    """Evaluation without gradients, by its own choice."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny_net()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode(not self.training):
            logits: torch.Tensor = self.net(x)
        return logits


def test_net_that_evaluates_without_gradients_is_trained(tmp_path: Path) -> None:
    assert tiny_fit(tmp_path / "own", Silent()).loss == tiny_fit(tmp_path / "usual").loss


class Spare(nn.Module):
    """All that is used is frozen, and what is not is to be trained."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.spare = tiny_net().requires_grad_(False), nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.net(x)
        return logits


class SteepRecipe(Recipe):
    def lr_at(self, step: int, total_steps: int) -> float:
        return 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": np.int64(3)}, r"seed must be an int, got np.int64\(3\)"),
        ({"seed": None}, "seed must be an int, got None"),
        ({"name": None}, "name must be a str, got None"),
        ({"recipe": SteepRecipe()}, "recipe must be a Recipe, such as .*, got SteepRecipe"),
        ({"gradients": "no"}, "gradients must be True or False, got 'no'"),
        ({"channels_last": np.bool_(True)}, "channels_last must be True or False"),
        ({"checkpoint_seconds": None}, "checkpoint_seconds must be an integer or a float, got None"),
    ],
)
def test_option_of_another_type_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_fit(tmp_path, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (nn.Conv2d(1, 3, 1), r"net must take images of shape \(3, 6, 6\) \(C, H, W\), it says: .*expected input"),
        (nn.Sequential(nn.Flatten(), nn.Linear(5, 3)), "net must take images of shape .*mat1 and mat2"),
        (nn.Sequential(nn.Flatten(), nn.Linear(108, 2)), r"a logit for each class, \(1, 3\) .*, got \(1, 2\)"),
        (nn.Conv2d(3, 3, 1), r"a logit for each class, \(1, 3\) .*, got \(1, 3, 6, 6\)"),
        (nn.Flatten(), "net must have a parameter to train"),
        (tiny_net().requires_grad_(False), "net must have a parameter to train"),
        (Spare(), "net must have a parameter to train that its logits depend on, got none"),
        (nn.Sequential(nn.LazyBatchNorm2d(affine=False), tiny_net()), "know its shapes .*, got a lazy 0.running_mean"),
    ],
)
def test_net_that_does_not_fit_the_data_is_refused(net: nn.Module, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_fit(tmp_path, net)
    assert not (tmp_path / "run.json").exists()


def test_look_at_one_image_leaves_net_and_random_numbers_alone() -> None:
    net = tiny_net()
    net[1].eval()
    modes, before = [m.training for m in net.modules()], {n: t.clone() for n, t in net.state_dict().items()}
    net[3].forward = torch.rand_like  # type: ignore[method-assign]
    state, loop = torch.get_rng_state(), _loop(net)
    check_net(loop, tiny_dataset())
    assert [module.training for module in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_meter_remembers_the_first_bad_step() -> None:
    meter = Meter(torch.device("cpu"))
    for step, loss in enumerate([1.0, float("nan"), 2.0, float("inf")]):
        meter.step.fill_(step)
        meter.note(torch.tensor(1.0), torch.tensor(loss))
    assert meter.peek().first_bad == 1
    meter.reset()
    assert meter.read().first_bad == 1


class _Overflow(nn.Module):
    """Infinite logits in evaluation only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.training else x * math.inf


def test_non_finite_evaluation_is_a_divergence(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"evaluation loss of tiny was infinite or NaN after epoch 1 .*step000000004"):
        tiny_fit(tmp_path, nn.Sequential(tiny_net(), _Overflow()))
    events = [json.loads(line)["event"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert events == ["start", "diverged"]


def test_gradient_record_that_is_not_finite_is_null(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = _loop(net := tiny_net())
    row = GradientFlow("0.weight", params=1, mean_abs=1.0, norm=math.inf, std=0.0)
    monkeypatch.setattr("resblocks.diagnostics.gradient_sizes", lambda net: [row])
    assert loop.gradient_layers() == [{"name": "0.weight", "mean_abs": 1.0, "norm": None}]
    assert net.training


class _Keeping(nn.Module):
    """Keeps its last output in training, a tensor of a graph, which Python cannot copy."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny_net()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.net(x)
        if self.training:
            self.last = y
        return y


def test_net_that_keeps_its_output_has_gradients_to_record(tmp_path: Path) -> None:
    assert len(tiny_fit(tmp_path, _Keeping()).gradients) == 3


def test_look_at_the_gradients_leaves_the_net_alone() -> None:
    loop = _loop(net := tiny_net().eval())
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    loop.gradient_layers()
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert all(weight.grad is None for weight in net.parameters())
    assert not any(module.training for module in net.modules())


@pytest.mark.parametrize("gradients", [False, True])
def test_gradients_that_the_caller_left_do_not_count(gradients: bool, tmp_path: Path) -> None:
    fresh, used = tiny_net(), tiny_net()
    for weight in used.parameters():
        weight.grad = torch.ones_like(weight)
    for net, name in ((fresh, "fresh"), (used, "used")):
        tiny_fit(tmp_path / name, net, gradients=gradients)
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), used.parameters(), strict=True))


def test_json_without_a_word_for_nan_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "file.json", {"loss": math.nan})
    assert not list(tmp_path.iterdir())


def test_fit_works_in_a_thread(tmp_path: Path) -> None:
    """Signal handlers belong to the main thread; elsewhere a run does without."""
    results: list[Result] = []
    thread = threading.Thread(target=lambda: results.append(tiny_fit(tmp_path)))
    thread.start()
    thread.join()
    assert len(results) == 1


# What people see


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_terminal_gets_a_bar_and_files_get_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_fit(tmp_path / "lines", progress=True)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[1].startswith("tiny  epoch 2/2  train loss ")
    assert " img/s  0:00 left" in lines[1]
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr("resblocks.training.log.RunLog.due", lambda self: self._bar is not None)
    tiny_fit(tmp_path / "bar", progress=True)
    shown = terminal.getvalue()
    for part in ("tiny", "100%", "img/s", "loss", "acc", "epoch 2/2"):
        assert part in shown, part


def test_time_that_is_left_is_that_of_the_epochs_to_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = SimpleNamespace(monotonic=itertools.count(step=6).__next__)
    monkeypatch.setattr(sys.modules["resblocks.training.fit"], "time", clock)
    result = tiny_fit(tmp_path, recipe=replace(RECIPE, epochs=3), progress=True)
    taken = result.epochs[0]["seconds"] + result.epochs[0]["eval_seconds"]  # as each of the others
    assert taken % 60 > 0
    for line, left in zip(capsys.readouterr().out.splitlines(), (2 * taken, taken, 0), strict=True):
        assert line.endswith(f" {int(left) // 60}:{int(left) % 60:02} left")


def test_quiet_is_quiet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_fit(tmp_path, progress=False)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("module", "extra"),
    [("matplotlib", "train"), ("torch.utils.tensorboard", "tensorboard"), ("safetensors.torch", "train")],
)
def test_missing_extra_says_how_to_install_it(
    module: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    work = {
        "matplotlib": lambda: draw_figures([tiny_fit(tmp_path)], tmp_path),
        "torch.utils.tensorboard": lambda: tiny_fit(tmp_path, tensorboard=True),
        "safetensors.torch": lambda: tiny_fit(tmp_path),
    }[module]
    with pytest.raises(ImportError, match=rf'pip install "resblocks\[{extra}\]"'):
        work()
    assert module != "safetensors.torch" or not any(tmp_path.iterdir())  # said before the training, not behind it


def test_run_without_an_output_to_write_to_ends_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)  # a service that closed it, pythonw
    assert len(tiny_fit(tmp_path, progress=True).epochs) == 2


# Settings and programs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compile": True, "compile_mode": "fast"}, "compile_mode must be one of default, .*, got 'fast'"),
        ({"compile_mode": "reduce-overhead"}, "compile_mode must be default without compile=True"),
    ],
)
def test_compile_mode_that_cannot_be_used_raises(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_fit(tmp_path, **options)


def test_baseline_has_no_skips_to_take_out(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^baseline_cnn has no skips to take out$"):
        entry.main(["--models", "baseline_cnn_noskip", "--dataset", "digits", "--out", str(tmp_path)])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            "/home/jane/fit.py --data-dir /home/jane/data --out=/home/jane/a=b more=/a/b --lr 0.1 runs/x",
            "fit.py --data-dir data --out=a=b more=b --lr 0.1 runs/x",
        ),
        ("/home/jane/resblocks/training/__main__.py --lr 0.1", "python -m resblocks.training --lr 0.1"),
    ],
)
def test_command_names_no_folders_of_a_machine(given: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", given.split())
    assert environment.environment(torch.device("cpu"))["command"] == said


def test_net_is_in_evaluation_mode_after_a_run_and_after_the_same_call(tmp_path: Path) -> None:
    for _ in range(2):
        net = tiny_net().train()
        tiny_fit(tmp_path, net)
        assert not any(module.training for module in net.modules())


@pytest.mark.parametrize(
    ("option", "value"), [("checkpoint_steps", -1), ("checkpoint_seconds", -1), ("checkpoint_seconds", math.nan)]
)
def test_intervals_below_zero_and_nan_are_refused(option: str, value: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{option} must be (an integer of )?at least 0, got {value}"):
        tiny_fit(tmp_path, **{option: value})


def test_commit_is_that_of_the_source_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = partial(subprocess.run, cwd=tmp_path, check=True, capture_output=True)
    run(["git", "init"])
    run(["git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--allow-empty", "-m", "something else"])
    source, other = tmp_path / "package" / "training" / "environment.py", tmp_path / "package" / "layers.py"
    source.parent.mkdir(parents=True)
    for file in (source, other):
        file.write_text("")
    monkeypatch.setattr(environment, "__file__", str(source))
    assert environment.commit() is None
    run(["git", "add", "package"])
    run(["git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-m", "the source"])
    (tmp_path / "notes.txt").write_text("of something else")
    assert re.fullmatch("[0-9a-f]{40}", str(environment.commit()))
    other.write_text("changed")
    assert re.fullmatch(r"[0-9a-f]{40}\+changes", str(environment.commit()))


def test_torn_line_of_the_log_does_not_take_the_next_one_with_it(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"event": "start"}\n{"eve')
    tiny_fit(tmp_path)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert lines[1] == '{"eve'
    assert json.loads(lines[2])["event"] == "start"


def _example(monkeypatch: pytest.MonkeyPatch, out: Path, *more: str) -> None:
    arguments = [
        "--dataset",
        "digits",
        "--models",
        "resnet20",
        "resnet20_noskip",
        "--epochs",
        "1",
        "--device",
        "cpu",
        "--precision",
        "float32",
    ]
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *arguments, "--out", str(out), *more])
    runpy.run_path(str(EXAMPLE), run_name="__main__")


def test_example_runs_resumes_and_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _example(monkeypatch, tmp_path)
    first = capsys.readouterr().out
    assert "| ResNet-20 without skips |" in first
    assert "epoch 1/1" in first
    written = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [run["name"] for run in written] == ["resnet20", "resnet20_noskip"]
    assert len(list(tmp_path.glob("figure*.png"))) == 5
    _example(monkeypatch, tmp_path)
    again = capsys.readouterr().out
    assert "epoch 1/1" not in again  # finished nets are not trained again
    assert again.splitlines()[-6:-1] == first.splitlines()[-6:-1]
    with pytest.raises(
        SystemExit, match=r"error: out: .* holds a run of other settings .recipe.lr is 0.05 there, 0.1 now"
    ):
        _example(monkeypatch, tmp_path, "--lr", "0.1")


def test_example_refuses_missing_data_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sys, "argv", [str(EXAMPLE), "--data-dir", str(tmp_path / "none.tar.xz"), "--out", str(tmp_path / "out")]
    )
    with pytest.raises(SystemExit, match=r"error: CIFAR-10: .*none.tar.xz is not there.*--dataset digits"):
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert not (tmp_path / "out").exists()


def test_entry_reaches_every_option_of_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        entry.main(["--help"])
    shown = capsys.readouterr().out
    for name in Recipe.__dataclass_fields__:
        assert name == "name" or f"--{name.replace('_', '-')}" in shown
    for default in ("(default: resnet18)", "(default: cifar10)", "(default: 300.0)", "he2015"):
        assert default in shown


def test_entry_passes_the_timeout_on() -> None:
    wrong = ["--models", "baseline_cnn_noskip"]  # which is seen later
    with pytest.raises(ValueError, match="timeout_seconds must be positive and finite, got 0"):
        entry.main(["--dataset", "digits", "--timeout-seconds", "0", *wrong])


def test_entry_passes_the_options_on(tmp_path: Path) -> None:
    text = "--models resnet20 --dataset digits --device cpu --precision float32 --validation 200 --seed 5 --epochs 1"
    text += " --batch-size 200 --lr 0.03 --no-nesterov --schedule steps --milestones 0.4 0.8 --crop 0 --cutout 3"
    text += " --tta flip --label-smoothing 0.1 --no-gradients --no-progress --svg"
    entry.main([*text.split(), "--out", str(tmp_path)])
    (run,) = json.loads((tmp_path / "results.json").read_text())["results"]
    recipe = run["settings"]["recipe"]
    expected = {
        "batch_size": 200,
        "lr": 0.03,
        "nesterov": False,
        "schedule": "steps",
        "milestones": [0.4, 0.8],
        "cutout": 3,
        "tta": "flip",
        "label_smoothing": 0.1,
    }
    assert {key: recipe[key] for key in expected} == expected
    assert (run["settings"]["dataset"]["split"], run["settings"]["seed"], run["gradients"]) == ("validation", 5, [])
    assert (tmp_path / "figure1_training.svg").exists()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_net_trains_to_the_same_numbers(tmp_path: Path, mode: str) -> None:
    compiled, eager = (
        tiny_fit(tmp_path / str(on), compile=on, compile_mode=mode if on else "default") for on in (True, False)
    )
    assert compiled.epochs[-1]["eval_loss"] == pytest.approx(eager.epochs[-1]["eval_loss"], rel=0.1)


@pytest.mark.slow
def test_example_under_torchrun_is_the_same_experiment(tmp_path: Path) -> None:
    options = [
        "--dataset",
        "digits",
        "--models",
        "resnet20",
        "--epochs",
        "1",
        "--device",
        "cpu",
    ]
    runs = []
    for launcher, out in ([], tmp_path / "one"), (["-m", "torch.distributed.run", "--nproc-per-node", "2"], tmp_path):
        command = [sys.executable, *launcher, str(EXAMPLE), *options, "--out", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.count("| ResNet-20") == 1  # the first process speaks
        runs += json.loads((out / "results.json").read_text())["results"]
    one, two = runs
    assert [run["environment"]["processes"] for run in runs] == [1, 2]
    assert one["settings"] == two["settings"]
    assert [epoch["step"] for epoch in one["epochs"]] == [epoch["step"] for epoch in two["epochs"]]
    assert one["epochs"][0]["train_loss"] == pytest.approx(two["epochs"][0]["train_loss"], rel=0.1)  # norms see halves


class HostReads(TorchDispatchMode):
    """Notes the operators whose result the host must wait for."""

    READ = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in self.READ:
            self.seen.append(func.overloadpacket.__name__)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_step_asks_the_device_nothing(clip: float) -> None:
    """A GPU runs ahead of the host only where no number of a step is read."""
    loop = _loop(build_net("resnet20", tiny_dataset()), recipe=replace(RECIPE, clip_norm=clip))
    loop.order(0)  # drawn on the host once an epoch
    with HostReads() as reads:
        loop.train_step(0)
        assert reads.seen == []
        loop.meter.values[0].item()
    assert reads.seen == ["_local_scalar_dense"]  # the counter counts
