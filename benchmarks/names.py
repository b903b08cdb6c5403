"""Compare every net that has a name in torchvision or timm with theirs, given the same weights: logits and gradients.

    python benchmarks/names.py                      # all names; resumes where the file ends
    python benchmarks/names.py resnet50d densenet121

Weights and affine parameters are random, statistics are those of two passes. A pair that is further apart in float32
than rounding explains is compared again in float64, which tells rounding from a difference. The table in
docs/names.md is made of the file that this writes.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import nn

from resblocks import interop
from resblocks.interop.compare import largest
from resblocks.training.environment import environment
from resblocks.training.files import write_json

RESULTS = Path(__file__).resolve().parent / "results" / "names_cpu_2026-11.json"
TOO_LARGE = ("timm:resnetv2_152x4_bit",)  # weights and gradients of both in float64 take 30 GB; run by name only
FLOAT32, FLOAT64 = 1e-4, 1e-8  # how far apart rounding may put them


def randomise(model: nn.Module, x: torch.Tensor) -> None:
    """Give norms random affine parameters, and statistics from two passes, so that none is a no-op."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.uniform_(0.5, 1.5) if name.endswith("weight") else weight.normal_(0, 0.1)
        for _ in range(2):
            model.train()(x)


def compare(theirs: Callable[[], nn.Module], ours: Callable[[], nn.Module], seed: int) -> dict[str, Any]:
    """Load ours from theirs, give the weights back, and measure how far the two are apart."""
    torch.manual_seed(seed)
    model, x = theirs(), torch.randn(2, 3, 64, 64)
    randomise(model, x)
    net = ours()
    notes = interop.load(net, model)
    given, back = model.state_dict(), interop.to_timm(net)
    exact = given.keys() == back.keys() and all(torch.equal(given[key], back[key]) for key in given)
    dtype = "float32"
    found = interop.differences(net, model, x)
    if not largest([*found.values()]) <= FLOAT32:  # NaN is not
        dtype = "float64"
        found = interop.differences(net.double(), model.double(), x.double())
    return {
        "params": sum(weight.numel() for weight in net.parameters()),
        "notes": notes,
        "weights_back_exact": exact,
        "dtype": dtype,
        **found,
        "equal": not notes and exact and largest([*found.values()]) < (FLOAT64 if dtype == "float64" else FLOAT32),
    }


def pairs() -> dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]]:
    """Theirs and ours for every name, "torchvision:resnet50" or "timm:resnet50d"."""
    found: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {}
    for name, build in interop.TORCHVISION.items():
        found[f"torchvision:{name}"] = (lambda name=name: torchvision.models.get_model(name, weights=None), build)
    for name, build in interop.TIMM.items():
        found[f"timm:{name}"] = (lambda name=name: timm.create_model(name), build)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="which names; none means all that the file lacks")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    done = json.loads(args.out.read_text(encoding="utf-8"))["rows"] if args.out.exists() else {}
    for name, (theirs, ours) in pairs().items():
        if not args.names and name in TOO_LARGE:
            continue
        if name.partition(":")[2] not in args.names if args.names else name in done:
            continue
        start = time.perf_counter()
        done[name] = {**compare(theirs, ours, args.seed), "seconds": round(time.perf_counter() - start, 1)}
        print(name, done[name], flush=True)
        gc.collect()
        result = {
            "environment": {**environment(torch.device("cpu")), "timm": timm.__version__},
            "input_size": [2, 3, 64, 64],
            "seed": args.seed,
            "rows": done,
        }
        write_json(args.out, result)


if __name__ == "__main__":
    main()
