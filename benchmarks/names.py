"""Compare every net that has a name in another library with theirs, given the same weights: logits and gradients.

    python benchmarks/names.py                            # all names; resumes where the files end
    python benchmarks/names.py 'timm:resnet50*' --again   # some of them, whether the file has them or not

Weights and affine parameters are random, statistics are those of two passes. A pair that is further apart in float32
than rounding explains is compared again in float64, which tells rounding from a difference; where it does not, with
how far their own logits move with the last digit of the image. The tables in docs/names.md are made of the files that
this writes: one for torchvision and timm, one for the others.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any

import theirs
import torch
from torch import nn

from resblocks import DenseNet, interop
from resblocks.interop.compare import largest, logits_of
from resblocks.training.environment import environment
from resblocks.training.files import write_json

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("timm", "transformers", "monai", "pytorchcv")
FLOAT32, FLOAT64 = 1e-4, 1e-8  # how far apart rounding may put them


def randomise(model: nn.Module, x: torch.Tensor) -> None:
    """Give norms random affine parameters, and statistics from two passes, so that none is a no-op."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.uniform_(0.5, 1.5) if name.endswith("weight") else weight.normal_(0, 0.1)
        for _ in range(2):
            model.train()(x)


def compare(name: str, seed: int) -> dict[str, Any]:
    """Load ours from theirs, give the weights back, and measure how far the two are apart."""
    library, _, short = name.partition(":")
    torch.manual_seed(seed)
    model, net = theirs.BUILD[library](short), interop.NAMES[library][short]()
    x = torch.randn(input_size(net))
    randomise(model, x)
    notes = interop.load(net, model, vocabulary=library)
    given, back = model.state_dict(), interop.to_vocabulary(net, library)
    exact = given.keys() == back.keys() and all(torch.equal(given[key], back[key]) for key in given)
    dtype = "float32"
    found = interop.differences(net, model, x, vocabulary=library)
    if not largest([*found.values()]) <= FLOAT32:  # NaN is not
        dtype = "float64"
        found = interop.differences(net.double(), model.double(), x.double(), vocabulary=library)
    limit = FLOAT64 if dtype == "float64" else FLOAT32
    apart = [name for name, value in found.items() if not value < limit]
    row = {"params": sum(weight.numel() for weight in net.parameters()), "notes": notes, "weights_back_exact": exact}
    if apart == ["logits"]:
        row["logits_moved"] = moved(model, x.double())
        apart = [] if found["logits"] <= 10 * row["logits_moved"] else apart  # NaN is not
    return {**row, "dtype": dtype, **found, "equal": not notes and exact and not apart}


def moved(model: nn.Module, x: torch.Tensor) -> float:
    """How far a model's own logits move, relative to them, when the last digit of each pixel does."""
    with torch.no_grad():
        before, after = (logits_of(model.eval()(pixels)) for pixels in (x, torch.nextafter(x, x + 1)))
    return float((after - before).norm() / before.norm())


def input_size(net: nn.Module) -> tuple[int, ...]:
    """Two images of 64x64 pixels, or two volumes: of 32x32x32, or 64x64x64 where that would leave one position."""
    first = next(weight for weight in net.parameters() if weight.dim() > 2)
    volume = (64, 64, 64) if isinstance(net, DenseNet) else (32, 32, 32)
    return (2, first.shape[1], *((64, 64) if first.dim() == 4 else volume))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pattern", nargs="?", default="*", help="of the names, 'timm:resnet50*'")
    parser.add_argument("--again", action="store_true", help="also those that the files have")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name in [name for name in theirs.names() if fnmatch(name, args.pattern)]:
        library = name.partition(":")[0]
        file = RESULTS / f"{theirs.theme(library)}_cpu_2026-11.json"
        done = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else {}
        if name in done and not args.again:
            continue
        start = time.perf_counter()
        row, made_with = compare(name, args.seed), environment(torch.device("cpu"))
        done[name] = {**row, "seconds": round(time.perf_counter() - start, 1), "commit": made_with["commit"]}
        print(name, done[name], flush=True)
        gc.collect()
        made_with["versions"] |= {package: version(package) for package in PACKAGES}
        write_json(file, {"environment": made_with, "seed": args.seed, "rows": done})


if __name__ == "__main__":
    main()
