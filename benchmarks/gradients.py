"""Do gradients vanish without skips? Their size by layer at initialisation: depth x skips x norm, over seeds.

    python benchmarks/gradients.py --data-dir data/cifar10-jpeg    # a few minutes on one CPU core
    python benchmarks/gradients.py --draw                          # the figure alone, from the result file

The nets are the CIFAR ResNets of He et al. 2015; one batch of training images, no augmentation, float32. Layers of
another width have gradients of another size for that reason alone, so what is compared is the first 3x3 convolution
of a stage with the last one of the same stage: 1 is a gradient that arrives as it left, below 1 it shrank on its way.
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
from resblocks.diagnostics import gradient_flow
from resblocks.training import Dataset, load_dataset, normalise
from resblocks.training.environment import environment
from resblocks.training.files import write_json

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "gradients_cpu_2026-11.json"
FIGURE = ROOT / "docs" / "figures" / "gradients_depth.png"
DEPTHS = (20, 32, 44, 56, 110)
NORMS = {"batch norm": nn.BatchNorm2d, "no norm": None}
IMAGES = 128


def gradients(depth: int, skip: bool, norm: str, seed: int, dataset: Dataset) -> list[dict[str, Any]]:
    """Name and mean absolute gradient of each weight between input and output."""
    torch.manual_seed(seed)
    rows = torch.randperm(len(dataset.train_labels))[:IMAGES]
    net = create_model(f"resnet{depth}", skip=skip, norm=NORMS[norm], num_classes=len(dataset.classes))
    images = normalise(dataset.train_images[rows], dataset.mean, dataset.std)
    nn.functional.cross_entropy(net(images), dataset.train_labels[rows]).backward()
    return [{"name": row.name, "mean_abs": row.mean_abs} for row in gradient_flow(net)]


def passed(layers: list[dict[str, Any]], stage: int) -> float:
    """What of the gradient at the last convolution of a stage is left at the first one of the same shape."""
    # The first convolution of a later stage has fewer input channels, so the second one stands for it.
    sizes = [layer["mean_abs"] for layer in layers if layer["name"].startswith(f"stages.{stage}.")][stage > 0 :]
    return float(sizes[0] / sizes[-1])


def study(dataset: Dataset, depths: tuple[int, ...] = DEPTHS, seeds: int = 3) -> list[dict[str, Any]]:
    """All runs: per net its layers for each seed, and the fraction that passes each stage."""
    rows = []
    for depth in depths:
        for norm in NORMS:
            for skip in (True, False):
                runs = [gradients(depth, skip, norm, seed, dataset) for seed in range(seeds)]
                fractions = [statistics.geometric_mean(passed(run, stage) for run in runs) for stage in range(3)]
                rows.append({"depth": depth, "norm": norm, "skip": skip, "passed": fractions, "seeds": runs})
                print(
                    depth, norm, "with skips" if skip else "without skips", [f"{x:.2g}" for x in fractions], flush=True
                )
    return rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """What arrives at the first convolution of the first stage, against depth; the layers of the deepest nets."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for norm, colour in (("batch norm", "#0072B2"), ("no norm", "#D55E00")):
        for skip, style in ((True, "-"), (False, "--")):
            mine = [row for row in rows if (row["norm"], row["skip"]) == (norm, skip)]
            label = f"{norm}, {'with' if skip else 'without'} skips"
            depths, fractions = [row["depth"] for row in mine], [row["passed"][0] for row in mine]
            left.plot(depths, fractions, style, marker="o", markersize=4, color=colour, label=label)
            sizes = [layer["mean_abs"] for layer in mine[-1]["seeds"][0]]
            right.plot(range(1, len(sizes) + 1), [size / sizes[-2] for size in sizes], style, color=colour, lw=1.2)
    left.axhline(1, color="#999999", lw=0.8)
    left.set(title="First convolution of stage 1 over its last one", xlabel="layers", yscale="log", xticks=depths)
    left.set_ylabel("ratio of mean |gradient|")
    figure.legend(*left.get_legend_handles_labels(), frameon=False, fontsize=8, ncols=4, loc="outside upper center")
    right.set(
        title=f"{depths[-1]} layers, relative to the last convolution", xlabel="layer, the last is the classifier"
    )
    right.set(yscale="log", xticks=depths, xlim=(1 - 3, depths[-1] + 3))
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
    draw(json.loads(options.out.read_text(encoding="utf-8"))["rows"], FIGURE)


if __name__ == "__main__":
    main()
