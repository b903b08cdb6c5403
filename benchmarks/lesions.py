"""What trained nets lose without some of their blocks (Veit et al. 2016, fig. 3 and 5a), with skips and without.

    python benchmarks/lesions.py FOLDER ... --data-dir data/cifar10-jpeg
    python benchmarks/lesions.py --draw    # the figure alone, from the result file

The folders are those of finished runs of `sweep.py`; a net of 20 to 56 layers takes one to ten minutes on a core. A
block is taken out by handing its input on, so those that change the shape stay; behind a block that ends in a ReLU, as
these do, that is the shortcut without the branch. Accuracy is that on some of the test images.
"""

from __future__ import annotations

import json
from itertools import cycle
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from trained import measure_runs, parser_of, some_test_images

from resblocks.diagnostics import lesion_curve, lesion_study
from resblocks.training import Dataset, load_trained
from resblocks.training.result import title

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "lesions_cpu_2026-11.json"
FIGURE = ROOT / "docs" / "figures" / "lesions.png"
IMAGES = 1000
COUNTS = (0, 1, 2, 3, 5, 8, 13, 21, 34)  # of blocks that go at once
TRIALS = 10


def measure(folder: Path, result: dict[str, Any], dataset: Dataset) -> dict[str, Any]:
    """Accuracy in percent without each block, and without several drawn at random."""
    images, labels = some_test_images(dataset, IMAGES)
    images = images.contiguous(memory_format=torch.channels_last)
    net = load_trained(folder).net.to(memory_format=torch.channels_last)

    def accuracy(net: nn.Module) -> float:
        return 100 * int((logits(net, images).argmax(1) == labels).sum()) / len(labels)

    study = lesion_study(net, accuracy, part="block")
    single = {lesion.name: lesion.metric for lesion in study.lesions}
    counts = [count for count in COUNTS if count <= len(single)]
    curve = lesion_curve(net, accuracy, counts, trials=TRIALS, part="block")
    return {"settings": result["settings"], "intact": study.intact, "single": single, "several": curve}


def logits(net: nn.Module, images: Tensor) -> Tensor:
    """In batches that stay in a cache."""
    return torch.cat([net(batch) for batch in images.split(100)])


def draw(found: dict[str, Any], path: Path) -> None:
    """Accuracy without each single block, and against the number of blocks that are gone."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (one, several) = pyplot.subplots(1, 2, figsize=(9, 3.8), layout="constrained", sharey=True)
    depths = dict.fromkeys(map(with_skips, found["nets"]))
    colours = dict(zip(depths, cycle(("#0072B2", "#D55E00", "#009E73", "#CC79A7")), strict=False))
    for name, net in found["nets"].items():
        look = {"color": colours[with_skips(name)], "linestyle": "-" if name == with_skips(name) else "--"}
        single, curve = list(net["single"].values()), net["several"]
        depth = [(index + 1) / len(single) for index in range(len(single))]
        one.plot(depth, single, label=title(name), marker="o", markersize=3, **look)
        counts, metrics = list(map(int, curve)), curve.values()
        several.plot(counts, list(map(fmean, metrics)), marker="o", markersize=3, **look)
        spread = list(map(min, metrics)), list(map(max, metrics))
        several.fill_between(counts, *spread, color=look["color"], alpha=0.12, lw=0)
    one.set(title="Without one block", xlabel="where in the net it was", ylabel="test accuracy (%)")
    several.set(title="Without several", xlabel="blocks gone, drawn at random")
    for axes in (one, several):
        axes.axhline(10, color="#999999", lw=0.8, linestyle=":")
    figure.legend(*one.get_legend_handles_labels(), frameon=False, fontsize=8, ncols=4, loc="outside upper center")
    said = f"{found['dataset']}, {IMAGES} test images; right: mean of {TRIALS} draws, band from the least to the most"
    figure.supxlabel(said, fontsize=8)
    figure.savefig(path, dpi=150)


def with_skips(name: str) -> str:
    """The name of the same net with skips, which shares its colour."""
    return name.removesuffix("_noskip")


def main() -> None:
    options = parser_of(__doc__, RESULTS, FIGURE).parse_args()
    if not options.draw:
        measure_runs(options, measure)
    draw(json.loads(options.out.read_text(encoding="utf-8")), options.figure)


if __name__ == "__main__":
    main()
