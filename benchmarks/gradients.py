"""Do gradients vanish without skips? Their size by layer at initialisation: depth x skips x norm, over seeds.

    python benchmarks/gradients.py --data-dir data/cifar10-jpeg    # a few minutes on one CPU core

The nets are the CIFAR ResNets of He et al. 2015; one batch of training images, no augmentation, float32. Layers of
another width have gradients of another size for that reason alone, so what is compared is the first 3x3 convolution
of a stage with the last one of the same stage: 1 is a gradient that arrives as it left, below 1 it shrank on its way.
"""

from __future__ import annotations

import argparse
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

RESULTS = Path(__file__).resolve().parent / "results" / "gradients_cpu_2026-11.json"
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    dataset = load_dataset("cifar10", options.data_dir)
    rows = study(dataset)
    write_json(options.out, {"environment": environment(torch.device("cpu")), "dataset": dataset.name, "rows": rows})


if __name__ == "__main__":
    main()
