"""Tables of names: how they are read, in both directions.

A table gives for our name of a layer its name elsewhere. A field in braces is a number that both names share:
`{s}` the stage, `{b}` the block, `{n}` the number of a layer, or any other name; `{s+1}` is one more, where the other
counts from 1.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from functools import cache
from typing import Any

from torch import nn

Table = Mapping[str, str]

_FIELD = re.compile(r"\{([a-z]\w*)([+-]\d+)?\}")


def check_table(table: Mapping[Any, Any]) -> None:
    """Raise unless the table gives names for names, with the same numbers in both."""
    for ours, theirs in table.items():
        if not (isinstance(ours, str) and isinstance(theirs, str)):
            raise ValueError(f"vocabulary must give names of layers as text, got {ours!r}: {theirs!r}")
        if any(brace in _FIELD.sub("", name) for name in (ours, theirs) for brace in "{}"):
            raise ValueError(f"vocabulary must have numbers as {{s}}, {{stage}} or {{s+1}}, got {ours!r}: {theirs!r}")
        fields = [{field for field, _ in _FIELD.findall(name)} for name in (ours, theirs)]
        if fields[0] != fields[1]:
            raise ValueError(f"vocabulary must have the same numbers in both names, got {ours!r}: {theirs!r}")


def key_map(net: nn.Module, table: Table | None, *, head: bool = True, partial: bool = False) -> dict[str, str]:
    """For each key of the net's state dict, that of the head on request, its name by the table; None is ours.

    Empty if the table misses a layer; with `partial` that layer is left out.
    """
    if table is None:
        return {key: key for key in keys(net, head=head)}
    layers = {layer: translate(layer, table) for layer in layers_of(net, head=head)}
    if not partial and None in layers.values():
        return {}
    split = {key: key.rpartition(".") for key in keys(net, head=head)}
    return {key: f"{layers[layer]}.{entry}" for key, (layer, _, entry) in split.items() if layers[layer] is not None}


def check_distinct(names: Mapping[str, str]) -> None:
    """Raise if a table gives one name to two keys of a net: one of their tensors would be lost."""
    counts = Counter(names.values())
    if twice := next((name for name, count in counts.items() if count > 1), None):
        ours = " and ".join(key for key, name in names.items() if name == twice)
        raise ValueError(f"vocabulary must have a name for each layer, got {twice!r} for {ours}")


def keys(net: nn.Module, *, head: bool) -> list[str]:
    """The keys of the net's state dict, with or without those of its head."""
    return [key for key in net.state_dict() if head or not key.startswith("head.")]


def nameless_layers(net: nn.Module, table: Table) -> list[str]:
    """The layers of the net for which the table has no name."""
    return [layer for layer in layers_of(net) if translate(layer, table) is None]


def layers_of(net: nn.Module, *, head: bool = True) -> list[str]:
    """The layers of the net that need a name.

    The pools of a shortcut and of the stem are among them, although they have no weights: what lies beside them is
    called otherwise.
    """
    layers = dict.fromkeys(key.rpartition(".")[0] for key in keys(net, head=head))
    pools = [name for name, _ in net.named_modules() if name.endswith(".shortcut.pool") or name == "stem.pool"]
    return [*layers, *pools]


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
            if min(numbers.values(), default=0) < 0:  # of "layer0", where the first is layer1
                return None
            return _FIELD.sub(lambda field: str(numbers[field[1]] + int(field[2] or 0)), other)  # noqa: B023
    return None


def reversed_table(table: Table) -> Table:
    """The same names, read the other way; of two of ours that share one name it keeps the last."""
    return {other: template for template, other in table.items()}


@cache
def _pattern(template: str) -> re.Pattern[str]:
    literals, fields = _FIELD.split(template)[::3], [field for field, _ in _FIELD.findall(template)]
    # A field that comes again is the same number again.
    numbers = [f"(?P={f})" if f in fields[:place] else f"(?P<{f}>\\d+)" for place, f in enumerate(fields)]
    return re.compile("".join(map("".join, zip(map(re.escape, literals), [*numbers, ""], strict=True))))
