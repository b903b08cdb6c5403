"""What torchvision and timm call our layers: tables of names, and the reading of them in both directions.

A table gives for our name of a layer its name elsewhere. A field in braces is a number that both names share:
`{s}` the stage, `{b}` the block, `{n}` the number of a layer; `{s+1}` is one more, where the other counts from 1.
A vocabulary is a few tables, since one library names its families differently; the one to use is the first with a
name for every layer of the net.
"""

from __future__ import annotations

import re
from functools import cache

from torch import Tensor, nn

Table = dict[str, str]

_RESNET: Table = {
    "stem.norm": "bn1",
    "stages.{s}.{b}.branch.conv{n}": "layer{s+1}.{b}.conv{n}",
    "stages.{s}.{b}.branch.norm{n}": "layer{s+1}.{b}.bn{n}",
    "head": "fc",
}
_PLAIN_STEM: Table = {"stem.conv": "conv1"}
_DEEP_STEM: Table = {
    "stem.conv1": "conv1.0",
    "stem.norm1": "conv1.1",
    "stem.conv2": "conv1.3",
    "stem.norm2": "conv1.4",
    "stem.conv": "conv1.6",
    "stem.pool.conv": "maxpool.0",
    "stem.pool.norm": "maxpool.1",
}
_PROJECTION: Table = {
    "stages.{s}.{b}.shortcut.conv": "layer{s+1}.{b}.downsample.0",
    "stages.{s}.{b}.shortcut.norm": "layer{s+1}.{b}.downsample.1",
}
_POOLED_PROJECTION: Table = {
    "stages.{s}.{b}.shortcut.pool": "layer{s+1}.{b}.downsample.0",
    "stages.{s}.{b}.shortcut.conv": "layer{s+1}.{b}.downsample.1",
    "stages.{s}.{b}.shortcut.norm": "layer{s+1}.{b}.downsample.2",
}
_ATTENTION: Table = {
    "stages.{s}.{b}.branch.attention.reduce": "layer{s+1}.{b}.se.fc1",
    "stages.{s}.{b}.branch.attention.expand": "layer{s+1}.{b}.se.fc2",
    "stages.{s}.{b}.branch.attention": "layer{s+1}.{b}.se.conv",
}
_PREACT_RESNET: Table = {
    "stem.conv": "stem.conv",
    "stages.{s}.{b}.preact.norm{n}": "stages.{s}.blocks.{b}.norm{n}",
    "stages.{s}.{b}.branch.norm{n}": "stages.{s}.blocks.{b}.norm{n}",
    "stages.{s}.{b}.branch.conv{n}": "stages.{s}.blocks.{b}.conv{n}",
    "stages.{s}.{b}.shortcut.pool": "stages.{s}.blocks.{b}.downsample.pool",
    "stages.{s}.{b}.shortcut.conv": "stages.{s}.blocks.{b}.downsample.conv",
    "final.norm": "norm",
    "head": "head.fc",
}
_DEEP_PREACT_RESNET: Table = {
    **_PREACT_RESNET,
    "stem.conv{n}": "stem.conv{n}",
    "stem.norm{n}": "stem.norm{n}",
    "stem.conv": "stem.conv3",
}
_DENSENET: Table = {
    "stem.conv": "features.conv0",
    "stem.norm": "features.norm0",
    "stages.{s}.block.layer{n}.branch.conv{m}": "features.denseblock{s+1}.denselayer{n}.conv{m}",
    "stages.{s}.block.layer{n}.branch.norm{m}": "features.denseblock{s+1}.denselayer{n}.norm{m}",
    "stages.{s}.transition.conv": "features.transition{s}.conv",
    "stages.{s}.transition.norm": "features.transition{s}.norm",
    "final.norm": "features.norm5",
    "head": "classifier",
}
_DEEP_DENSENET: Table = {
    **_DENSENET,
    "stem.conv1": "features.conv0",
    "stem.norm1": "features.norm0",
    "stem.conv2": "features.conv1",
    "stem.norm2": "features.norm1",
    "stem.conv": "features.conv2",
    "stem.norm": "features.norm2",
}

VOCABULARIES: dict[str, tuple[Table, ...]] = {
    "torchvision": (_RESNET | _PLAIN_STEM | _PROJECTION, _DENSENET),
    "timm": (
        _RESNET | _PLAIN_STEM | _PROJECTION | _ATTENTION,
        _RESNET | _PLAIN_STEM | _POOLED_PROJECTION | _ATTENTION,
        _RESNET | _DEEP_STEM | _PROJECTION | _ATTENTION,
        _RESNET | _DEEP_STEM | _POOLED_PROJECTION | _ATTENTION,
        _PREACT_RESNET,
        _DEEP_PREACT_RESNET,
        _DENSENET,
        _DEEP_DENSENET,
    ),
}

# Linear layers of ours that are 1x1 convolutions elsewhere.
_POINTWISE = re.compile(r"(.*\.se\.fc[12]|head\.fc)\.weight")
_FIELD = re.compile(r"\{(\w)(\+1)?\}")


def key_map(net: nn.Module, table: Table, *, head: bool = True, partial: bool = False) -> dict[str, str] | None:
    """For each key of the net's state dict, that of the head on request, its name by the table.

    None if the table misses a layer; with `partial` that layer is left out.
    """
    if not partial and nameless_layers(net, table, head=head):
        return None
    names = {key: translate_key(key, table) for key in keys(net, head=head)}
    return {key: name for key, name in names.items() if name is not None}


def keys(net: nn.Module, *, head: bool) -> list[str]:
    """The keys of the net's state dict, with or without those of its head."""
    return [key for key in net.state_dict() if head or not key.startswith("head.")]


def nameless_layers(net: nn.Module, table: Table, *, head: bool = True) -> list[str]:
    """The layers of the net for which the table has no name.

    The pool of a shortcut counts as a layer, although it has no weights: it moves the numbers of those behind it.
    """
    layers = dict.fromkeys(key.rpartition(".")[0] for key in keys(net, head=head))
    pools = [name for name, _ in net.named_modules() if name.endswith(".shortcut.pool")]
    return [name for name in (*layers, *pools) if translate(name, table) is None]


def translate_key(key: str, table: Table) -> str | None:
    """The name of one entry of a state dict by the table, None if it has none."""
    layer, _, entry = key.rpartition(".")
    name = translate(layer, table)
    return None if name is None else f"{name}.{entry}"


def translate(layer: str, table: Table) -> str | None:
    """The name of a layer by the table, None if it has none."""
    for template, other in table.items():
        match = _pattern(template).fullmatch(layer)
        if match:
            numbers = {field: int(number) for field, number in match.groupdict().items()}
            for field, one_more in _FIELD.findall(template):
                numbers[field] -= bool(one_more)
            return _FIELD.sub(lambda field: str(numbers[field[1]] + bool(field[2])), other)  # noqa: B023
    return None


def reversed_table(table: Table) -> Table:
    """The same names, read the other way."""
    return {other: template for template, other in table.items()}


def as_theirs(key: str, tensor: Tensor) -> Tensor:
    """Our tensor in the shape that it has under their key."""
    return tensor[:, :, None, None] if _POINTWISE.fullmatch(key) and tensor.dim() == 2 else tensor


@cache
def _pattern(template: str) -> re.Pattern[str]:
    literals = _FIELD.split(template)[::3]
    fields = [f"(?P<{field}>\\d+)" for field, _ in _FIELD.findall(template)]
    return re.compile(
        "".join(re.escape(literal) + field for literal, field in zip(literals, [*fields, ""], strict=True))
    )
