"""`fit`: train a net so that nothing is lost. Any run can be killed at any moment and goes on with the same command.

Nothing random outlives a step: the order of the images is drawn from (seed, epoch), augmentation from (seed, step),
dropout from (seed, step, rank). A checkpoint holds weights, optimizer state, step and numbers, and no generator.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from resblocks.checks import check_flag, check_integer, check_number

from .check import check_net, check_trainable
from .checkpoint import list_checkpoints, load_checkpoint, load_weights, save_checkpoint, save_weights
from .data import Dataset
from .device import (
    cudnn_search,
    current_device,
    is_out_of_memory,
    pick_compile_mode,
    pick_device,
    pick_precision,
)
from .environment import environment
from .extras import require
from .files import FolderLock, remove_leftovers, write_json
from .folder import check_same, check_settings, claim, read_finished, run_settings
from .log import RunLog
from .loop import Loop
from .predict import describe
from .ranks import Ranks
from .recipe import Recipe
from .result import Result
from .signals import Interrupted, Signals
from .small_maps import check_small_maps, small_map_products


class Diverged(RuntimeError):
    """Loss, gradient, weights or evaluation became infinite or NaN; the last good checkpoint is kept."""


def fit(
    net: nn.Module,
    dataset: Dataset,
    recipe: Recipe,
    *,
    out: str | Path,
    name: str = "net",
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
    compile: bool = False,
    compile_mode: str = "default",
    graph: bool = False,
    channels_last: bool = True,
    small_maps: bool = False,
    deterministic: bool = False,
    gradients: bool = True,
    checkpoint_steps: int = 0,
    checkpoint_seconds: float = 300.0,
    progress: bool = True,
    tensorboard: bool = False,
    ranks: Ranks | None = None,
) -> Result:
    """Train `net` and evaluate it after each epoch; the same call again goes on where the last one ended.

    A finished run is not run again: its result and weights are read from `out`. On the CPU an interrupted and resumed
    run ends with the same bits as an unbroken one, in the middle of an epoch too.

    Args:
        net: with the weights to start from; at the end it holds the trained ones, on `device`, in evaluation mode.
        dataset: images and labels, of `load_dataset` or your own.
        recipe: how to train, of `get_recipe` or your own.
        out: folder of this run: checkpoints, log.jsonl, weights.safetensors, result.json. One run at a time.
        name: of the net in tables, figures and messages.
        seed: of order, augmentation and dropout; that of the initial weights is the caller's affair. Only a net with
            the same ones is given a finished run's result; a stopped run goes on from its checkpoint.
        device: auto, cpu, cuda, cuda:1, ...
        precision: float32, bfloat16 (autocast), or auto, bfloat16 where the hardware has it.
        compile: run the net through torch.compile, whose dropout masks are others, though functions of the seed, too.
        compile_mode: of torch.compile: default, reduce-overhead (CUDA graphs of forward and backward), max-autotune.
        graph: on one GPU replay each step as one CUDA graph, with or without `compile`; equal up to rounding.
        channels_last: memory format of weights and images.
        small_maps: on the CPU run 3x3 convolutions with small output maps as matrix products where that was measured to
            be faster; equal up to rounding.
        deterministic: on CUDA choose deterministic convolutions, slower; the CPU's always are.
        gradients: record the gradient by layer at the start and after each epoch; it does not change the training. It
            is that of the mean loss in training mode, in float32, of 128 training images (fewer where a batch is
            smaller), the same ones every time and not augmented: compare runs of one batch size.
        checkpoint_steps: steps between further checkpoints, beside those by time and epoch; 0: none.
        checkpoint_seconds: save one also after so much time.
        progress: a bar on a terminal, plain lines elsewhere; False says nothing.
        tensorboard: also write TensorBoard logs (extra `tensorboard`).
        ranks: the processes that train together; None is this one alone.

    Raises:
        ValueError: settings that cannot work or differ between processes, a net that does not fit the data, or `out`
            holds a run of other settings.
        Diverged: loss, gradient, weights or evaluation became infinite or NaN; the last good checkpoint is kept.
        RuntimeError: missing device, folder in use, full disk, out of memory, silent rank.
        Interrupted: SIGTERM or Ctrl-C, after the step is done and saved (a SystemExit with status 143 or 130).
    """
    for package in ("numpy", "safetensors.torch"):  # now, and not when the weights are to be written
        require(package)
    if not isinstance(dataset, Dataset):
        raise ValueError(f"dataset must be a resblocks.training.Dataset, got {type(dataset).__name__}")
    if type(recipe) is not Recipe:  # of a class of one's own, run.json could not say what it changes
        raise ValueError(f"recipe must be a Recipe, such as get_recipe('r26'), got {recipe!r}")
    if not isinstance(name, str):
        raise ValueError(f"name must be a str, got {name!r}")
    if type(seed) is not int:
        raise ValueError(f"seed must be an int, got {seed!r}")
    check_flag(compile=compile, graph=graph, channels_last=channels_last, small_maps=small_maps)
    check_flag(deterministic=deterministic, gradients=gradients, progress=progress, tensorboard=tensorboard)
    ranks, out = ranks or Ranks(), Path(out)
    mode = pick_compile_mode(compile, compile_mode)
    _check_checkpoints(checkpoint_steps, checkpoint_seconds)
    check_trainable(net)
    picked = pick_device(device, ranks.local_rank)
    dtype = pick_precision(precision, picked)
    rounding = {"precision": str(dtype).removeprefix("torch."), "channels_last": channels_last}
    settings = run_settings(net, name, dataset, recipe, seed=seed, **rounding)
    model = describe(net, dataset)
    if small_maps:  # it changes the rounding; without it, older folders stay those of the same run
        check_small_maps(picked, compile)
        settings["small_maps"] = True
    with contextlib.ExitStack() as stack:
        stack.enter_context(current_device(picked))
        # The caller's generators are afterwards what they were, whether the run is made or read.
        stack.enter_context(torch.random.fork_rng([picked] if picked.type == "cuda" else []))
        lock = FolderLock(out)
        stack.callback(lock.release)
        ranks.first(lock.acquire)
        check_same(ranks.gather({**settings, "gradients": gradients, "checkpoint_steps": checkpoint_steps}))
        settings = ranks.first(lambda: check_settings(out, settings))
        if done := ranks.first(lambda: read_finished(out)):
            _load_finished(net.to(picked), out, ranks)
            return done
        if small_maps:
            stack.enter_context(small_map_products(net))
        if picked.type == "cuda":
            stack.enter_context(cudnn_search(deterministic))
        how: dict[str, Any] = {"compile_mode": mode, "graph": graph, "channels_last": channels_last}
        loop = Loop(net, dataset, recipe, seed, picked, dtype, ranks, **how)
        with _explained(loop):
            check_net(loop, dataset)
            loop.distribute()
        ranks.first(lambda: claim(out, settings))
        params = sum(weight.numel() for weight in net.parameters())
        images = {"train": len(dataset.train_images), "eval": len(dataset.test_images)}
        options = {"compile": mode, "graph": graph, "deterministic": deterministic}
        made_with = environment(picked, ranks.size, images=images, **options)
        result = Result(name, params, settings, made_with, model=model)
        log = RunLog(out, name, active=ranks.is_first, progress=progress, tensorboard=tensorboard)
        stack.callback(log.close)
        signals = stack.enter_context(Signals())
        _Run(loop, result, out, log, signals, gradients, checkpoint_steps, checkpoint_seconds).train()
        net.eval()
        return result


def _check_checkpoints(steps: int, seconds: float) -> None:
    check_integer(0, checkpoint_steps=steps)
    check_number(checkpoint_seconds=seconds)
    if not seconds >= 0:  # nor NaN
        raise ValueError(f"checkpoint_seconds must be at least 0, got {seconds}")


def _load_finished(net: nn.Module, out: Path, ranks: Ranks) -> None:
    ranks.first(lambda: load_weights(out / "weights.safetensors", net))  # other nodes may have other disks
    ranks.broadcast_(list(net.state_dict().values()))
    net.eval()


@dataclass
class _Run:
    """The course of a run: steps, epochs, checkpoints, and the ways in which it can end early."""

    loop: Loop
    result: Result
    out: Path
    log: RunLog
    signals: Signals
    gradients: bool
    checkpoint_steps: int
    checkpoint_seconds: float
    step: int = 0
    seconds: float = 0.0  # of this epoch's training so far
    saved_at: float = field(default_factory=time.monotonic)

    @property
    def ranks(self) -> Ranks:
        return self.loop.ranks

    def train(self) -> None:
        """What is to be done next follows from (step, finished epochs) alone, so a resumed run cannot go astray."""
        loop, result = self.loop, self.result
        with _explained(self.loop, lambda: self.step):
            self.resume()
            self.log.start(loop.total_steps, self.step)
            if self.gradients and not result.gradients:
                self.record_gradients()
            while len(result.epochs) < loop.recipe.epochs:
                if self.step < (len(result.epochs) + 1) * loop.steps_per_epoch:
                    self.train_step()
                else:
                    self.finish_epoch()
            self.finish()
            (late,) = self.ranks.max(self.signals.number)
        if late:  # too late to stop this run, and not to be lost on a caller who has more to run
            raise Interrupted(128 + late)

    def train_step(self) -> None:
        started = time.monotonic()
        self.loop.train_step(self.step)
        self.step += 1
        bad = self.loop.meter.peek().first_bad
        due = time.monotonic() - self.saved_at > self.checkpoint_seconds and self.ranks.is_first
        stop, diverged, due_now = self.ranks.max(self.signals.number, math.isfinite(bad), due)
        self.seconds += time.monotonic() - started
        if diverged:
            self.diverge()
        due_now = due_now or (self.checkpoint_steps > 0 and self.step % self.checkpoint_steps == 0)
        if stop or (due_now and self.step % self.loop.steps_per_epoch):  # the end of an epoch saves anyway
            self.save()
        if stop:
            self.interrupt(stop)
        if self.log.due():
            self.show()

    def finish_epoch(self) -> None:
        loop, started = self.loop, time.monotonic()
        loss, correct, images = loop.sums().tolist()  # waits for the device
        self.seconds += time.monotonic() - started
        if math.isfinite(loop.meter.read().first_bad):
            self.diverge()
        record = {
            "epoch": len(self.result.epochs) + 1,
            "step": self.step,
            "lr": loop.recipe.lr_at(self.step - 1, loop.total_steps),
            "train_loss": loss / images,
            "train_accuracy_percent": 100 * correct / images,
            **self.evaluate(),
            "images_per_second": self.rate(images),
            "seconds": self.seconds,
        }
        self.result.epochs.append(record)
        if self.gradients:
            self.record_gradients()
        loop.meter.reset()
        self.seconds = 0.0
        self.save()
        self.log.epoch(record, loop.recipe.epochs, self.result.settings["dataset"]["split"], self.seconds_left())

    def evaluate(self) -> dict[str, float]:
        """Loss and accuracy, unless a signal stops the run or they say that it diverged."""
        started = time.monotonic()
        evaluated = self.loop.evaluate(len(self.result.epochs), stop=lambda: self.signals.number != 0)
        if evaluated is None:
            self.save()
            self.interrupt(self.signals.number)
        loss, accuracy = evaluated
        if not math.isfinite(loss):
            self.log.event("diverged", step=self.step)
            name, epoch = self.result.name, len(self.result.epochs) + 1
            raise Diverged(f"the evaluation loss of {name} was infinite or NaN after epoch {epoch} {self.advice()}")
        seconds = time.monotonic() - started
        return {"eval_loss": loss, "eval_accuracy_percent": accuracy, "eval_seconds": seconds}

    def rate(self, images: float) -> float:
        """Images a second of this epoch's training."""
        return images / max(self.seconds, 1e-9)

    def seconds_left(self) -> float:
        epochs = self.result.epochs
        taken: float = sum(epoch["seconds"] + epoch["eval_seconds"] for epoch in epochs)
        return taken / len(epochs) * (self.loop.recipe.epochs - len(epochs))

    def record_gradients(self) -> None:
        gradients = self.loop.gradient_layers()
        self.result.gradients.append({"epoch": len(self.result.epochs), "layers": gradients})

    def save(self) -> None:
        """Checkpoint, unless the weights are no good: what is on the disk then is better."""
        state = self.loop.state()
        if math.isfinite(self.loop.meter.read().first_bad):
            self.diverge()
        (broken,) = self.ranks.max(int(not self.loop.finite()))  # statistics of batch norm differ by rank
        if broken:
            raise Diverged(f"weights of {self.result.name} became infinite or NaN by step {self.step} {self.advice()}")
        state |= {
            "step": self.step,
            "seconds": self.seconds,
            "epochs": self.result.epochs,
            "gradients": self.result.gradients,
            "environments": [*self.result.earlier_environments, self.result.environment],
        }
        epochs_done = len(self.result.epochs)
        self.ranks.first(lambda: str(save_checkpoint(self.out, state, step=self.step, epochs_done=epochs_done)))
        self.saved_at = time.monotonic()

    def resume(self) -> None:
        """Go on from the newest sound checkpoint: read by the first rank, given to all."""
        found = self.ranks.first(lambda: load_checkpoint(self.out))
        if found is None:
            self.log.event("start", settings=self.result.settings, environment=self.result.environment)
            return
        path, state = found
        self.loop.load(state)
        self.step, self.seconds = state["step"], state["seconds"]
        self.result.epochs, self.result.gradients = state["epochs"], state["gradients"]
        if self.gradients != bool(self.result.gradients):
            self.gradients = not self.gradients
            warnings.warn(f"{self.out} holds a run with gradients={self.gradients}: it goes on so", stacklevel=2)
        now = self.result.environment
        self.result.earlier_environments = [one for one in state["environments"] if one != now]
        self.log.catch_up(self.result.epochs)
        self.log.event("resume", step=self.step, checkpoint=path.name, environment=self.result.environment)
        self.log.say(f"{self.result.name}  goes on at step {self.step} of {self.loop.total_steps}")

    def finish(self) -> None:
        """Weights first, result.json last: it says that the run is finished."""
        result, out = self.result, self.out

        def write() -> None:
            save_weights(out / "weights.safetensors", self.loop.net)
            write_json(out / "result.json", result.as_dict())
            remove_leftovers(out)

        self.ranks.first(write)
        self.log.event("end", accuracy_percent=result.accuracy_percent, loss=result.loss, seconds=result.seconds)

    def show(self) -> None:
        loss, correct, images, _ = self.loop.meter.peek()
        if images:
            done = self.step - len(self.result.epochs) * self.loop.steps_per_epoch
            epoch = f"{len(self.result.epochs) + 1}/{self.loop.recipe.epochs}"
            self.log.step(
                self.step, epoch, loss / images, 100 * correct / images, self.rate(done * self.loop.recipe.batch_size)
            )

    def interrupt(self, number: int) -> NoReturn:
        name = signal.Signals(number).name
        self.log.event("interrupt", step=self.step, signal=name)
        self.log.say(
            f"{self.result.name}  stopped by {name} at step {self.step}, saved; the same command goes on from there"
        )
        raise Interrupted(128 + number)

    def diverge(self) -> NoReturn:
        step = int(self.loop.meter.read().first_bad)
        lr, epoch = self.loop.recipe.lr_at(step, self.loop.total_steps), step // self.loop.steps_per_epoch + 1
        self.log.event("diverged", step=step, lr=lr)
        raise Diverged(
            f"loss or gradient norm of {self.result.name} was infinite or NaN at step {step} (epoch {epoch}), "
            f"learning rate {lr:.4g}; that update was not made {self.advice()}"
        )

    def advice(self) -> str:
        kept = list_checkpoints(self.out)
        good = f"the last good checkpoint is {kept[-1]}" if kept else "no checkpoint was written yet"
        return f"({good}): try a lower --lr in another --out"


@contextlib.contextmanager
def _explained(loop: Loop, step: Callable[[], int] = lambda: 0) -> Iterator[None]:
    """Say what torch's errors mean for the run."""
    batch, each, size = loop.recipe.batch_size, loop.local_batch, loop.ranks.size
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise RuntimeError(
                f"out of memory at step {step()} with batch size {batch} ({each} on each of {size} processes): "
                f"give a smaller --batch-size, or more processes, in another --out"
            ) from error
        if loop.ranks.is_no_answer(error):
            raise RuntimeError(
                f"another process died or was silent too long at step {step()}; "
                f"the last checkpoint stays: run the same command again"
            ) from error
        raise
