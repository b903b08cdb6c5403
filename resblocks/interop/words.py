"""Tables of names: how they are read, in both directions.

A table gives for our name of a layer its name elsewhere. A field in braces is a number that both names share:
`{s}` the stage, `{b}` the block, `{n}` the number of a layer; `{s+1}` is one more, where the other counts from 1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from torch import nn

Table = Mapping[str, str]

_FIELD = re.compile(r"\{(\w)([+-]\d)?\}")


def check_table(table: Mapping[Any, Any]) -> None:
    """Raise unless the table gives names for names, with the same numbers in both."""
    for ours, theirs in table.items():
        if not (isinstance(ours, str) and isinstance(theirs, str)):
            raise ValueError(f"vocabulary must give names of layers as text, got {ours!r}: {theirs!r}")
        fields = [{field for field, _ in _FIELD.findall(name)} for name in (ours, theirs)]
        if fields[0] != fields[1]:
            raise ValueError(f"vocabulary must have the same numbers in both names, got {ours!r}: {theirs!r}")


def key_map(net: nn.Module, table: Table | None, *, head: bool = True, partial: bool = False) -> dict[str, str]:
    """For each key of the net's state dict, that of the head on request, its name by the table; None is ours.

    Empty if the table misses a layer; with `partial` that layer is left out.
    """
    if table is None:
        return {key: key for key in keys(net, head=head)}
    if not partial and nameless_layers(net, table, head=head):
        return {}
    names = {key: translate_key(key, table) for key in keys(net, head=head)}
    return {key: name for key, name in names.items() if name is not None}


def keys(net: nn.Module, *, head: bool) -> list[str]:
    """The keys of the net's state dict, with or without those of its head."""
    return [key for key in net.state_dict() if head or not key.startswith("head.")]


def nameless_layers(net: nn.Module, table: Table, *, head: bool = True) -> list[str]:
    """The layers of the net for which the table has no name.

    The pools of a shortcut and of the stem count as layers, although they have no weights: what lies beside them is
    called otherwise.
    """
    layers = dict.fromkeys(key.rpartition(".")[0] for key in keys(net, head=head))
    pools = [name for name, _ in net.named_modules() if name.endswith(".shortcut.pool") or name == "stem.pool"]
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
            numbers = {field: int(match[field]) - int(offset or 0) for field, offset in _FIELD.findall(template)}
            return _FIELD.sub(lambda field: str(numbers[field[1]] + int(field[2] or 0)), other)  # noqa: B023
    return None


def reversed_table(table: Table) -> Table:
    """The same names, read the other way."""
    return {other: template for template, other in table.items()}


@cache
def _pattern(template: str) -> re.Pattern[str]:
    literals, fields = _FIELD.split(template)[::3], [field for field, _ in _FIELD.findall(template)]
    # A field that comes again is the same number again.
    numbers = [f"(?P={f})" if f in fields[:place] else f"(?P<{f}>\\d+)" for place, f in enumerate(fields)]
    return re.compile("".join(map("".join, zip(map(re.escape, literals), [*numbers, ""], strict=True))))
