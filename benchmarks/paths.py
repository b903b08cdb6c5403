"""How long are the paths that train a residual net (Veit et al. 2016, fig. 6)? Before and after training.

    python benchmarks/paths.py FOLDER ... --data-dir data/cifar10-jpeg
    python benchmarks/paths.py --draw    # the figure alone, from the result file

The folders are those of finished runs of `sweep.py`; a net of 20 to 56 layers takes a minute to ten on a core. The
gradient is that of the loss of one batch of training images, without augmentation, in training mode and float32; it is
measured at the images.
"""

from __future__ import annotations

import itertools
import json
from math import comb
from pathlib import Path
from typing import Any

from torch import nn
from trained import measure_runs, parser_of, some_images

from resblocks.diagnostics import path_gradients
from resblocks.training import Dataset, build_net, load_trained
from resblocks.training.result import title

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "paths_cpu_2026-11.json"
FIGURE = ROOT / "docs" / "figures" / "paths.png"
IMAGES = 32
TRIALS = 10


def measure(folder: Path, result: dict[str, Any], dataset: Dataset) -> dict[str, Any]:
    """The norms of the gradients of single paths by their length, before and after the training of a run."""
    images, labels = some_images(dataset, IMAGES)

    def paths(net: nn.Module) -> dict[str, list[float]]:
        found = path_gradients(
            net.train(), images, lambda logits: nn.functional.cross_entropy(logits, labels), trials=TRIALS
        )
        return {str(length): norms for length, norms in found.items()}

    start = build_net(result["name"], dataset, result["settings"]["seed"])
    return {"settings": result["settings"], "before": paths(start), "after": paths(load_trained(folder).net)}


def means(paths: dict[str, list[float]]) -> list[float]:
    """The mean norm for each length, from 0 on."""
    return [sum(norms) / len(norms) for norms in paths.values()]


def shares(paths: dict[str, list[float]]) -> list[float]:
    """What all paths of each length bring, as if their gradients pointed one way, of what all paths bring."""
    brought = [comb(len(paths) - 1, length) * mean for length, mean in enumerate(means(paths))]
    return [part / sum(brought) for part in brought]


def length_with(paths: dict[str, list[float]], share: float) -> int:
    """The length up to which paths bring that share."""
    found = shares(paths)
    return next(length for length in range(len(found)) if sum(found[: length + 1]) >= share)


def draw(found: dict[str, Any], path: Path) -> None:
    """The gradient of a path, and what all paths of a length bring, against the length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 2, figsize=(8, 5.4), layout="constrained", sharex=True, sharey="row")
    colours = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
    for (name, net), colour in zip(found["nets"].items(), itertools.cycle(colours), strict=False):
        for column, when in enumerate(("before", "after")):
            lengths, norms = list(range(len(net[when]))), list(net[when].values())
            look = {"color": colour, "marker": "o", "markersize": 3, "label": title(name)}
            panels[0][column].plot(lengths, means(net[when]), **look)
            panels[0][column].fill_between(
                lengths, list(map(min, norms)), list(map(max, norms)), color=colour, alpha=0.15, lw=0
            )
            panels[1][column].plot(lengths, [100 * share for share in shares(net[when])], **look)
    for column, when in enumerate(("at initialisation", "after the last epoch")):
        panels[0][column].set(title=f"Gradient of a path, {when}", yscale="log")
        panels[1][column].set(title="All paths of that length", xlabel="branches on the path")
    panels[0][0].set_ylabel("norm at the images")
    panels[1][0].set_ylabel("share of the sum (%)")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, ncols=len(labels), loc="outside upper center")
    said = (
        f"{found['dataset']}, {IMAGES} training images: mean of {TRIALS} paths, band from the smallest to the largest"
    )
    figure.supxlabel(said, fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    options = parser_of(__doc__, RESULTS, FIGURE).parse_args()
    if not options.draw:
        measure_runs(options, measure)
    draw(json.loads(options.out.read_text(encoding="utf-8")), options.figure)


if __name__ == "__main__":
    main()
