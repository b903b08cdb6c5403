"""The table of options in docs/options.md: each value is built, run and differentiated in every block, in 1D to 3D.

python benchmarks/report.py    # writes it
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

import resblocks as rb

BLOCKS: Mapping[str, Any] = {
    "BasicBlock": rb.BasicBlock,
    "Bottleneck": rb.Bottleneck,
    "ResNeXtBlock": partial(rb.ResNeXtBlock, cardinality=2, base_width=32),
    "PreActBasicBlock": rb.PreActBasicBlock,
    "PreActBottleneck": rb.PreActBottleneck,
    "WideBlock": rb.WideBlock,
    "DenseLayer": rb.DenseLayer,
    "DenseBlock": partial(rb.DenseBlock, growth_rate=8),
}

# option, how the value is written, the options that it stands for, its source
VALUES: list[tuple[str, str, dict[str, Any], str]] = [
    ("skip", "`False`", {"skip": False}, "He et al. 2015, plain nets"),
    ("norm", "`nn.BatchNorm2d` (default: that of `dims`)", {}, "Ioffe and Szegedy 2015"),
    ("norm", "`group_norm`", {"norm": rb.group_norm}, "Wu and He 2018"),
    ("norm", "`LayerNorm`", {"norm": rb.LayerNorm}, "Ba et al. 2016; over channels: Liu et al. 2022"),
    ("norm", "`instance_norm`", {"norm": rb.instance_norm}, "Ulyanov et al. 2016"),
    ("norm", "`FrozenBatchNorm`", {"norm": rb.FrozenBatchNorm}, "He et al. 2015, fine-tuning"),
    ("norm", "`None`", {"norm": None}, "convolutions get a bias; deep nets then want a `scale` that starts small"),
    ("activation", "any class or callable, out of place", {"activation": nn.SiLU}, ""),
    ("conv", "`weight_standardised`", {"conv": rb.weight_standardised}, "Qiao et al. 2019"),
    ("attention", "`SE`", {"attention": rb.SE}, "Hu et al. 2018"),
    ("attention", "`ECA`", {"attention": rb.ECA}, "Wang et al. 2020"),
    ("attention", "`cbam`", {"attention": rb.cbam}, "Woo et al. 2018"),
    ("dropout", "`p`", {"dropout": 0.3}, "Zagoruyko and Komodakis 2016; dense: Huang et al. 2017"),
    ("shortcut", '`"A"`', {"shortcut": "A"}, "He et al. 2015, zero padding"),
    ("shortcut", '`"B"` (default)', {"shortcut": "B"}, "He et al. 2015, projection where the shape changes"),
    ("shortcut", '`"C"`', {"shortcut": "C"}, "He et al. 2015, projection everywhere"),
    ("shortcut", '`"D"`', {"shortcut": "D"}, "He et al. 2019, average pool and projection"),
    ("downsample", "`average_downsample`", {"downsample": rb.average_downsample}, "He et al. 2019"),
    ("downsample", "`blur_downsample`", {"downsample": rb.blur_downsample}, "Zhang 2019"),
    ("drop_path", "`p`; a net's grows linearly over its blocks", {"drop_path": 0.2}, "Huang et al. 2016"),
    ("scale", "`ZeroInit`", {"scale": rb.ZeroInit}, "Goyal et al. 2017"),
    ("scale", "`SkipInit`", {"scale": rb.SkipInit}, "De and Smith 2020"),
    ("scale", "`ReZero`", {"scale": rb.ReZero}, "Bachlechner et al. 2021"),
    ("scale", "`LayerScale`", {"scale": rb.LayerScale}, "Touvron et al. 2021"),
    ("scale", "`Fixup`, with `norm=None`", {"scale": rb.Fixup, "norm": None}, "Zhang et al. 2019"),
    ("merge", "`WeightedAdd`", {"merge": rb.WeightedAdd}, "after Shen and Zeng 2016"),
    ("merge", "`gated`", {"merge": rb.gated}, "Srivastava et al. 2015"),
    ("dilation", "`n`; of a `ResNet`: `output_stride`", {"dilation": 2}, "Yu et al. 2017"),
    ("checkpoint", "`True`", {"checkpoint": True}, "Chen et al. 2016"),
    ("checkpoint", '`"norms"`', {"checkpoint": "norms"}, "norm and activation alone, as in Pleiss et al. 2017"),
]


def works(block: Any, dims: int, options: dict[str, Any]) -> bool:
    """Whether the block can be built with the options, and trains each of its parameters."""
    try:
        module = block(8, 16, dims=dims, **options)
    except ValueError:
        return False
    module(torch.randn(2, 8, *[4] * dims)).sum().backward()
    if any(parameter.grad is None for parameter in module.parameters()):
        raise RuntimeError(f"{block} with {options} in {dims}D leaves a parameter without gradient")
    return True


def works_in_all_dims(block: Any, options: dict[str, Any]) -> bool:
    """Whether the block takes the options in 1D, 2D and 3D; they must be the same to it."""
    found = {works(block, dims, options) for dims in (1, 2, 3)}
    if len(found) > 1:
        raise RuntimeError(f"{block} takes {options} in some numbers of dimensions only")
    return found.pop()


def rows() -> list[list[str]]:
    """One row a value: option, value, source, the blocks that take it."""
    return [[f"`{option}`", value, source, said(options, BLOCKS)] for option, value, options, source in VALUES]


def said(options: dict[str, Any], blocks: Mapping[str, Any]) -> str:
    """The blocks that take the options, in any number of dimensions."""
    taking = [name for name, block in blocks.items() if works_in_all_dims(block, options)]
    if len(taking) == len(blocks):
        return "all"
    refusing = [name for name in blocks if name not in taking]
    if refusing == ["DenseLayer", "DenseBlock"]:
        return "all but dense"
    return f"all but {', '.join(refusing)}" if len(refusing) < len(taking) else ", ".join(taking)
