"""Do gradients shatter without skips (Balduzzi et al. 2017)? How alike they are at images that lie close together.

    python benchmarks/shattering.py FOLDER ... --data-dir data/cifar10-jpeg
    python benchmarks/shattering.py --draw    # the figure alone, from the result file

The CIFAR ResNets of He et al. 2015 at initialisation, over depths and seeds, and with 56 layers in other variants, half
an hour on a core; and the trained nets of the folders, those of finished runs of `sweep.py`, a minute each. The loss is
that of one batch of training images, without augmentation, in training mode and float64. Each image moves towards
another one, and its gradient is compared with the one where it was.
"""

from __future__ import annotations

import json
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn
from trained import parser_of, result_of, some_images

from resblocks.diagnostics import gradient_correlation
from resblocks.joins import LayerScale, ZeroInit
from resblocks.layers import group_norm
from resblocks.models import cifar_preact_resnet, cifar_resnet
from resblocks.training import Dataset, load_dataset, load_trained
from resblocks.training.environment import environment
from resblocks.training.files import write_json

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "shattering_cpu_2026-11.json"
FIGURE = ROOT / "docs" / "figures" / "shattering.png"
DEPTHS = (20, 32, 44, 56, 110)
SEEDS = 3
IMAGES = 32
STEPS = [10 ** (power / 2) for power in range(-14, 1)]
COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00")
PLAIN = " without skips"
VARIANTS = {
    "pre-activation": partial(cifar_preact_resnet, 56),
    "group norm": partial(cifar_resnet, 56, norm=group_norm),
    f"group norm,{PLAIN}": partial(cifar_resnet, 56, norm=group_norm, skip=False),
    "leaky ReLU, slope 0.2": partial(cifar_resnet, 56, activation=partial(nn.LeakyReLU, 0.2)),
    "GELU": partial(cifar_resnet, 56, activation=nn.GELU),
    "branches times 0.3": partial(cifar_resnet, 56, scale=partial(LayerScale, initial=0.3)),
    "branches times 0.1": partial(cifar_resnet, 56, scale=partial(LayerScale, initial=0.1)),
    "ZeroInit": partial(cifar_resnet, 56, scale=ZeroInit),
    "no norm, branches times 0.1": partial(cifar_resnet, 56, norm=None, scale=partial(LayerScale, initial=0.1)),
}
NETS = {
    **{
        f"ResNet-{depth}{PLAIN * (not skip)}": partial(cifar_resnet, depth, skip=skip)
        for skip in (True, False)
        for depth in DEPTHS
    },
    **{f"ResNet-56, {change}": build for change, build in VARIANTS.items()},
}


def correlation(net: nn.Module, dataset: Dataset) -> list[float]:
    """The mean cosine over the images for each of STEPS."""
    images, labels = some_images(dataset, 2 * IMAGES)
    x, towards = images.double().split(IMAGES)
    found = gradient_correlation(
        net.double().train(), x, towards, STEPS, lambda logits: nn.functional.cross_entropy(logits, labels[:IMAGES])
    )
    return [fmean(cosines) for cosines in found.values()]


def at_start(build: Any, seed: int, dataset: Dataset) -> list[float]:
    """Of a net that was not trained."""
    torch.manual_seed(seed)
    return correlation(build(num_classes=len(dataset.classes)), dataset)


def half(cosines: list[float]) -> float:
    """The step at which the cosine falls to a half, on a line between the two of STEPS beside it; 1 if it does not."""
    for (near, above), (far, below) in pairwise(zip(STEPS, cosines, strict=True)):
        if above >= 0.5 > below:
            return near * (far / near) ** ((above - 0.5) / (above - below))
    return 1.0 if cosines[0] >= 0.5 else 0.0


def draw(found: dict[str, Any], path: Path) -> None:
    """Cosine against step: over the depths at initialisation, and the trained nets."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (start, end) = pyplot.subplots(1, 2, figsize=(9, 3.8), layout="constrained", sharey=True)
    start.set(title="At initialisation", ylabel="cosine of the gradients")
    end.set(title="After ten epochs")
    for depth, colour in zip(DEPTHS, COLOURS, strict=True):
        for skip, style in ((True, "-"), (False, "--")):
            seeds = found["start"][f"ResNet-{depth}{PLAIN * (not skip)}"]
            look = {"color": colour, "linestyle": style, "label": f"{depth} layers" if skip else None}
            start.plot(STEPS, [fmean(cosines) for cosines in zip(*seeds, strict=True)], **look)
            name = f"resnet{depth}{'' if skip else '_noskip'}"
            if name in found["trained"]:
                end.plot(STEPS, found["trained"][name]["correlation"], **look)
    start.plot([], [], color="#333333", linestyle="-", label="with skips")
    start.plot([], [], color="#333333", linestyle="--", label="without skips")
    for axes in (start, end):
        axes.set(xscale="log", xlabel="part of the way to another image")
        axes.axhline(0, color="#999999", lw=0.8)
    figure.legend(*start.get_legend_handles_labels(), frameon=False, fontsize=8, ncols=7, loc="outside upper center")
    said = f"{found['dataset']}, mean of {IMAGES} training images, at initialisation of {SEEDS} seeds"
    figure.supxlabel(said, fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    options = parser_of(__doc__, RESULTS, FIGURE).parse_args()
    if not options.draw:
        dataset = load_dataset("cifar10", options.data_dir)
        about = {"dataset": dataset.name, "images": IMAGES, "steps": STEPS}
        found: dict[str, Any] = {"environment": environment(torch.device("cpu")), **about, "start": {}, "trained": {}}
        for folder in options.folders:
            result = result_of(folder, dataset)
            cosines = correlation(load_trained(folder).net, dataset)
            found["trained"][result["name"]] = {"settings": result["settings"], "correlation": cosines}
            print(result["name"], half(cosines), flush=True)
        for name, build in NETS.items():
            found["start"][name] = [at_start(build, seed, dataset) for seed in range(SEEDS)]
            print(name, [half(cosines) for cosines in found["start"][name]], flush=True)
            write_json(options.out, found)
    draw(json.loads(options.out.read_text(encoding="utf-8")), options.figure)


if __name__ == "__main__":
    main()
