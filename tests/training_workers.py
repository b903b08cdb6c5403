"""What the reliability tests run in other processes: a tiny experiment, and the faults that hit it."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from resblocks.training import Dataset, Ranks, Recipe, fit
from resblocks.training.loop import Loop

# Workers are forked from a server that has imported torch but never used it: quick, and safe for autograd and OpenMP.
CONTEXT = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
_LAZY = [
    "torch._dynamo",
    "torch.distributed",
    "safetensors.torch",
    "torch.nn.parallel.distributed",
]  # torch imports these late
if os.name == "posix":
    CONTEXT.set_forkserver_preload(["resblocks.training", "resblocks.diagnostics", *_LAZY])

RECIPE = Recipe(name="tiny", epochs=2, batch_size=16, lr=0.05, crop=1, cutout=2)
STEPS = 10  # two epochs of five


def tiny_dataset(count: int = 85) -> Dataset:
    """85 images of 6x6: five batches of 16 and a rest that is dropped."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (count, 3, 6, 6), generator=generator, dtype=torch.uint8)
    labels = torch.randint(3, (count,), generator=generator)
    return Dataset("tiny", ("a", "b", "c"), images[:-4], labels[:-4], images[-40:], labels[-40:])


def tiny_net(norm: bool = True, dropout: float = 0.3) -> nn.Module:
    """Convolution, batch norm and dropout: weights, buffers and randomness, all that a resume can lose."""
    torch.manual_seed(7)
    layers = [
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8) if norm else nn.Identity(),
        nn.ReLU(),
        nn.Dropout(dropout),
    ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


class Talking(nn.Module):
    """What synchronised batch norm does: in training each forward exchanges something with all ranks."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            dist.all_reduce(x.detach().mean())
        return x


def talking_net() -> nn.Module:
    return nn.Sequential(Talking(), tiny_net())


def tiny_fit(
    out: Path,
    net: nn.Module | None = None,
    recipe: Recipe = RECIPE,
    evaluated: int = 40,
    classes: tuple[str, ...] = ("a", "b", "c"),
    **options: Any,
) -> Any:
    torch.set_num_threads(1)
    data = tiny_dataset()
    images, labels = data.test_images[:evaluated], data.test_labels[:evaluated]
    data = replace(data, classes=classes, test_images=images, test_labels=labels)
    usual = {"device": "cpu", "precision": "float32", "progress": False, "checkpoint_steps": 2, "name": "tiny"}
    return fit(net or tiny_net(), data, recipe, out=out, **{**usual, **options})


# Faults: each is called in the worker before training


def no_fault() -> None:
    pass


def at_step(step: int, fault: Callable[[Loop], object]) -> None:
    """Let a fault happen before the batch of the step that is counted as `step`."""
    original = Loop.batch

    def batch(self: Loop, at: int) -> Any:
        if at == step:
            fault(self)
        return original(self, at)

    Loop.batch = batch  # type: ignore[method-assign]


def kill_at_step(step: int) -> None:
    """kill -9 by the process itself."""
    at_step(step, lambda loop: os.kill(os.getpid(), signal.SIGKILL))


def kill_rank_at_step(rank: int, step: int) -> None:
    """kill -9 of one process of several."""
    if os.environ["RANK"] == str(rank):
        kill_at_step(step)


def kill_in_write(call: int, moment: str) -> None:
    """kill -9 around the `call`-th rename, or with half of the `call`-th file written."""
    from resblocks.training import files

    replace, calls = os.replace, 0

    def die(half: Path | None = None) -> None:
        if half is not None:
            half.write_bytes(half.read_bytes()[: half.stat().st_size // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    def faulty(source: Any, target: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == call and moment != "after rename":
            die(Path(source) if moment == "half written" else None)
        replace(source, target)
        if calls == call:
            die()

    files.os.replace = faulty  # type: ignore[assignment]


def full_disk(limit: int) -> None:
    """No file may grow beyond `limit` bytes: the same error path as a full disk."""
    import resource  # POSIX has it

    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def full_memory(step: int) -> None:
    """The step asks for more than this process may have."""
    import resource

    def fault(loop: Loop) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**26,) * 2)
        torch.empty(2**30)

    at_step(step, fault)


def signal_at_step(number: int, step: int) -> None:
    """A real signal to this process while it computes `step`."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which tests in the background of a shell have not
    at_step(step, lambda loop: os.kill(os.getpid(), number))


def signal_in_evaluation(number: int, epoch: int) -> None:
    """A real signal while the net is evaluated after `epoch`."""
    original, calls = Loop.evaluate, 0

    def evaluate(self: Loop, *rest: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == epoch:
            os.kill(os.getpid(), number)
        return original(self, *rest, **options)

    Loop.evaluate = evaluate  # type: ignore[method-assign]


def signal_in_last_write(number: int) -> None:
    """A real signal while result.json is written."""
    module = sys.modules["resblocks.training.fit"]
    original = module.write_json

    def write_json(path: Any, value: Any) -> None:
        os.kill(os.getpid(), number)
        original(path, value)

    module.write_json = write_json


def signal_on_rank(rank: int, number: int, step: int) -> None:
    """The same to one rank only."""
    if os.environ.get("RANK") == str(rank):
        signal_at_step(number, step)


def nan_on_rank(rank: int, step: int) -> None:
    """The labels of one rank's batch stay, its images become NaN."""
    original = Loop.batch

    def batch(self: Loop, at: int) -> Any:
        images, labels = original(self, at)
        return (images * float("nan") if at == step and self.ranks.rank == rank else images), labels

    Loop.batch = batch  # type: ignore[method-assign]


def infinite_gradient(step: int) -> None:
    """A finite loss, and a gradient that is not, from `step` on."""
    at_step(step, lambda loop: next(loop.net.parameters()).register_hook(lambda gradient: gradient * float("inf")))


def bad_statistics_on_rank(rank: int) -> None:
    """The buffers of one rank only are not finite."""
    Loop.finite = lambda self: self.ranks.rank != rank  # type: ignore[method-assign]


def other_option_on_rank(rank: int, option: str, value: Any) -> None:
    """One node is started by another command, or has other data."""
    if os.environ.get("RANK") == str(rank):
        globals()["tiny_fit"] = partial(tiny_fit, **{option: value})


def other_weights_on_rank(rank: int) -> None:
    """One node's net was not seeded."""
    if os.environ.get("RANK") == str(rank):
        seeded = tiny_net
        globals()["tiny_net"] = lambda: seeded().apply(lambda layer: getattr(layer, "reset_parameters", int)())


def disk_of_its_own(folder: str) -> None:
    """A relative path leads each rank to another folder, as on nodes that share no disk."""
    mine = Path(folder) / os.environ["RANK"]
    mine.mkdir(exist_ok=True)
    os.chdir(mine)


def kill_before_the_line_of_an_epoch(epoch: int) -> None:
    """kill -9 between the checkpoint of an epoch and its line in the log."""
    from resblocks.training.log import RunLog

    original = RunLog.epoch

    def write(self: RunLog, record: Any, *rest: Any) -> None:
        if record["epoch"] == epoch:
            os.kill(os.getpid(), signal.SIGKILL)
        original(self, record, *rest)

    RunLog.epoch = write  # type: ignore[method-assign]


def sleep_on_rank(rank: int, step: int, seconds: float) -> None:
    """One rank hangs."""
    at_step(step, lambda loop: time.sleep(seconds if loop.ranks.rank == rank else 0))


def record_rows(folder: str) -> None:
    """Write down which images each step of each rank takes."""
    from resblocks.training import loop

    original = loop.augment

    def spy(images: Any, rows: Any, *rest: Any) -> Any:
        with (Path(folder) / f"rows{os.environ.get('RANK', '0')}").open("a") as file:
            file.write(json.dumps(rows.tolist()) + "\n")
        return original(images, rows, *rest)

    loop.augment = spy


# Running them


def _worker(
    out: str, faults: list[tuple[Callable[..., None], tuple[Any, ...]]], options: dict[str, Any], env: dict[str, str]
) -> None:
    os.environ.update(env)
    for fault, arguments in faults:
        fault(*arguments)
    net = options.pop("make_net", tiny_net)()
    timeout, keep = options.pop("timeout_seconds", 60.0), options.pop("keep", None)
    try:
        ranks = Ranks.from_env(timeout_seconds=timeout)
        load_seconds = options.pop("load_seconds", 0.0)
        waits = [load_seconds] if ranks.is_first else []  # the second time it is in the cache
        ranks.first_then_all(lambda: time.sleep(waits.pop() if waits else 0))
        tiny_fit(Path(out), net, ranks=ranks, **options)
        if keep:
            torch.save(net.state_dict(), f"{keep}-{ranks.rank}.pt")
    except Exception as error:
        Path(out).mkdir(exist_ok=True)
        with contextlib.suppress(OSError):
            (Path(out) / f"error{env.get('RANK', '0')}.txt").write_text(f"{type(error).__name__}: {error}")
        os._exit(1)
    except SystemExit as stop:
        os._exit(int(stop.code or 0))
    os._exit(0)


def run(
    out: Path, *faults: tuple[Callable[..., None], tuple[Any, ...]], ranks: int = 1, limit: float = 60, **options: Any
) -> list[int | None]:
    """Train in `ranks` new processes and return their exit codes (-9: killed); who is late is killed."""
    env: dict[str, str] = {}
    if ranks > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(ranks)}
    processes = []
    for rank in range(ranks):
        mine = {**env, "RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else env
        processes.append(CONTEXT.Process(target=_worker, args=(str(out), list(faults), options, mine)))
        processes[-1].start()
    deadline = time.monotonic() + limit
    for process in processes:
        process.join(max(0.1, deadline - time.monotonic()))
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def error_of(out: Path, rank: int = 0) -> str:
    return (out / f"error{rank}.txt").read_text()


def weights_of(out: Path) -> bytes:
    return (out / "weights.safetensors").read_bytes()
