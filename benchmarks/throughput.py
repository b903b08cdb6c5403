"""Images a second of training CIFAR nets: ours, torchvision's and timm's, eager and compiled, whole steps.

    python benchmarks/throughput.py --compile default reduce-overhead --graph --out throughput.json    # on a GPU
    python benchmarks/throughput.py --nets densenet_bc_100_12 --batch 64 --out throughput.json
    python benchmarks/throughput.py --batch 32 --rounds 3 --out throughput.json                        # on a CPU

A step is forward, loss, backward and a fused SGD update on images that lie on the device, in channels_last, under
bfloat16 autocast where the hardware has it. `reduce-overhead` replays forward and backward as CUDA graphs, "graph"
the whole step as one. All contestants start from the same weights and take turns in one process; "harness" is a step
of `resblocks.training` with its augmentation and its check for infinite losses and gradients, too.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from dense_memory import small, with_same_weights
from torch import Tensor, nn
from torch.nn import functional
from train_step import build
from turns import spread, take_turns

from resblocks.training import Dataset, Ranks, get_recipe
from resblocks.training.device import current_device, pick_device, pick_precision
from resblocks.training.environment import environment
from resblocks.training.files import write_json
from resblocks.training.loop import Loop

NETS = {
    "resnet18_cifar": ("torchvision", "timm", "resblocks", "resblocks norms"),
    "densenet_bc_100_12": ("torchvision", "torchvision memory_efficient", "timm", "shared", "lean"),
}
OURS = {"shared": "resblocks", "lean": "resblocks lean"}
IMAGES = 2048  # of random pixels: their content does not change the time


def built(name: str) -> dict[str, nn.Module]:
    """The contestants of a net, all with the weights of the first."""
    if name == "resnet18_cifar":
        return build(name, NETS[name])
    nets = with_same_weights(small, NETS[name])
    return {OURS.get(contestant, contestant): net for contestant, net in nets.items()}


def contestants(
    name: str, batch: int, modes: list[str], graph: bool, device: torch.device, dtype: torch.dtype
) -> dict[str, Callable[[], None]]:
    """A function for each contestant that trains for one step."""
    nets = {key: net.to(device, memory_format=torch.channels_last) for key, net in built(name).items()}
    found = {key: plain_step(net, net, batch, device, dtype) for key, net in nets.items()}
    harness = partial(harness_step, batch=batch, device=device, dtype=dtype)
    found["resblocks harness"] = harness(copy.deepcopy(nets["resblocks"]))
    if graph:
        found["resblocks harness graph"] = harness(copy.deepcopy(nets["resblocks"]), graph=True)
        found["resblocks harness default graph"] = harness(copy.deepcopy(nets["resblocks"]), mode="default", graph=True)
    for mode in modes:
        for key in ("torchvision", "resblocks"):
            net = copy.deepcopy(nets[key])
            found[f"{key} {mode}"] = plain_step(net, torch.compile(net, mode=mode), batch, device, dtype)
        found[f"resblocks harness {mode}"] = harness(copy.deepcopy(nets["resblocks"]), mode=mode)
    return found


def plain_step(
    net: nn.Module, run: Callable[[Tensor], Tensor], batch: int, device: torch.device, dtype: torch.dtype
) -> Callable[[], None]:
    """As a user would write it, with what torch offers for speed."""
    x = torch.randn(batch, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(batch, device=device) % 10
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True)

    def step() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = functional.cross_entropy(run(x).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def harness_step(
    net: nn.Module,
    batch: int,
    device: torch.device,
    dtype: torch.dtype,
    mode: str | None = None,
    graph: bool = False,
) -> Callable[[], None]:
    """A step of our training loop, augmentation and all."""
    images = torch.randint(256, (IMAGES, 3, 32, 32), dtype=torch.uint8)
    labels = torch.arange(IMAGES) % 10
    dataset = Dataset("noise", tuple("0123456789"), images, labels, images[:10], labels[:10])
    recipe = get_recipe("r26", batch_size=batch, lr=1e-3)
    loop = Loop(net, dataset, recipe, 0, device, dtype, Ranks(), compile_mode=mode, graph=graph)
    return lambda: loop.train_step(0)


def measure(
    name: str,
    batch: int,
    rounds: int,
    steps: int,
    modes: list[str],
    graph: bool,
    device: torch.device,
    dtype: torch.dtype,
) -> Any:
    """Images a second of each contestant in each round of so many steps, and how many times torchvision's of it."""

    def repeated(step: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(steps):
                step()
            if device.type == "cuda":
                torch.cuda.synchronize()

        return run

    found = {key: repeated(step) for key, step in contestants(name, batch, modes, graph, device, dtype).items()}
    take_turns(found, 2, time.perf_counter)  # compiling and choosing algorithms
    seconds = take_turns(found, rounds, time.perf_counter)
    base = seconds["torchvision"]
    rows = {
        key: {
            "images_per_second": [round(batch * steps / second, 1) for second in spent],
            **spread([other / own for own, other in zip(spent, base, strict=True)], "speed"),
        }
        for key, spent in seconds.items()
    }
    return {"net": name, "batch": batch, "steps": steps, "dtype": str(dtype).removeprefix("torch."), "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=["resnet18_cifar"], choices=NETS)
    parser.add_argument("--batch", type=int, nargs="+", default=[128, 512, 1024])
    parser.add_argument("--compile", nargs="*", default=[], choices=("default", "reduce-overhead", "max-autotune"))
    parser.add_argument("--graph", action="store_true", help="also the harness with whole steps as CUDA graphs")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, help="a round (default: 20 on a GPU, 1 on a CPU)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    device = pick_device(options.device, 0)
    dtype = pick_precision(options.precision, device)
    torch.backends.cudnn.benchmark = True
    steps = options.steps or (20 if device.type == "cuda" else 1)
    cases = []
    for net, batch in itertools.product(options.nets, options.batch):
        with current_device(device):
            how = options.rounds, steps, options.compile, options.graph, device, dtype
            cases.append(measure(net, batch, *how))
        write_json(
            options.out, {"environment": environment(device), "throughput": cases}
        )  # after each: runs may be cut
        for name, row in cases[-1]["rows"].items():
            rate = max(row["images_per_second"])
            print(f"{batch:5d} {name:32s} {rate:10.0f} images/s  {row['speed_median']:.2f} x torchvision", flush=True)


if __name__ == "__main__":
    main()
