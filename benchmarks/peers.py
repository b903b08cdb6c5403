"""What the benchmarks have in common: which peers are installed, their weights, images, and with what was measured."""

from __future__ import annotations

import json
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from resblocks.training.device import has_fast_bfloat16
from resblocks.training.environment import environment

RATE_ROUNDS = 30
OPTIONAL = ("timm", "pytorchcv")  # the environment of a result names the other packages


def is_installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def made_with() -> dict[str, Any]:
    """The environment of a measurement on the CPU, with the versions of the peers."""
    made = environment(torch.device("cpu"))
    made["versions"] |= {package: metadata.version(package) for package in filter(is_installed, OPTIONAL)}
    return made


def timed_dtype(name: str) -> torch.dtype:
    """The dtype of that name, or an end with an error where its times on this processor would say nothing."""
    dtype: torch.dtype = getattr(torch, name)
    if dtype == torch.bfloat16 and not has_fast_bfloat16(torch.device("cpu")):
        raise SystemExit("dtype must be float32: this processor emulates bfloat16, whose times say nothing")
    return dtype


def merged(kept: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Measured cases with the new ones, which carry their environment, in place of those of their settings."""
    replaced = {setting(case) for case in new}
    return [case for case in kept if setting(case) not in replaced] + new


def setting(case: dict[str, Any]) -> str:
    """What was measured and on which device, without what was found."""
    said = {key: value for key, value in case.items() if key not in ("rows", "limit", "environment")}
    return json.dumps([said, case["environment"]["device"]], sort_keys=True)


def apart(tensor: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((tensor - truth).norm() / truth.norm())


def check_memory(path: Path, now: dict[str, dict[str, Any]]) -> None:
    """Raise where the memory figures of the file are not those of this source, peers aside that are not installed."""
    kept = json.loads(path.read_text(encoding="utf-8"))["memory"]
    missing = [package for package in OPTIONAL if not is_installed(package)]
    wrong = [
        f"{net} {name}: {now.get(net, {}).get(name)}, was {kept.get(net, {}).get(name)}"
        for net in {**now, **kept}
        for name in {**now.get(net, {}), **kept.get(net, {})}
        if now.get(net, {}).get(name) != kept.get(net, {}).get(name) and name.partition(" ")[0] not in missing
    ]
    if wrong:
        raise SystemExit(f"memory differs from {path.name}:\n" + "\n".join(wrong))
    print(f"the memory figures of {path.name} are those of this source")


def macs_per_second(dtype: torch.dtype) -> float:
    """The most that a convolution does on one thread: the fastest of the four 3x3 kinds of a ResNet-18, batch 8."""
    best = 0.0
    for channels, size in ((64, 56), (128, 28), (256, 14), (512, 7)):
        x = torch.ones(8, channels, size, size, dtype=dtype).contiguous(memory_format=torch.channels_last)
        weight = torch.ones(channels, channels, 3, 3, dtype=dtype).contiguous(memory_format=torch.channels_last)
        for _ in range(RATE_ROUNDS):
            start = time.process_time()
            functional.conv2d(x, weight, padding=1)
            best = max(best, x[:, 0].numel() * weight.numel() / (time.process_time() - start))
    return best


def conditions(case: dict[str, Any], *names: str) -> str:
    """In words, with which batch, precision and instructions of the processor a case was measured, and the names."""
    said = [f"batch {case['batch']}", *(str(case[name]) for name in names), case["dtype"], processor(case)]
    return ", ".join(said)


def processor(case: dict[str, Any]) -> str:
    """Its instructions, and its name where torch told it: what stands between machine and cores in its device."""
    device: str = case["environment"]["device"]  # such as "cpu (x86_64, AVX512, AMD EPYC, 2 cores)"
    return ", ".join(device.split(", ")[1:-1])


def same_weights(net: nn.Module, source: nn.Module) -> nn.Module:
    """The net with the tensors of another that has them in the same order under other names."""
    mine, theirs = net.state_dict(), source.state_dict()
    if [tensor.shape for tensor in mine.values()] != [tensor.shape for tensor in theirs.values()]:
        raise ValueError(f"net must have the tensors of {type(source).__name__} in its order, got {type(net).__name__}")
    net.load_state_dict(dict(zip(mine, theirs.values(), strict=True)))
    return net


def data(batch: int, size: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Random images and labels, the same each time."""
    generator = None if device == "meta" else torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, size, size, device=device, dtype=dtype, generator=generator)
    return x, torch.arange(batch, device=device) % 10


def gate(grads: list[Any], buffers: list[Tensor], true_grads: list[Any], true_buffers: list[Tensor]) -> dict[str, Any]:
    """How far a step's gradients and buffers, in order, are from the true ones, and whether that is rounding."""
    row = {
        "gradients": max(apart(*pair) for pair in zip(grads, true_grads, strict=True)),
        "buffers": max(apart(*pair) for pair in zip(buffers, true_buffers, strict=True) if pair[0].dim()),
        "batches_counted": sorted({int(buffer) for buffer in buffers if not buffer.dim()}),
    }
    passes = row["gradients"] < 1e-9 and row["buffers"] < 1e-12 and row["batches_counted"] == [1]
    return {**row, "passes": passes}


def verdict(gate: dict[str, Any]) -> str:
    """What the gate of a contestant found, in words."""
    if gate["passes"]:
        return "equal"
    return "batches counted twice" if gate["batches_counted"] != [1] else "different"
