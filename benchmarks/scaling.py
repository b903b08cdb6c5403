"""How the memory of a training step grows with depth, width, batch and resolution, as a ratio to torchvision's.

    python benchmarks/scaling.py            # a minute on a core; writes the file and the figure
    python benchmarks/scaling.py --check    # counts again, fails where the file says otherwise
    python benchmarks/scaling.py --draw     # the figure alone, from the file

Counted operator by operator on the meta device (`live_bytes.py`): exact, and the same on every machine.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from live_bytes import check_the_counter, peak_of_step
from torch import nn
from torch.nn import functional
from torchvision.models.resnet import Bottleneck as TorchvisionBottleneck
from torchvision.models.resnet import ResNet as TorchvisionResNet

from resblocks import Bottleneck, ResNet
from resblocks.training.environment import environment
from resblocks.training.files import write_json

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "scaling_cpu_2026-11.json"
FIGURE = ROOT / "docs" / "scaling_memory.png"
MIB = 2**20
BASELINE = "torchvision"
CONTESTANTS = {
    "torchvision": None,
    "resblocks": False,
    "resblocks norms": "norms",
    "resblocks checkpoint": True,
}
# What each curve changes of ResNet-50 on 32 images of 128 pixels
USUAL = {"third_stage": 6, "base_width": 64, "batch": 32, "size": 128}
CURVES: dict[str, dict[str, list[int]]] = {
    "depth": {"third_stage": [2, 6, 23, 36, 72]},  # 36 is ResNet-152's
    "width": {"base_width": [16, 32, 64, 128, 256]},
    "batch": {"batch": [1, 8, 32, 128, 512]},
    "resolution": {"size": [32, 64, 128, 224, 448]},
}
CHANGED = {
    "depth": "bottlenecks in the third stage",
    "width": "base width of the bottlenecks",
    "batch": "images in the batch",
    "resolution": "pixels along the image",
}


def build(contestant: str, third_stage: int, base_width: int) -> nn.Module:
    """ResNet-50, with so many blocks in the third stage and bottlenecks so wide."""
    depths = [3, 4, third_stage, 3]
    with torch.device("meta"):
        if contestant == BASELINE:
            return TorchvisionResNet(TorchvisionBottleneck, depths, width_per_group=base_width)
        block = partial(Bottleneck, base_width=base_width)
        checkpoint: Any = CONTESTANTS[contestant]
        return ResNet(block, depths, (256, 512, 1024, 2048), checkpoint=checkpoint)


def point(third_stage: int, base_width: int, batch: int, size: int) -> dict[str, Any]:
    """Bytes of each contestant, and their ratio to the baseline's."""
    x = torch.randn(batch, 3, size, size, device="meta")
    labels = torch.zeros(batch, dtype=torch.long, device="meta")
    rows = {}
    for contestant in CONTESTANTS:
        net = build(contestant, third_stage, base_width)
        saved, peak = peak_of_step(lambda net=net: functional.cross_entropy(net(x), labels))
        rows[contestant] = {"saved_bytes": saved, "peak_bytes": peak}
    for row in rows.values():
        row |= {f"{what}_ratio": row[f"{what}_bytes"] / rows[BASELINE][f"{what}_bytes"] for what in ("saved", "peak")}
    return rows


def curves() -> dict[str, Any]:
    """All points of all curves."""
    found: dict[str, Any] = {}
    for name, changed in CURVES.items():
        ((key, values),) = changed.items()
        found[name] = {str(value): point(**{**USUAL, key: value}) for value in values}
    return found


def draw(found: dict[str, Any], path: Path) -> None:
    """Peak of a training step as a ratio to torchvision's, against depth, width, batch and resolution."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    looks = {
        "resblocks": ("#0072B2", "-", "o", "torchvision and resblocks"),
        "resblocks norms": ("#D55E00", "--", "s", 'checkpoint="norms"'),
        "resblocks checkpoint": ("#009E73", "-.", "^", "checkpoint=True"),
    }
    figure, every = pyplot.subplots(1, len(found), figsize=(11, 3.2), layout="constrained", sharey=True)
    for axes, (name, points) in zip(every, found.items(), strict=True):
        x = [int(value) for value in points]
        for contestant, (colour, style, marker, label) in looks.items():
            ratios = [rows[contestant]["peak_ratio"] for rows in points.values()]
            axes.plot(x, ratios, linestyle=style, marker=marker, markersize=4, color=colour, label=label)
        axes.set(xscale="log", xlabel=CHANGED[name], ylim=(0, 1.1))
        axes.set_xticks(x, [str(value) for value in x])
        axes.minorticks_off()
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    every[0].set(ylabel="peak over torchvision's")
    every[-1].legend(fontsize=8, frameon=False, loc="lower right")
    figure.suptitle(
        "Peak memory of a training step of ResNet-50, 32 images of 128 pixels, one thing changed", fontsize=10
    )
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare with the file")
    parser.add_argument("--draw", action="store_true", help="draw the figure from the file, count nothing")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.draw:
        draw(json.loads(options.out.read_text(encoding="utf-8"))["curves"], FIGURE)
        return
    check_the_counter("meta")
    found = curves()
    if options.check:
        if json.loads(options.out.read_text(encoding="utf-8"))["curves"] != found:
            raise SystemExit(
                f"memory differs from {options.out.name}: run benchmarks/scaling.py and look at the change"
            )
        print(f"the memory figures of {options.out.name} are those of this source")
        return
    made = environment(torch.device("cpu"))
    write_json(options.out, {"environment": made, "usual": USUAL, "curves": found})
    draw(found, FIGURE)
    for name, points in found.items():
        for value, rows in points.items():
            ratios = "  ".join(f"{contestant} {row['peak_ratio']:.3f}" for contestant, row in rows.items())
            print(f"{name} {value}: {ratios}")


if __name__ == "__main__":
    main()
