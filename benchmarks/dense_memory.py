"""What training a DenseNet costs in memory and time: ours against torchvision's and timm's, with the same weights.

    python benchmarks/dense_memory.py            # gates, memory, depth and time, about 25 minutes on a core
    python benchmarks/dense_memory.py --only time --dtype bfloat16   # under autocast, where the processor has bfloat16
    python benchmarks/dense_memory.py --only products   # seconds: 1x1 convolutions of dense blocks by MKL and by oneDNN
    python benchmarks/dense_memory.py --check    # a minute: counts the memory again, fails where it has changed

Memory is counted operator by operator (`live_bytes.py`) over one forward and backward, without parameters and input:
exact, the same on every machine, and free on the meta device. Time is processor time of one thread, contestants
interleaved. Both count only beside the gates: gradients and batch-norm buffers must be those of plain torchvision.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from live_bytes import check_the_counter, peak_of_step
from peers import check_memory, data, gate, made_with, merged, timed_dtype
from timm.models.densenet import DenseNet as TimmDenseNet
from torch import Tensor, nn
from torch.nn import functional
from torch.profiler import profile
from torchvision.models import DenseNet as TorchvisionDenseNet
from turns import against, take_turns

from resblocks import DenseNet, _products, interop
from resblocks._dense_maps import CPU_CHUNK
from resblocks.models import cifar_densenet
from resblocks.training.files import write_json

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "dense_memory_cpu_2026-11.json"
FIGURE = ROOT / "docs" / "dense_memory_depth.png"
BASELINE = "torchvision"
OURS = ("shared", "lean")
CONTESTANTS = ("torchvision", "torchvision memory_efficient", "timm", "timm memory_efficient", *OURS)
TIMED = ("torchvision", "torchvision memory_efficient", *OURS)
CHUNKS = ((3072, 168, 48), (1664, 312, 48), (1568, 256, 128))  # positions, channels in and out, as in these nets
DEPTHS = (28, 52, 100, 196, 292, 388)
MIB = 2**20


# --- the contestants


def small(contestant: str, depth: int = 100, device: str = "cpu") -> nn.Module:
    """DenseNet-BC of so many layers with growth rate 12, for CIFAR."""
    layers = ((depth - 4) // 6,) * 3
    if contestant in OURS:
        return cifar_densenet(depth, 12, memory=contestant, device=device)
    with torch.device(device):
        net = theirs(contestant, growth_rate=12, block_config=layers, num_classes=10)
        net.features.conv0 = nn.Conv2d(3, 24, 3, padding=1, bias=False)
    for name in ("norm0", "relu0", "pool0"):
        if hasattr(net.features, name):
            setattr(net.features, name, nn.Identity())
    return net


def densenet121(contestant: str, device: str = "cpu") -> nn.Module:
    """The ImageNet net."""
    if contestant in OURS:
        return DenseNet(memory=contestant, device=device)
    with torch.device(device):
        return theirs(contestant, growth_rate=32, block_config=(6, 12, 24, 16))


def theirs(contestant: str, growth_rate: int, **options: Any) -> Any:
    library, _, mode = contestant.partition(" ")
    if library == "torchvision":
        options["num_init_features"] = 2 * growth_rate
    build = {"torchvision": TorchvisionDenseNet, "timm": TimmDenseNet}[library]
    return build(growth_rate=growth_rate, memory_efficient=mode == "memory_efficient", **options)


def with_same_weights(build: Callable[[str], nn.Module], contestants: tuple[str, ...]) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    nets = {contestant: build(contestant) for contestant in contestants}
    for contestant, net in nets.items():
        if contestant in OURS:
            interop.load(net, nets[BASELINE])
        else:
            net.load_state_dict(nets[BASELINE].state_dict())
    return nets


# --- the gates


def gates(nets: dict[str, nn.Module], batch: int, size: int) -> dict[str, Any]:
    """How far gradients and buffers are from those of the baseline after one step in float64."""
    found = {}
    for contestant, net in nets.items():
        net = copy.deepcopy(net).double()
        x, labels = data(batch, size, dtype=torch.float64)
        functional.cross_entropy(net(x), labels).backward()
        found[contestant] = [weight.grad for weight in net.parameters()], list(net.buffers())
    return {contestant: gate(*tensors, *found[BASELINE]) for contestant, tensors in found.items()}


# --- memory


def count(
    build: Callable[..., nn.Module], contestant: str, batch: int, size: int, device: str = "meta"
) -> dict[str, int]:
    """Bytes that a forward keeps, and the peak of forward and backward."""
    net = build(contestant, device=device)
    x, labels = data(batch, size, device)
    saved, peak = peak_of_step(lambda: functional.cross_entropy(net(x), labels))
    return {"batch": batch, "saved_bytes": saved, "peak_bytes": peak}


def allocator_peak(contestant: str, batch: int) -> int:
    """The peak that the allocator itself saw on the CPU, with what operators allocate inside themselves."""
    net = small(contestant)
    x, labels = data(batch, 32)
    with profile(profile_memory=True) as watched:
        functional.cross_entropy(net(x), labels).backward()
    events = [event for event in watched.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def memory() -> dict[str, Any]:
    check_the_counter("meta")
    check_the_counter("cpu")
    return {
        "densenet_bc_100_12": {name: count(small, name, 64, 32) for name in CONTESTANTS},
        "densenet121": {name: count(densenet121, name, 16, 224) for name in CONTESTANTS},
    }


def memory_on_the_cpu() -> dict[str, Any]:
    """The same count on real tensors, and what the allocator says to it.

    The meta device makes all results of an operator, also those that the caller declines: a chunk more for ours.
    """
    rows = {}
    for name in TIMED:
        real, meta = count(small, name, 16, 32, "cpu"), count(small, name, 16, 32)
        if not 0 <= meta["peak_bytes"] - real["peak_bytes"] <= CPU_CHUNK:
            raise RuntimeError(f"the counter must find the same on both devices, got {real} and {meta} for {name}")
        rows[name] = {**real, "allocator_peak_bytes": allocator_peak(name, 16)}
    return rows


def depth_curve() -> dict[str, Any]:
    return {
        str(depth): {
            name: count(lambda name, device, depth=depth: small(name, depth, device), name, 64, 32) for name in TIMED
        }
        for depth in DEPTHS
    }


# --- time


def times(
    nets: dict[str, nn.Module], batch: int, size: int, layout: str, dtype: torch.dtype, repeats: int
) -> dict[str, Any]:
    """Seconds of one forward and backward, contestants taking turns, and the ratio to the baseline's of that turn."""
    order = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}[layout]
    nets = {name: copy.deepcopy(net).to(memory_format=order) for name, net in nets.items()}
    x, labels = data(batch, size)
    x = x.contiguous(memory_format=order)
    seconds = take_turns({name: partial(step, net, x, labels, dtype) for name, net in nets.items()}, repeats)
    said = {"batch": batch, "size": size, "layout": layout, "dtype": str(dtype).removeprefix("torch.")}
    return {**said, "rows": against(seconds, BASELINE), "environment": made_with()}


def step(net: nn.Module, x: Tensor, labels: Tensor, dtype: torch.dtype) -> None:
    net.zero_grad()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = functional.cross_entropy(net(x).float(), labels)
    loss.backward()


def products(repeats: int) -> list[dict[str, Any]]:
    """Seconds of 1x1 convolutions of chunks in float32, forward and backward: MKL's products and oneDNN's convolutions.

    That is what decides between the two in `resblocks._products`.
    """
    return [product(*chunk, repeats) for chunk in CHUNKS]


def product(positions: int, channels: int, out_channels: int, repeats: int) -> dict[str, Any]:
    rows, weight = torch.randn(1, positions, channels), torch.randn(out_channels, channels)
    out, dweight = torch.randn(1, positions, out_channels), torch.zeros_like(weight)

    def run(convolves: bool) -> None:
        with mock.patch.object(_products, "is_mkl_slow", return_value=convolves):
            for _ in range(20):
                _products.multiply(rows, weight, out)
                _products.multiply_backward(out, rows, weight, dweight)

    seconds = take_turns({"product": partial(run, False), "convolution": partial(run, True)}, repeats)
    said = {"positions": positions, "channels": [channels, out_channels], "calls": 20}
    return {**said, "rows": against(seconds, "product"), "environment": made_with()}


# --- the figure


def draw(depths: dict[str, Any], path: Path) -> None:
    """Peak of a training step against the depth, in MiB and as a ratio to plain torchvision."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    looks = {
        "torchvision": ("#777777", "torchvision"),
        "torchvision memory_efficient": ("#d08770", "torchvision, memory_efficient"),
        "shared": ("#2a6f97", 'resblocks, memory="shared" (default)'),
        "lean": ("#01497c", 'resblocks, memory="lean"'),
    }
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    x = [int(depth) for depth in depths]
    for name, (colour, label) in looks.items():
        peaks = [row[name]["peak_bytes"] / row[name]["batch"] / MIB for row in depths.values()]
        plain = [row[BASELINE]["peak_bytes"] / row[BASELINE]["batch"] / MIB for row in depths.values()]
        ratios = [p / q for p, q in zip(plain, peaks, strict=True)]
        style = "--" if name == "lean" else "-"
        left.plot(x, peaks, style, marker="o", markersize=3.5, color=colour, label=label)
        right.plot(x, ratios, style, marker="o", markersize=3.5, color=colour)
        left.annotate(
            f"{peaks[-1]:.0f}", (x[-1], peaks[-1]), (5, -3), textcoords="offset points", color=colour, fontsize=8
        )
        right.annotate(
            f"{ratios[-1]:.1f}x", (x[-1], ratios[-1]), (5, -3), textcoords="offset points", color=colour, fontsize=8
        )
    left.set(xscale="log", yscale="log", xlabel="layers", ylabel="peak, MiB per image", xlim=(26, 560))
    right.set(xlabel="layers", ylabel="torchvision's peak over it", xlim=(0, 430), ylim=(0, None))
    for axes in (left, right):
        axes.set_xticks(x, [str(depth) for depth in x])
        axes.minorticks_off()
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(fontsize=8, frameon=False, loc="upper left")
    figure.suptitle("Training DenseNet-BC (k = 12) on 32x32 images, batch 64, float32", fontsize=10)
    figure.savefig(path, dpi=130)


# --- the command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare the memory figures with the file's")
    parser.add_argument("--only", choices=["gates", "memory", "depth", "products", "time"], action="append")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the times")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    dtype = timed_dtype(args.dtype)
    if args.check:
        check_memory(args.out, memory())
        return
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "gates": lambda: {"gates": gates(with_same_weights(small, CONTESTANTS), 8, 32)},
        "memory": lambda: {"memory": memory(), "memory_on_the_cpu": memory_on_the_cpu()},
        "depth": lambda: {"depth": depth_curve()},
        "products": lambda: {"products": merged(result.get("products", []), products(args.repeats))},
        "time": lambda: {"time": merged(result.get("time", []), timings(dtype, args.repeats))},
    }
    result = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
    for part in args.only or parts:
        if part not in ("products", "time"):  # whose cases say it themselves
            result.setdefault("environment", {})[part] = made_with()
        result |= parts[part]()
        write_json(args.out, result)
        print(json.dumps({part: result.get(part)}, indent=1), flush=True)
    if "depth" in result:
        draw(result["depth"], FIGURE)


def timings(dtype: torch.dtype, repeats: int) -> list[dict[str, Any]]:
    nets = with_same_weights(small, TIMED)
    rows = [
        {"net": "densenet_bc_100_12", **times(nets, batch, 32, layout, dtype, repeats)}
        for batch in (64, 16)
        for layout in ("channels_last", "contiguous")
    ]
    large = with_same_weights(densenet121, TIMED)
    return [*rows, {"net": "densenet121", **times(large, 4, 224, "channels_last", dtype, repeats)}]


if __name__ == "__main__":
    main()
