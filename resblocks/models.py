"""The nets that have names: each name is one line of data, the call that builds it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatch
from functools import partial
from typing import Any

from resblocks.blocks import BasicBlock, Bottleneck, PreActBasicBlock, PreActBottleneck, ResNeXtBlock, WideBlock
from resblocks.checks import check_positive
from resblocks.nets import BaselineCNN, DenseNet, Network, ResNet
from resblocks.protocol import Block

Build = Callable[..., Network]

BASIC = (64, 128, 256, 512)
BOTTLENECK = (256, 512, 1024, 2048)

# Blocks in each stage, by the depth of the net (He et al. 2015, table 1).
R18, R34, R101, R152 = (2, 2, 2, 2), (3, 4, 6, 3), (3, 4, 23, 3), (3, 8, 36, 3)
R50 = R34


def basic_resnet(depths: Sequence[int], *, block: Block | Sequence[Block] = BasicBlock, **options: Any) -> Build:
    """A ResNet of basic blocks."""
    return partial(ResNet, block=block, depths=depths, widths=BASIC, **options)


def bottleneck_resnet(
    depths: Sequence[int],
    *,
    block: Block | Sequence[Block] = Bottleneck,
    widths: Sequence[int] = BOTTLENECK,
    **options: Any,
) -> Build:
    """A ResNet of bottlenecks."""
    return partial(ResNet, block=block, depths=depths, widths=widths, **options)


def resnext(depths: Sequence[int], groups: int, base_width: int, **options: Any) -> Build:
    """A ResNeXt."""
    return bottleneck_resnet(depths, block=partial(Bottleneck, groups=groups, base_width=base_width), **options)


preact_basic_resnet = partial(basic_resnet, block=PreActBasicBlock)
preact_bottleneck_resnet = partial(bottleneck_resnet, block=PreActBottleneck)


def cifar_resnet(depth: int, **options: Any) -> ResNet:
    """The CIFAR ResNet of 6n + 2 layers (He et al. 2015, sec. 4.2), with the paper's shortcut A.

    Args:
        depth: number of weighted layers: 20, 32, 44, 56, 110, 1202 in the paper.
        options: of `ResNet`; `shortcut="B"` is the variant with projections.

    Raises:
        ValueError: depth is not 6n + 2.
    """
    return small_resnet(BasicBlock, grid(depth, 6, 2), (16, 32, 64), **{"shortcut": "A", **options})


def cifar_preact_resnet(depth: int, **options: Any) -> ResNet:
    """The CIFAR pre-activation ResNet of 6n + 2 layers with basic blocks (He et al. 2016, table 3).

    Raises:
        ValueError: depth is not 6n + 2.
    """
    return small_resnet(PreActBasicBlock, grid(depth, 6, 2), (16, 32, 64), **options)


def cifar_preact_bottleneck_resnet(depth: int, **options: Any) -> ResNet:
    """The CIFAR pre-activation ResNet of 9n + 2 layers with bottlenecks (He et al. 2016, table 4).

    Raises:
        ValueError: depth is not 9n + 2.
    """
    return small_resnet(PreActBottleneck, grid(depth, 9, 2), (64, 128, 256), **options)


def wide_resnet(depth: int, widen_factor: int, **options: Any) -> ResNet:
    """The wide residual network WRN-depth-widen_factor of 6n + 4 layers (Zagoruyko and Komodakis 2016, table 1).

    Args:
        depth: number of convolutions, the projections of the three stages among them.
        widen_factor: factor on the widths 16, 32, 64, k of the paper.
        options: of `ResNet`; `dropout=0.3` is the paper's choice for CIFAR-10.

    Raises:
        ValueError: depth is not 6n + 4, widen_factor is below 1.
    """
    check_positive(widen_factor=widen_factor)
    widths = (16 * widen_factor, 32 * widen_factor, 64 * widen_factor)
    return small_resnet(WideBlock, grid(depth, 6, 4), widths, **options)


def cifar_resnext(depth: int, cardinality: int, base_width: int, **options: Any) -> ResNet:
    """The CIFAR ResNeXt of 9n + 2 layers (Xie et al. 2017, sec. 5.3).

    Raises:
        ValueError: depth is not 9n + 2.
    """
    block = partial(ResNeXtBlock, cardinality=cardinality, base_width=base_width)
    return small_resnet(block, grid(depth, 9, 2), BOTTLENECK[:3], **{"stem_width": 64, **options})


def cifar_densenet(depth: int, growth_rate: int, *, bottleneck: bool = True, **options: Any) -> DenseNet:
    """The CIFAR DenseNet of three blocks (Huang et al. 2017, sec. 3).

    Args:
        depth: 3n + 4 layers, 6n + 4 with bottlenecks.
        growth_rate: k of the paper.
        bottleneck: True is DenseNet-BC, with 1x1 convolutions and compression 0.5, False the plain DenseNet.
        options: of `DenseNet`.

    Raises:
        ValueError: depth is off that grid.
    """
    kind: dict[str, Any] = {} if bottleneck else {"bn_size": None, "compression": 1.0, "stem_width": 16}
    n = grid(depth, 6 if bottleneck else 3, 4)
    kind |= {"growth_rate": growth_rate, "depths": (n, n, n), "stem": "cifar", "num_classes": 10}
    return DenseNet(**{**kind, **options})


def small_resnet(block: Block, n: int, widths: tuple[int, ...], /, **options: Any) -> ResNet:
    """Three stages of n blocks behind the CIFAR stem, for ten classes."""
    kind = {"block": block, "depths": (n, n, n), "widths": widths, "stem": "cifar", "stem_width": 16, "num_classes": 10}
    return ResNet(**{**kind, **options})


def grid(depth: int, step: int, offset: int) -> int:
    """n for a depth of step * n + offset.

    Raises:
        ValueError: depth is not on that grid.
    """
    n, rest = divmod(depth - offset, step)
    if rest or n < 1:
        near = ", ".join(str(step * k + offset) for k in range(max(1, n), max(1, n) + 2))
        raise ValueError(f"depth must be {step}n + {offset} (nearest: {near}), got {depth}")
    return n


MODELS: dict[str, Build] = {
    "resnet18": basic_resnet(R18),
    "resnet34": basic_resnet(R34),
    "resnet50": bottleneck_resnet(R50),
    "resnet101": bottleneck_resnet(R101),
    "resnet152": bottleneck_resnet(R152),
    "resnext50_32x4d": resnext(R50, 32, 4),
    "resnext101_32x8d": resnext(R101, 32, 8),
    "resnext101_64x4d": resnext(R101, 64, 4),
    "wide_resnet50_2": bottleneck_resnet(R50, block=partial(Bottleneck, base_width=128)),
    "wide_resnet101_2": bottleneck_resnet(R101, block=partial(Bottleneck, base_width=128)),
    "preact_resnet18": preact_basic_resnet(R18),
    "preact_resnet34": preact_basic_resnet(R34),
    "preact_resnet50": preact_bottleneck_resnet(R50),
    "preact_resnet101": preact_bottleneck_resnet(R101),
    "preact_resnet152": preact_bottleneck_resnet(R152),
    "densenet121": partial(DenseNet, growth_rate=32, depths=(6, 12, 24, 16)),
    "densenet161": partial(DenseNet, growth_rate=48, depths=(6, 12, 36, 24)),
    "densenet169": partial(DenseNet, growth_rate=32, depths=(6, 12, 32, 32)),
    "densenet201": partial(DenseNet, growth_rate=32, depths=(6, 12, 48, 32)),
    "resnet20": partial(cifar_resnet, 20),
    "resnet32": partial(cifar_resnet, 32),
    "resnet44": partial(cifar_resnet, 44),
    "resnet56": partial(cifar_resnet, 56),
    "resnet110": partial(cifar_resnet, 110),
    "resnet1202": partial(cifar_resnet, 1202),
    "preact_resnet110": partial(cifar_preact_resnet, 110),
    "preact_resnet164": partial(cifar_preact_bottleneck_resnet, 164),
    "preact_resnet1001": partial(cifar_preact_bottleneck_resnet, 1001),
    "wrn_16_4": partial(wide_resnet, 16, widen_factor=4),
    "wrn_16_8": partial(wide_resnet, 16, widen_factor=8),
    "wrn_40_4": partial(wide_resnet, 40, widen_factor=4),
    "wrn_28_10": partial(wide_resnet, 28, widen_factor=10),
    "resnext29_32x4d": partial(cifar_resnext, 29, cardinality=32, base_width=4),
    "resnext29_8x64d": partial(cifar_resnext, 29, cardinality=8, base_width=64),
    "resnext29_16x64d": partial(cifar_resnext, 29, cardinality=16, base_width=64),
    "densenet_40_12": partial(cifar_densenet, 40, growth_rate=12, bottleneck=False),
    "densenet_100_12": partial(cifar_densenet, 100, growth_rate=12, bottleneck=False),
    "densenet_bc_100_12": partial(cifar_densenet, 100, growth_rate=12),
    "densenet_bc_190_40": partial(cifar_densenet, 190, growth_rate=40),
    "densenet_bc_250_24": partial(cifar_densenet, 250, growth_rate=24),
    "baseline_cnn": BaselineCNN,
    "baseline_cnn_20": partial(BaselineCNN, depths=(6, 6, 6), widths=(16, 32, 64), stem_width=16),
}


def list_models(pattern: str = "*") -> list[str]:
    """The names that match a shell pattern, in order.

    Args:
        pattern: as in a shell: "*" matches all of them.

    Example:
        >>> list_models("wrn*")
        ['wrn_16_4', 'wrn_16_8', 'wrn_28_10', 'wrn_40_4']
    """
    return sorted(name for name in MODELS if fnmatch(name, pattern))


def name_hint(name: str) -> str:
    """What to do about a name that is not in the table."""
    from resblocks.interop.names import TIMM  # which is made of this table: asked only where there is an error to tell

    if name in TIMM:
        return f"it is one of timm's: resblocks.interop.TIMM[{name!r}]() builds it"
    close = get_close_matches(str(name), MODELS, n=3)
    return f"did you mean {', '.join(close)}?" if close else "list_models() shows them all"


def create_model(name: str, **options: Any) -> Network:
    """Build the net of that name, its defaults overridden by options.

    Args:
        name: one of `list_models()`; `resblocks.interop.TIMM` has the calls for the names of timm.
        options: of the net: `ResNet`, `DenseNet` or `BaselineCNN`; `skip=False` builds the net without skips,
            `stem="cifar"` an ImageNet net for small images; `block`, `depths` and `widths` may be others, too.

    Raises:
        ValueError: a name that is not in the table; what the net raises.
        TypeError: an option that the net does not have.

    Example:
        >>> net = create_model("resnet18", stem="cifar", num_classes=10)
        >>> sum(weight.numel() for weight in net.parameters())
        11173962
    """
    if name not in MODELS:
        raise ValueError(f"name must be one of the {len(MODELS)} named nets, got {name!r}; {name_hint(name)}")
    if asked := {"pretrained", "weights"} & options.keys():
        raise TypeError(
            f"create_model draws new weights and takes no {asked.pop()}: resblocks.interop.pretrained({name!r}) "
            f"builds the net with published ones, resblocks.interop.load copies yours into it"
        )
    return MODELS[name](**options)
