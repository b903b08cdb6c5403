"""What stands before the first stage: the stems that have names, those of one's own, and by how much they reduce."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any, cast

from torch import nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd, _MaxUnpoolNd

from resblocks.checks import check_positive
from resblocks.layers import Family, Layer, Stride, max_pool, named, one_stride, times
from resblocks.options import Layers

Stem = str | Callable[[int, int], nn.Module]
STEMS = ("imagenet", "cifar", "deep", "tiered")

# Layers that change the resolution by something else than a stride.
UNCOUNTED = (
    *(_AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d),
    *(nn.Upsample, nn.PixelShuffle),
)


def make_stem(
    make: Layers, stem: Stem, in_channels: int, width: int, pool: Layer | Family | None, *, activated: bool
) -> tuple[nn.Module, Stride]:
    """The stem and its total stride; without `activated` its last norm and activation are left to the first block."""
    check_positive(in_channels=in_channels, stem_width=width)
    if pool is not None and (callable(stem) or stem == "cifar"):
        raise ValueError(f"stem_pool must be None unless the stem has a pool to replace, got stem={stem!r}")
    if callable(stem):
        module = make.build(stem, in_channels, width, option="stem")
        return module, total_stride(module)
    if stem not in STEMS:
        raise ValueError(f"stem must be one of {', '.join(STEMS)} or a callable, got {stem!r}")
    last = {"norm": make.norm(width), "act": make.activation()} if activated else {}
    if stem == "cifar":
        return named(conv=make.conv(in_channels, width, 3), **last), 1
    if pool is None:
        pooled = make.build(max_pool, 3, stride=2, padding=1)
    else:
        pooled = make.pooling(pool, width, 2, "stem_pool")
    total = 2 if isinstance(pooled, nn.Identity) else 4  # any other pool is made for a stride of 2
    if stem == "imagenet":
        return named(conv=make.conv(in_channels, width, 7, 2), **last, pool=pooled), total
    half = max(1, width // 2)
    first = half if stem == "deep" else max(1, half * 3 // 4)
    return named(
        conv1=make.conv(in_channels, first, 3, 2),
        norm1=make.norm(first),
        act1=make.activation(),
        conv2=make.conv(first, half, 3),
        norm2=make.norm(half),
        act2=make.activation(),
        conv=make.conv(half, width, 3),
        **last,
        pool=pooled,
    ), total


def total_stride(stem: nn.Module) -> Stride:
    """Pixels of the input for one that the stem puts out: its attribute `stride`, or the product over a sequence.

    Raises:
        ValueError: they cannot be counted.
    """
    if isinstance(stem, (_ConvTransposeNd, _MaxUnpoolNd)):
        raise uncounted("a transposed layer enlarges the map", stem)
    if hasattr(stem, "stride"):
        told: Any = stem.stride
        stride = getattr(stem, "kernel_size", None) if told is None else told  # as torch's pools read None
        if stride is None:
            raise uncounted("its attribute stride is None", stem)
        return one_stride(stride)
    if isinstance(stem, nn.PixelUnshuffle):
        return stem.downscale_factor
    if isinstance(stem, UNCOUNTED):
        raise uncounted("its layers have no stride that counts", stem)
    if isinstance(stem, nn.Sequential):
        return reduce(times, map(total_stride, stem), cast(Stride, 1))
    if any(total_stride(layer) != 1 for layer in stem.children()):
        raise uncounted("it holds strided layers", stem)
    return 1


def uncounted(why: str, stem: nn.Module) -> ValueError:
    """What to raise of a stem, or a layer of one, whose total stride is not known."""
    return ValueError(f"stem must have an attribute stride, its total one, since {why}, got {stem}")
