"""Is the loss around a trained net smooth with skips and rugged without (Li et al. 2018)? On a plane of the weights.

    python benchmarks/landscape.py FOLDER ... --data-dir data/cifar10-jpeg
    python benchmarks/landscape.py --draw    # the figure alone, from the result file

The folders are those of finished runs of `sweep.py`; a net of 20 to 56 layers takes 3 to 9 minutes on a core. Each is
measured on the same training images, without augmentation, in evaluation mode and float32. A net that the file has
already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from trained import result_of, some_images

from resblocks.diagnostics import loss_surface
from resblocks.training import Dataset, draw_surfaces, load_dataset, load_trained
from resblocks.training.environment import environment
from resblocks.training.files import write_json
from resblocks.training.result import title

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "landscape_cpu_2026-11.json"
FIGURES = ROOT / "docs" / "figures"
IMAGES = 300
STEPS = 21


def measure(
    folder: Path, settings: dict[str, Any], dataset: Dataset, steps: list[float], images: int
) -> dict[str, Any]:
    """The loss of a finished run's net on the grid, row by row along the first direction, and how it was trained."""
    pixels, labels = some_images(dataset, images)
    pixels = pixels.to(memory_format=torch.channels_last)
    batches = list(zip(pixels.split(100), labels.split(100), strict=True))
    net, start = load_trained(folder).net.to(memory_format=torch.channels_last), time.perf_counter()
    surface = loss_surface(net, lambda net: mean_loss(net, batches), steps)
    return {
        "settings": settings,
        "losses": [[finite(surface[one, other]) for other in steps] for one in steps],
        "seconds": time.perf_counter() - start,
    }


def finite(loss: float) -> float | None:
    """JSON has no other numbers."""
    return loss if math.isfinite(loss) else None


def mean_loss(net: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    """Cross-entropy over all images."""
    losses = [nn.functional.cross_entropy(net(images), labels, reduction="sum") for images, labels in batches]
    return float(sum(losses)) / sum(len(labels) for _, labels in batches)


def surface_of(found: dict[str, Any], name: str) -> dict[tuple[float, float], float]:
    """What `loss_surface` returned for a net."""
    losses = [math.inf if loss is None else loss for row in found["nets"][name]["losses"] for loss in row]
    return dict(zip(product(found["steps"], repeat=2), losses, strict=True))


def in_order(found: dict[str, Any]) -> list[str]:
    """The names of the nets, those without skips behind."""
    return sorted(found["nets"], key=lambda name: (name.endswith("_noskip"), len(name), name))


def ring(found: dict[str, Any], name: str, distance: float) -> list[float]:
    """The losses of a net on the square that is so far from it."""
    around = surface_of(found, name)
    return [loss for (one, other), loss in around.items() if max(abs(one), abs(other)) == distance]


def minima(found: dict[str, Any], name: str) -> int:
    """How many points inside the grid lie below all eight around them: one, where the plane is a bowl."""
    losses, steps = surface_of(found, name), found["steps"]
    squares = product(zip(steps, steps[1:], steps[2:], strict=False), repeat=2)  # of nine points
    return sum(
        losses[xs[1], ys[1]] < min(losses[point] for point in product(xs, ys) if point != (xs[1], ys[1]))
        for xs, ys in squares
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--figures", type=Path, default=FIGURES)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--steps", type=int, default=STEPS, help="points along each direction, from -1 to 1")
    parser.add_argument("--draw", action="store_true", help="draw the figure from the file, run nothing")
    options = parser.parse_args()
    steps = [round(step, 4) for step in torch.linspace(-1, 1, options.steps).tolist()]
    asked = {"dataset": "cifar10", "images": options.images, "steps": steps}
    found = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
    if not options.draw:
        if found and {key: found[key] for key in asked} != asked:
            raise SystemExit(f"error: {options.out} has other images or steps; give another --out")
        if not found:
            found = {**asked, "environment": environment(torch.device("cpu")), "nets": {}}
        dataset = load_dataset("cifar10", options.data_dir)
        for folder in options.folders:
            result = result_of(folder, dataset)
            name = result["name"]
            if name not in found["nets"]:
                found["nets"][name] = measure(folder, result["settings"], dataset, steps, options.images)
                write_json(options.out, found)
                print(f"{name}: {found['nets'][name]['seconds']:.0f} s", flush=True)
    draw_surfaces({title(name): surface_of(found, name) for name in in_order(found)}, options.figures)


if __name__ == "__main__":
    main()
