"""What a net asks of the blocks that it is made of, and how it hands them its options."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import cast

from torch import nn

from resblocks.layers import Stride
from resblocks.options import LayerOptions, NetOptions, inside, refuse_unknown

Block = Callable[..., nn.Module]
LAYER_OPTIONS = LayerOptions.__annotations__
DILATIONS = ("dilation", "first_dilation")


def block_of_stages(block: Block | Sequence[Block], stages: int) -> list[Block]:
    """The block of each stage, where one is given for all or a list with one for each."""
    if not isinstance(block, (list, tuple)):
        return [cast(Block, block)] * stages
    if len(block) != stages:
        raise ValueError(
            f"block must be one for all or one for each of the {stages} stages of depths, got {len(block)}"
        )
    return list(block)


def is_preactivated(blocks: Sequence[Block]) -> bool:
    """Whether the blocks leave it to what comes behind them to activate what they put out."""
    kinds = {bool(getattr(inside(block), "preactivated", False)) for block in blocks}
    if len(kinds) > 1:
        raise ValueError(
            "block must be pre-activated in all stages or in none, got both kinds: norm and activation "
            "between them would be missing or double"
        )
    return kinds == {True}


def check_block(net: type[nn.Module], block: object, options: Iterable[str]) -> None:
    """Raise for what makes no blocks, and for an option that neither a net of this class nor the block has.

    What another's block does with `**options` is its own affair, but for the dilations.
    """
    if isinstance(block, nn.Module) or not callable(block):
        raise ValueError(f"block must be a class or callable that makes blocks, got {block!r}")
    parameters = inspect.signature(block).parameters
    known = {*parameters, *DILATIONS} - {"in_channels", "out_channels", "stride"}
    if is_ours(block) or not takes_any(parameters):
        refuse_foreign(net, [name for name in options if name not in known], NetOptions.__annotations__)
    for name in DILATIONS:
        if name in options:
            raise TypeError(
                f"{net.__name__} takes no {name}: output_stride decides that of each stage, "
                f"partial(block, {name}=...) that of all blocks"
            )


def takes_any(parameters: Mapping[str, inspect.Parameter]) -> bool:
    """Whether there is a `**options` among them."""
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


def is_ours(block: Block) -> bool:
    """Whether the library says which arguments the block takes."""
    made_by = inside(block)
    constructor: object = vars(made_by).get("__init__", made_by) if isinstance(made_by, type) else made_by
    return str(getattr(constructor, "__module__", "")).partition(".")[0] == "resblocks"


def make_block(block: Block, in_channels: int, width: int, stride: Stride, options: dict[str, object]) -> nn.Module:
    """Build one block by the protocol, and raise where it does not keep it."""
    name = getattr(inside(block), "__name__", repr(block))
    made = block(in_channels, width, stride, **taken_options(block, name, options))
    if getattr(made, "preactivated", False) != getattr(inside(block), "preactivated", False):
        raise ValueError(f"block {name} must have the attribute preactivated of what it makes, {type(made).__name__}")
    if not isinstance(getattr(made, "out_channels", None), int):
        raise ValueError(f"block {name} must have an attribute out_channels, the channels that really come out")
    return made


def taken_options(block: Block, name: str, options: dict[str, object]) -> dict[str, object]:
    """The options as the block takes them; an error for one that it does not take.

    But for `dims`, which says what stem and head are made for: who writes a block for 1D or 3D data knows it.
    """
    parameters = inspect.signature(block).parameters
    takes_two = "first_dilation" in parameters or (takes_any(parameters) and "dilation" not in parameters)
    if "first_dilation" in options and not takes_two:
        options = with_one_dilation(options)
    if takes_any(parameters):
        return options
    for option, value in options.items():
        if option not in (*parameters, "dims"):
            hint = "; for the stem alone, give the net a stem of your own" if option in LAYER_OPTIONS else ""
            raise ValueError(
                f"block {name} takes no option {option!r}, got {option}={value!r}: a net hands its "
                f"options to its blocks, so give the block that keyword{hint}"
            )
    return {option: value for option, value in options.items() if option in parameters}


def with_one_dilation(options: dict[str, object]) -> dict[str, object]:
    """The options for a block without `first_dilation`: its `dilation` is that of its first 3x3 convolution."""
    others = {option: value for option, value in options.items() if option not in DILATIONS}
    return others if options["first_dilation"] == 1 else {**others, "dilation": options["first_dilation"]}


def asked_options(
    block: Block, options: NetOptions, skip: bool, drop_path: float, *, dilation: int, first_dilation: int
) -> dict[str, object]:
    """The options of one block, without those that say nothing, so that a block need not know them.

    Nor those that a partial has said already: what is said of some blocks counts more than what is said of all.
    """
    said = block.keywords if isinstance(block, partial) else {}
    asked: dict[str, object] = {name: value for name, value in options.items() if name not in said}
    if not skip:
        asked["skip"] = False
    if dilation > 1:
        asked["dilation"] = dilation
    if first_dilation != dilation:
        asked["first_dilation"] = first_dilation
    if drop_path > 0:
        asked["drop_path"] = drop_path
    return asked


def refuse_foreign(net: type[nn.Module], options: Iterable[str], of_layers: Iterable[str]) -> None:
    """Raise TypeError for an option that neither this kind of net nor its layers have, though another's may."""
    taken = [name for name in inspect.signature(net).parameters if name != "options"]
    refuse_unknown(options, [*taken, *of_layers], net.__name__)
