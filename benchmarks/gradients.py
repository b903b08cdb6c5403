"""Do gradients vanish without skips? Their size by layer at initialisation: depth x skips x norm, over seeds.

    python benchmarks/gradients.py --data-dir data/cifar10-jpeg    # a few minutes on one CPU core
    python benchmarks/gradients.py --draw                          # the figure alone, from the result file

The nets are the CIFAR ResNets of He et al. 2015; one batch of training images, no augmentation, float32. Two things are
compared within each stage, whose layers have one width: the gradient of the weights, of the first 3x3 convolution over
that of the last one, which is what an optimizer sees; and the gradient that travels, at the output of the first block
over that of the last one. They differ where the maps grow or shrink, since a weight's gradient is the product of map
and gradient.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import nn

from resblocks import create_model
from resblocks.diagnostics import gradient_flow, signal_report
from resblocks.training import Dataset, load_dataset, normalise
from resblocks.training.environment import environment
from resblocks.training.files import write_json

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "gradients_cpu_2026-11.json"
FIGURE = ROOT / "docs" / "figures" / "gradients_depth.png"
DEPTHS = (20, 32, 44, 56, 110)
NORMS = {"batch norm": nn.BatchNorm2d, "no norm": None}
IMAGES = 128


def gradients(depth: int, skip: bool, norm: str, seed: int, dataset: Dataset) -> dict[str, list[dict[str, Any]]]:
    """Mean absolute gradient of each weight, and variance and gradient norm of what each block puts out."""
    torch.manual_seed(seed)
    rows = torch.randperm(len(dataset.train_labels))[:IMAGES]
    net = create_model(f"resnet{depth}", skip=skip, norm=NORMS[norm], num_classes=len(dataset.classes))
    images = normalise(dataset.train_images[rows], dataset.mean, dataset.std)
    labels = dataset.train_labels[rows]
    signals = signal_report(net, images, lambda logits: nn.functional.cross_entropy(logits, labels))
    nn.functional.cross_entropy(net(images), labels).backward()
    return {
        "layers": [{"name": row.name, "mean_abs": row.mean_abs} for row in gradient_flow(net)],
        "blocks": [{"name": row.name, "var": row.merged_var, "grad_norm": row.merged_grad_norm} for row in signals],
    }


def ratios(run: dict[str, list[dict[str, Any]]], stage: int) -> dict[str, float]:
    """First over last in a stage: of the weights' gradients, and of the gradients at the outputs of blocks.

    And how the variance of the map grows on its way, last over first.
    """
    mine = {kind: [row for row in rows if row["name"].startswith(f"stages.{stage}.")] for kind, rows in run.items()}
    # The first convolution of a later stage has fewer input channels, so the second one stands for it.
    weights, blocks = mine["layers"][stage > 0 :], mine["blocks"]
    return {
        "weights": weights[0]["mean_abs"] / weights[-1]["mean_abs"],
        "maps": blocks[0]["grad_norm"] / blocks[-1]["grad_norm"],
        "growth": blocks[-1]["var"] / blocks[0]["var"],
    }


def study(dataset: Dataset, depths: tuple[int, ...] = DEPTHS, seeds: int = 3) -> list[dict[str, Any]]:
    """All runs: per net its layers and blocks for each seed, and the ratios of each stage, means over the seeds."""
    rows = []
    for depth in depths:
        for norm in NORMS:
            for skip in (True, False):
                runs = [gradients(depth, skip, norm, seed, dataset) for seed in range(seeds)]
                found = [[ratios(run, stage) for run in runs] for stage in range(3)]
                means = {
                    what: [statistics.geometric_mean(seed[what] for seed in stage) for stage in found]
                    for what in ("weights", "maps", "growth")
                }
                rows.append({"depth": depth, "norm": norm, "skip": skip, **means, "seeds": runs})
                print(depth, norm, "with skips" if skip else "without skips", means, flush=True)
    return rows


def by_seed(row: dict[str, Any], what: str, stage: int) -> list[float]:
    """The ratio of a stage for each seed."""
    return [ratios(run, stage)[what] for run in row["seeds"]]


def by_layer(row: dict[str, Any]) -> list[float]:
    """Gradient of each weight over that of the last convolution, geometric mean over the seeds."""
    seeds = [[layer["mean_abs"] for layer in run["layers"]] for run in row["seeds"]]
    relative = [[size / sizes[-2] for size in sizes] for sizes in seeds]
    return [statistics.geometric_mean(own) for own in zip(*relative, strict=True)]


def draw(rows: list[dict[str, Any]], dataset: str, path: Path) -> None:
    """First over last in the first stage, against depth, with a band over the seeds; the layers of the deepest nets."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    figure, (weights, maps, layers) = pyplot.subplots(1, 3, figsize=(12, 4), layout="constrained")
    for norm, colour in (("batch norm", "#0072B2"), ("no norm", "#D55E00")):
        for skip, style in ((True, "-"), (False, "--")):
            mine = [row for row in rows if (row["norm"], row["skip"]) == (norm, skip)]
            look = {"color": colour, "linestyle": style}
            depths = [row["depth"] for row in mine]
            for axes, what in ((weights, "weights"), (maps, "maps")):
                label = f"{norm}, {'with' if skip else 'without'} skips"
                axes.plot(depths, [row[what][0] for row in mine], marker="o", markersize=4, label=label, **look)
                seeds = [by_seed(row, what, 0) for row in mine]
                axes.fill_between(depths, list(map(min, seeds)), list(map(max, seeds)), color=colour, alpha=0.15, lw=0)
            sizes = by_layer(mine[-1])
            layers.plot(range(1, len(sizes) + 1), sizes, lw=1.2, **look)
    for axes, what in ((weights, "Gradient of weights"), (maps, "Gradient at outputs of blocks")):
        axes.axhline(1, color="#999999", lw=0.8)
        axes.set(title=f"{what}, stage 1", xlabel="layers", yscale="log", xticks=depths)
    weights.set_ylabel("first over last")
    figure.legend(*weights.get_legend_handles_labels(), frameon=False, fontsize=8, ncols=4, loc="outside upper center")
    layers.set(title=f"Gradient of weights, {depths[-1]} layers", xlabel="layer, the last is the classifier")
    layers.set_ylabel("over that of the last convolution")
    layers.set(yscale="log", xlim=(-2, depths[-1] + 3))
    layers.xaxis.set_major_locator(MaxNLocator(integer=True))
    named = ", ".join(map(str, range(len(seeds[0]))))
    said = f"{dataset}, {IMAGES} training images, at initialisation, seeds {named}"
    figure.supxlabel(f"{said}: geometric mean, band from the smallest to the largest", fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--draw", action="store_true", help="draw the figure from the file, run nothing")
    options = parser.parse_args()
    if not options.draw:
        dataset = load_dataset("cifar10", options.data_dir)
        rows, made = study(dataset), environment(torch.device("cpu"))
        write_json(options.out, {"environment": made, "dataset": dataset.name, "rows": rows})
    found = json.loads(options.out.read_text(encoding="utf-8"))
    draw(found["rows"], found["dataset"], FIGURE)


if __name__ == "__main__":
    main()
