"""Write complexity.json: what every named net must cost, from sources outside resblocks, which this file never imports.

    python tests/expected/make_complexity.py

ImageNet nets that torchvision or timm have are counted by running their own definition on the meta device. All others
are added up layer by layer from their paper; where an exact count was published, it must be the same or this stops.
MACs are of one image: those of convolutions and linear layers, bias left out (1 MAC = 2 FLOP). `macs_saved` is what
our DenseNets save of them: a transition pools before its 1x1 convolution, not after it, which gives the same result.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HE_2015 = "He et al. 2015, arXiv:1512.03385"
HE_2016 = "He et al. 2016, arXiv:1603.05027"
WIDE = "Zagoruyko and Komodakis 2016, arXiv:1605.07146"
RESNEXT = "Xie et al. 2017, arXiv:1611.05431"
DENSENET = "Huang et al. 2017, arXiv:1608.06993"
OURS = "layers of our own choice (those of the paper's baseline are not known to us)"
PYTORCHCV = "table of osmr/imgclsmob, pytorch/README.md"
PYCLS = "facebookresearch/pycls, dev/model_complexity.json"


@dataclass
class Tally:
    """Adds up parameters and multiply-accumulates of the layers of a net whose maps are size x size."""

    size: int
    params: int = 0
    macs: int = 0

    def conv(self, i: int, o: int, k: int, stride: int = 1, groups: int = 1) -> None:
        """A convolution without bias."""
        self.size = -(-self.size // stride)
        weights = i // groups * o * k * k
        self.params += weights
        self.macs += weights * self.size**2

    def projection(self, i: int, o: int, stride: int) -> None:
        """A 1x1 convolution beside the main path, so the size stays as it is for the path that follows."""
        size = self.size
        self.conv(i, o, 1, stride)
        self.size = size

    def norm(self, channels: int) -> None:
        self.params += 2 * channels

    def linear(self, i: int, o: int) -> None:
        self.params += i * o + o
        self.macs += i * o


def basic(t: Tally, i: int, o: int, stride: int, *, project: bool = True, preact: bool = False) -> None:
    """Two 3x3 convolutions; with `preact` the norms come first and the projection has none."""
    shortcut(t, i, o, stride, project=project, preact=preact)
    t.norm(i if preact else o)
    t.conv(i, o, 3, stride)
    t.norm(o)
    t.conv(o, o, 3)


def bottleneck(
    t: Tally, i: int, o: int, stride: int, *, groups: int = 1, base_width: int = 64, preact: bool = False
) -> None:
    """1x1, 3x3 with the stride, 1x1; with `preact` the norms come first and the projection has none."""
    width = o // 4 * base_width // 64 * groups
    shortcut(t, i, o, stride, project=True, preact=preact)
    t.norm(i if preact else o)
    t.conv(i, width, 1)
    t.norm(width)
    t.conv(width, width, 3, stride, groups)
    t.norm(width)
    t.conv(width, o, 1)


def shortcut(t: Tally, i: int, o: int, stride: int, *, project: bool, preact: bool) -> None:
    if project and (stride > 1 or i != o):
        t.projection(i, o, stride)
        if not preact:
            t.norm(o)


def stages(t: Tally, i: int, widths: list[int], depths: list[int], block: Callable[..., None], **options: Any) -> int:
    """Blocks of each stage; the first block of every stage but the first has stride 2. Returns the channels."""
    for number, (o, depth) in enumerate(zip(widths, depths, strict=True)):
        for position in range(depth):
            block(t, i, o, 2 if number > 0 and position == 0 else 1, **options)
            i = o
    return i


def resnet_cifar(depth: int, *, project: bool) -> Tally:
    """He et al. 2015, section 4.2: 6n + 2 layers; shortcut A has no weights, B projects where the shape changes."""
    t = Tally(32)
    t.conv(3, 16, 3)
    t.norm(16)
    t.linear(stages(t, 16, [16, 32, 64], [(depth - 2) // 6] * 3, basic, project=project), 10)
    return t


def preact_cifar(widths: list[int], blocks: int, block: Callable[..., None]) -> Tally:
    """He et al. 2016 and WRN, as the authors' code: the stem is a bare convolution, a norm comes before the head."""
    t = Tally(32)
    t.conv(3, 16, 3)
    c = stages(t, 16, widths, [blocks] * 3, block, preact=True)
    t.norm(c)
    t.linear(c, 10)
    return t


def wide(depth: int, factor: int) -> Tally:
    """Zagoruyko and Komodakis 2016, table 1: 6n + 4 layers."""
    return preact_cifar([16 * factor, 32 * factor, 64 * factor], (depth - 4) // 6, basic)


def resnext_cifar(cardinality: int, base_width: int) -> Tally:
    """Xie et al. 2017, section 5.3: 29 layers, 64 channels after the stem, three stages of three blocks."""
    t = Tally(32)
    t.conv(3, 64, 3)
    t.norm(64)
    t.linear(stages(t, 64, [256, 512, 1024], [3] * 3, bottleneck, groups=cardinality, base_width=base_width), 10)
    return t


def densenet_cifar(depth: int, growth_rate: int, *, bc: bool) -> Tally:
    """Huang et al. 2017, section 3: three blocks; the stem has 16 channels, with bottleneck and compression 2k."""
    t = Tally(32)
    c = 2 * growth_rate if bc else 16
    t.conv(3, c, 3)
    for block in range(3):
        for _ in range((depth - 4) // (6 if bc else 3)):
            t.norm(c)
            if bc:
                t.conv(c, 4 * growth_rate, 1)
                t.norm(4 * growth_rate)
            t.conv(4 * growth_rate if bc else c, growth_rate, 3)
            c += growth_rate
        t.norm(c)  # of the transition, or before the head
        if block < 2:
            reduced = c // 2 if bc else c
            t.conv(c, reduced, 1)
            t.size //= 2
            c = reduced
    t.linear(c, 10)
    return t


def resnet_small_images(*, skip: bool) -> Tally:
    """ResNet-18 with a 3x3 stem of stride 1 and no pool, for 32x32 images; without skips, no projection either."""
    t = Tally(32)
    t.conv(3, 64, 3)
    t.norm(64)
    t.linear(stages(t, 64, [64, 128, 256, 512], [2] * 4, basic, project=skip), 10)
    return t


def transition_savings(growth_rate: int, depths: list[int], *, stem: int, size: int, theta: float) -> int:
    """MACs that a DenseNet saves where a 2x2 pool comes before the 1x1 convolution of each transition."""
    c, saved = stem, 0
    for depth in depths[:-1]:
        c += depth * growth_rate
        saved += c * int(c * theta) * size**2 * 3 // 4
        c, size = int(c * theta), size // 2
    return saved


def baseline(depths: list[int], widths: list[int]) -> Tally:
    """A stem and stages of 3x3 convolutions with bias, 2x2 pools between the stages; no norm, no skip."""
    t = Tally(32)
    i = 3
    for stage, (depth, o) in enumerate(zip(depths, widths, strict=True)):
        for _ in range(depth + 1 if stage == 0 else depth):
            t.conv(i, o, 3)
            t.params += o
            i = o
        t.size //= 2
    t.linear(i, 10)
    return t


def reference(make: Callable[..., Any], name: str) -> Tally:
    """The net of another library at 224x224, run on the meta device."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), torch.no_grad():
        net = make(name).eval()
        with FlopCounterMode(display=False) as counter:
            net(torch.empty(1, 3, 224, 224))
    return Tally(224, sum(p.numel() for p in net.parameters()), counter.get_total_flops() // 2)


def entry(
    name: str,
    tally: Tally,
    source: str,
    *,
    options: dict[str, Any] | None = None,
    paper_millions: str | None = None,
    published: int | None = None,
    published_in: str | None = None,
    note: str | None = None,
    saved: int | None = None,
    image: int = 32,
) -> dict[str, Any]:
    """One net: `published` is somebody else's exact count, `paper_millions` the paper's figure as it is printed."""
    if published is not None and published != tally.params:
        raise ValueError(
            f"{name}: {published_in} says {published} parameters, the paper's layers add up to {tally.params}"
        )
    row = {
        "name": name,
        "options": options or {},
        "input_size": [3, image, image],
        "params": tally.params,
        "params_paper_millions": paper_millions,
        "macs": tally.macs,
        "macs_saved": saved,
        "source": source if published_in is None else f"{source}; the same count in {published_in}",
        "note": note,
    }
    return {key: value for key, value in row.items() if value is not None}


def entries() -> list[dict[str, Any]]:
    import timm
    import torchvision

    rows = []
    for name in (
        *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
        *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2"),
    ):
        source = f"torchvision {torchvision.__version__.split('+')[0]}, {name}"
        rows.append(entry(name, reference(torchvision.models.get_model, name), source, image=224))
    for name, growth_rate, depths in (
        ("densenet121", 32, [6, 12, 24, 16]),
        ("densenet161", 48, [6, 12, 36, 24]),
        ("densenet169", 32, [6, 12, 32, 32]),
        ("densenet201", 32, [6, 12, 48, 32]),
    ):
        source = f"torchvision {torchvision.__version__.split('+')[0]}, {name}"
        saved = transition_savings(growth_rate, depths, stem=2 * growth_rate, size=56, theta=0.5)
        rows.append(entry(name, reference(torchvision.models.get_model, name), source, saved=saved, image=224))
    for depth in (18, 34, 50, 101, 152):
        name = f"resnetv2_{depth}"
        # pytorchcv has 128 parameters more: a norm after the stem and the first unit's own, one after the other.
        source = f"{HE_2016}; timm {timm.__version__}, {name}"
        rows.append(entry(f"preact_resnet{depth}", reference(timm.create_model, name), source, image=224))

    for depth, millions in ((20, "0.27"), (32, "0.46"), (44, "0.66"), (56, "0.85"), (110, "1.7"), (1202, "19.4")):
        tally = resnet_cifar(depth, project=False)
        rows.append(entry(f"resnet{depth}", tally, f"{HE_2015}, table 6, shortcut A", paper_millions=millions))
    for depth in (20, 56):
        source = f"{HE_2015}, table 6: shortcut A adds no parameters to the plain net"
        rows.append(entry(f"resnet{depth}", resnet_cifar(depth, project=False), source, options={"skip": False}))
    for depth, published, where in ((20, 272_474, PYTORCHCV), (56, 855_770, PYCLS), (110, 1_730_714, PYCLS)):
        tally, option = resnet_cifar(depth, project=True), {"shortcut": "B"}
        source = f"{HE_2015}, section 4.2 with shortcut B"
        rows.append(entry(f"resnet{depth}", tally, source, options=option, published=published, published_in=where))

    tally = preact_cifar([16, 32, 64], 18, basic)
    source = f"{HE_2016}, table 3"
    rows.append(
        entry("preact_resnet110", tally, source, paper_millions="1.7", published=1_730_522, published_in=PYTORCHCV)
    )
    tally = preact_cifar([64, 128, 256], 18, bottleneck)
    source = f"{HE_2016}, table 4"
    rows.append(
        entry("preact_resnet164", tally, source, paper_millions="1.7", published=1_703_258, published_in=PYTORCHCV)
    )
    tally = preact_cifar([64, 128, 256], 111, bottleneck)
    note = "the paper's figure leaves the parameters of the norms out (10,178,490 without them)"
    rows.append(entry("preact_resnet1001", tally, source, paper_millions="10.2", note=note))

    rows.append(entry("wrn_16_4", wide(16, 4), WIDE, paper_millions="2.7"))
    rows.append(entry("wrn_16_8", wide(16, 8), WIDE, paper_millions="11.0"))
    rows.append(entry("wrn_40_4", wide(40, 4), WIDE, paper_millions="8.9"))
    wrn = wide(28, 10)
    rows.append(entry("wrn_28_10", wrn, WIDE, paper_millions="36.5", published=36_479_194, published_in=PYTORCHCV))

    tally, source = resnext_cifar(32, 4), f"{RESNEXT}, section 5.3, in a size that osmr/imgclsmob trained"
    rows.append(entry("resnext29_32x4d", tally, source, published=4_775_754, published_in=PYTORCHCV))
    source = f"{RESNEXT}, table 7"
    rows.append(entry("resnext29_8x64d", resnext_cifar(8, 64), source, paper_millions="34.4"))
    tally = resnext_cifar(16, 64)
    rows.append(
        entry("resnext29_16x64d", tally, source, paper_millions="68.1", published=68_155_210, published_in=PYTORCHCV)
    )

    source = f"{DENSENET}, table 2"
    for depth, growth_rate, bc, millions in (
        (40, 12, False, "1.0"),
        (100, 12, False, "7.0"),
        (100, 12, True, "0.8"),
        (190, 40, True, "25.6"),
        (250, 24, True, "15.3"),
    ):
        name = f"densenet_{'bc_' if bc else ''}{depth}_{growth_rate}"
        published = {"published": 769_162, "published_in": PYTORCHCV} if name == "densenet_bc_100_12" else {}
        saved = transition_savings(
            growth_rate,
            [(depth - 4) // (6 if bc else 3)] * 3,
            stem=2 * growth_rate if bc else 16,
            size=32,
            theta=0.5 if bc else 1,
        )
        tally = densenet_cifar(depth, growth_rate, bc=bc)
        rows.append(entry(name, tally, source, paper_millions=millions, saved=saved, **published))

    source = "ResNet-18 for CIFAR-10; arXiv:2510.24036, after a report that quotes it"
    cifar = {"stem": "cifar", "num_classes": 10}
    rows.append(entry("resnet18", resnet_small_images(skip=True), source, options=cifar, paper_millions="11.2"))
    plain = {**cifar, "skip": False}
    rows.append(entry("resnet18", resnet_small_images(skip=False), source, options=plain, paper_millions="11.0"))
    rows.append(entry("baseline_cnn", baseline([4, 4, 4, 4], [64, 128, 256, 512]), OURS))
    rows.append(entry("baseline_cnn_20", baseline([6, 6, 6], [16, 32, 64]), OURS))
    return rows


def main() -> None:
    path = Path(__file__).with_name("complexity.json")
    about = " ".join(__doc__.split("\n\n")[2].split())
    nets = ",\n".join(f"    {json.dumps(row)}" for row in entries())
    path.write_text(f'{{\n  "about": {json.dumps(about)},\n  "nets": [\n{nets}\n  ]\n}}\n')


if __name__ == "__main__":
    main()
