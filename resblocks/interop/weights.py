"""Weights of other libraries into our nets and back: exact, strict, and from files that run no code."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from resblocks.fused import FusedConv
from resblocks.interop.kernels import FirstConv, Inflate, fit_first_conv, inflated, misfit, narrowed, shape_there
from resblocks.interop.vocabularies import POINTWISE, VOCABULARIES
from resblocks.interop.words import (
    Table,
    check_distinct,
    check_table,
    key_map,
    nameless_layers,
    reversed_table,
    translate,
    translate_key,
)
from resblocks.layers import WeightStandardised
from resblocks.shortcuts import ZeroPad
from resblocks.undisturbed import unwrapped

# A table of one's own need not name what has no weights.
WITHOUT_WEIGHTS = {name: name for name in ("stem.pool", "stages.{s}.{b}.shortcut.pool")}

Source = Mapping[str, Tensor] | nn.Module | str | Path
Publisher = Literal["torchvision", "torchvision.video", "timm", "transformers", "monai", "pytorchcv"]
Library = Publisher | Literal["detectron2", "pytorch-cifar", "resblocks"]
Vocabulary = Library | Table


class Names(NamedTuple):
    """The names of a net's weights in one vocabulary: ours -> theirs, and the table that they come from."""

    vocabulary: str
    theirs: dict[str, str]
    table: Table | None

    def ours(self, key: str) -> str:
        """What a key of theirs is, or would be, called here; empty if it has no name of ours."""
        return (translate_key(key, reversed_table(self.table)) or "") if self.table else key

    def both(self, key: str, ours: str = "") -> str:
        """A key of theirs with its name here, found by the table unless it is given, and there."""
        return f"{ours or self.ours(key) or 'no name of ours'} ({self.vocabulary}: {key})"

    def fit(self, given: Mapping[str, Tensor]) -> tuple[int, int]:
        """How many keys of a source the net takes, and how many layers the table knows, a dropped head's too."""
        table = reversed_table(self.table) if self.table else {}
        layers = {key.rpartition(".")[0] for key in given}
        return len(given.keys() & set(self.theirs.values())), sum(translate(name, table) is not None for name in layers)

    def as_theirs(self, key: str, tensor: Tensor) -> Tensor:
        """Our tensor in the shape that it has under their key."""
        pointwise = tensor.dim() == 2 and self.vocabulary in VOCABULARIES and POINTWISE.fullmatch(key)
        return tensor[:, :, None, None] if pointwise else tensor


def load(
    net: nn.Module,
    source: Source,
    *,
    vocabulary: Vocabulary | None = None,
    first_conv: FirstConv = "same",
    drop_head: bool = False,
    inflate: Inflate | None = None,
    prefix: str = "",
    partial: bool = False,
) -> list[str]:
    """Copy weights from elsewhere into one of our nets, all of them or none; with `partial`, those that fit.

    Args:
        net: one of our nets, also inside `torch.compile` or a data-parallel wrapper, but not a fused one.
        source: a state dict, a model, or a file: .safetensors, or what `torch.save` wrote of a state dict, which is
            read with `weights_only=True`.
        vocabulary: whose names the source has; None finds out. For those of another library a table of your own:
            {"stem.conv": "body.first", "stages.{s}.{b}.branch.conv{n}": "body.stage{s+1}.{b}.conv{n}", ...} says of
            our layers what they are called there, with the numbers of stage, block and layer in braces.
        first_conv: what to do if the net has other input channels than the source: "same" refuses, "sum" adds the
            kernels of the source's channels (one input channel: a grey image gives what its three-channel copy
            gave), "repeat" goes round the source's channels and keeps the size of the response.
        drop_head: leave the head of the net as it is, for other classes.
        inflate: how kernels of images become those of volumes (or of sound those of images) if the net has more
            dimensions than the source. The new one comes first, (D, H, W). "centre" puts them into its middle, between
            zeros: each slice gives at first what the image gave. "mean" repeats them along it, divided by its size
            (Carreira and Zisserman 2017, sec. 2.1). None refuses.
        prefix: what the names of the net's weights begin with in the source, "backbone." for instance; others are left
            out.
        partial: copy what the net has by name and shape, for a net with something changed, without skips or with
            attention for instance; the rest of it stays as it is, and everything that was not copied is named.

    Returns:
        What was not copied as it stands or may mean something else here, a sentence each; empty if there is nothing of
        the kind. Averaged weights of a training checkpoint, under "state_dict_ema" or "model_ema", are named but not
        taken.

    Raises:
        ValueError: keys that are missing, too many or of another shape, each in both vocabularies, or with `partial`
            nothing that fits; nothing is loaded then. Also a net for which the vocabulary has no names, two layers of
            one name, first_conv or inflate for standardised weights, a file of another kind.

    Example:
        >>> from resblocks import create_model
        >>> small, other = create_model("resnet20"), create_model("resnet20")
        >>> load(small, to_torchvision(other))
        []
    """
    net = unwrapped(net)
    content, left_out = unpacked(read(source))
    if prefix:
        content, others = without_prefix(content, prefix)
        left_out += others
    given = plain_names(content)
    check_not_fused(net, given)
    names = find_names(net, given, vocabulary, head=not drop_head, partial=partial)
    ours = net.state_dict()
    check_target(net, next(iter(ours)), first_conv, inflate)
    kept: dict[str, Tensor] = {}
    dropped: list[str] = []
    if drop_head:
        given, dropped = without_head(names, given)
        kept = {key: tensor for key, tensor in ours.items() if key.startswith("head.")}
    new, notes, faults = match(ours, names, given, first_conv, inflate)
    if partial and any(names.theirs[key] in given for key in new):
        others = [key for key in ours.keys() - names.theirs.keys() if key not in kept]
        notes += [f"{key}: kept as it was" for key in sorted(others)] + faults
        kept, faults = ours, []
    if faults:
        raise ValueError("source must fit the net, nothing was loaded:\n  " + "\n  ".join(faults))
    net.load_state_dict(kept | new)
    return left_out + dropped + notes + doubts(net, names.vocabulary)


def doubts(net: nn.Module, vocabulary: str) -> list[str]:
    """What the weights leave open and the outputs depend on: the padding of option A alone, as yet."""
    padded = any(type(layer) is ZeroPad for layer in net.modules())
    if vocabulary != "pytorch-cifar" or not padded:
        return []
    return ["shortcuts: zeros behind the old channels; akamaster's are on both sides (shortcut=centred_padding)"]


def without_prefix(given: Mapping[str, Any], prefix: str) -> tuple[dict[str, Any], list[str]]:
    """The entries whose key begins with the prefix, or with it behind a wrapper's, without it; a note on the others."""
    found: dict[str, Any] = {}
    for start in (prefix, f"module.{prefix}", f"_orig_mod.{prefix}", f"module._orig_mod.{prefix}"):
        found = found or {key.removeprefix(start): value for key, value in given.items() if key.startswith(start)}
    if not found:
        raise ValueError(f"prefix must begin names of the source, got {prefix!r}, which has {list(given)[:3]}")
    others = len(given) - len(found)
    return found, [f"{others} keys that do not begin with {prefix!r}: left out"] if others else []


def without_head(names: Names, given: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors without those of the head, and what was dropped."""
    dropped = {key: tensor for key, tensor in given.items() if names.ours(key).startswith("head.")}
    notes = [f"{names.both(key)}: dropped, {tuple(tensor.shape)} in the source" for key, tensor in dropped.items()]
    return {key: given[key] for key in given if key not in dropped}, notes


def match(
    ours: Mapping[str, Tensor],
    names: Names,
    given: Mapping[str, Tensor],
    first_conv: FirstConv,
    inflate: Inflate | None,
) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """The tensors of the source as the net takes them, what was done to them, and what does not fit."""
    new: dict[str, Tensor] = {}
    notes, faults, first, uncounted, grown = [], [], next(iter(ours)), 0, 0
    missing = missing_dims(ours, names, given)
    for key, their_key in names.theirs.items():
        name, tensor = names.both(their_key, key), ours[key]
        if their_key in given:
            wanted = shape_there(tensor, given[their_key])
            grows = len(wanted) - given[their_key].dim() in missing
            kernel = inflated(given[their_key], wanted, inflate if grows else None)
            fitted, note = fit_first_conv(kernel, wanted, first_conv if key == first else "same")
            notes += [f"{name}: {said}" for said in (note, narrowed(given[their_key], tensor)) if said]
            if fault := misfit(name, fitted, given[their_key], wanted, tensor):
                faults.append(fault + (_first_hint(fitted, wanted) if key == first else _hint(key)))
            else:
                new[key] = fitted.reshape(tensor.shape)
                grown += kernel is not given[their_key]
        elif key.endswith("num_batches_tracked"):
            new[key] = torch.zeros_like(tensor)
            uncounted += 1
        else:
            faults.append(f"missing in the source: {name}")
    if grown:
        notes.append(f"{grown} kernels: inflated by new dimensions ({inflate})")
    if uncounted:
        notes.append(f"{uncounted} num_batches_tracked: not in the source, start at 0")
    known = set(names.theirs.values())
    faults += [f"not in the net: {names.both(key)}{_hint(names.ours(key))}" for key in given if key not in known]
    return new, notes, faults


def missing_dims(ours: Mapping[str, Tensor], names: Names, given: Mapping[str, Tensor]) -> Sequence[int]:
    """By how many dimensions kernels are to grow: those of the first layer tell, if the source has it."""
    first = next(iter(ours))
    there = given.get(names.theirs.get(first, ""))
    return (1, 2) if there is None else (ours[first].dim() - there.dim(),)


def check_not_fused(net: nn.Module, given: Mapping[str, Tensor]) -> None:
    """Raise if the net is fused, unless the weights are those of one fused alike."""
    fused = any(isinstance(layer, FusedConv) for layer in net.modules())
    if fused and given.keys() != net.state_dict().keys():
        raise ValueError("net must not be fused, since it has taken its norms in: load into the net, then fuse it")


def check_target(net: nn.Module, first: str, first_conv: str, inflate: str | None) -> None:
    """Raise unless the net has memory for weights, and convolutions that can be adapted if that is asked for."""
    if net.state_dict()[first].is_meta:
        raise ValueError("net must have memory for weights, got one on the meta device: net.to_empty(device=...) first")
    layer = net.get_submodule(first.rpartition(".")[0])
    if first_conv != "same" and isinstance(layer, WeightStandardised):
        raise ValueError(f"first_conv must be 'same' for standardised weights, which undo it, got {first_conv!r}")
    if inflate not in (None, "centre", "mean"):
        raise ValueError(f"inflate must be centre, mean or None, got {inflate!r}")
    if inflate and any(isinstance(module, WeightStandardised) for module in net.modules()):
        raise ValueError(f"inflate must be None for standardised weights, which change with it, got {inflate!r}")


def to_vocabulary(net: nn.Module, vocabulary: Vocabulary) -> dict[str, Tensor]:
    """The state dict of our net under the names of another library, or of a table of your own as in `load`.

    Under names of your own linear layers stay such: where theirs are 1x1 convolutions, as squeeze-and-excitation often
    has them, their weights want `[:, :, None, None]`.

    Raises:
        ValueError: the vocabulary has no name for a layer of the net, or there is none like it.
    """
    net = unwrapped(net)
    names = next(iter(speakers(net, vocabulary)), None)
    if names is None:
        raise ValueError(nameless(net, vocabulary))
    check_distinct(names.theirs)
    return {names.theirs[key]: names.as_theirs(names.theirs[key], tensor) for key, tensor in net.state_dict().items()}


def to_torchvision(net: nn.Module) -> dict[str, Tensor]:
    """The state dict of our net under torchvision's names: `to_vocabulary(net, "torchvision")`."""
    return to_vocabulary(net, "torchvision")


def to_timm(net: nn.Module) -> dict[str, Tensor]:
    """The state dict of our net under timm's names: `to_vocabulary(net, "timm")`."""
    return to_vocabulary(net, "timm")


def read(source: Source) -> Mapping[str, Any]:
    """What a source holds by name; files are read without running code from them.

    Raises:
        ValueError: no source, a file of another kind.
    """
    if isinstance(source, nn.Module):
        return source.state_dict()
    if isinstance(source, (str, Path)):
        return _read_file(Path(source))
    if not isinstance(source, Mapping):
        raise ValueError(f"source must be a state dict, a module or the path of a file, got {type(source).__name__}")
    return source


# Of timm and Lightning, torchvision, torch's tutorial, pytorch-cifar.
CHECKPOINT_KEYS = ("state_dict", "model", "model_state_dict", "net")


def unpacked(given: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[str]]:
    """The weights of a training checkpoint, as torchvision's references and timm write it, and what else it has."""
    notes = []
    for key in CHECKPOINT_KEYS:
        if isinstance(given.get(key), Mapping):
            averaged = f"{key}_ema"
            if isinstance(given.get(averaged), Mapping):
                notes.append(f"{averaged}: averaged weights, not taken; load the value under {averaged!r} to have them")
            given = given[key]
    return given, notes


def plain_names(given: Mapping[Any, Any]) -> dict[str, Tensor]:
    """Tensors under their names without those of wrappers.

    Raises:
        ValueError: something other than tensors by name, two that have one name without those of wrappers.
    """
    for key, value in given.items():
        if not (isinstance(key, str) and isinstance(value, Tensor)):
            raise ValueError(f"source must hold tensors by name, got {type(value).__name__} under {key!r}")
        if value.is_meta or value.is_nested or value.layout is not torch.strided:
            kind = "meta" if value.is_meta else "nested" if value.is_nested else value.layout
            raise ValueError(f"source must hold dense tensors with values, got a {kind} one under {key!r}")
    # Names of torch.compile, and the count of an AveragedModel.
    names = {key: key.replace("_orig_mod.", "") for key in given if key != "n_averaged"}
    wrapped = all(name.startswith("module.") for name in names.values())  # in data-parallel wrappers
    plain: dict[str, Tensor] = {}
    for key, name in names.items():
        if (name := _plain_dense_name(name.removeprefix("module." if wrapped else ""))) in plain:
            raise ValueError(f"source must have one tensor for each name, got several for {name!r}")
        plain[name] = given[key]
    return plain


def find_names(
    net: nn.Module,
    given: Mapping[str, Tensor],
    vocabulary: Vocabulary | None,
    *,
    head: bool = True,
    partial: bool = False,
) -> Names:
    """The names of the net's weights in the vocabulary asked for, or in the one that the source speaks.

    Without `head` the net may have a head of its own, and its names are left out; with `partial` any layer may have
    none.

    Raises:
        ValueError: an unknown vocabulary, one without a name for a layer of the net, a source in none.
    """
    spoken = speakers(net, vocabulary, head=head, partial=partial)
    if not spoken:
        raise ValueError(nameless(net, vocabulary or "resblocks"))
    best = max(spoken, key=lambda names: names.fit(given))
    if vocabulary is None and not given.keys() & set(best.theirs.values()):
        tried = dict.fromkeys(names.vocabulary for names in spoken)
        others = [names for names in speakers(net, None, head=head, partial=True) if names.vocabulary not in tried]
        raise ValueError(
            f"source must have the names of {', '.join(tried)} for this net, or of a table given as vocabulary, "
            f"got {len(given)} keys such as {list(given)[:3]}"
            f"{prefix_hint(spoken, given)}{table_hint(net, others, given)}"
        )
    check_distinct(best.theirs)
    return best


def prefix_hint(spoken: list[Names], given: Mapping[str, Tensor]) -> str:
    """The prefix that would find the net in a larger model, not one of its blocks."""
    for names in spoken:
        theirs = [*names.theirs.values()]
        for prefix in [key.removesuffix(theirs[0]) for key in given if key.endswith(f".{theirs[0]}")]:
            if sum(f"{prefix}{key}" in given for key in theirs) > len(theirs) / 2:
                return f"; prefix={prefix!r} would find its names"
    return ""


def table_hint(net: nn.Module, others: list[Names], given: Mapping[str, Tensor]) -> str:
    """What of the net has no name in the source's vocabulary."""
    best = max(others, key=lambda names: names.fit(given), default=None)
    if best is None or best.fit(given)[0] <= len(given) / 2:
        return ""
    return f"; in {best.vocabulary} {_fewest(net, [best.table])} would have no name"


def speakers(net: nn.Module, asked: Vocabulary | None, *, head: bool = True, partial: bool = False) -> list[Names]:
    """The net's names by each table asked for that has them all, with `partial` by each that has some."""
    maps = [
        Names(vocabulary, key_map(net, table, head=head, partial=partial), table)
        for vocabulary, tables in tables_of(asked).items()
        for table in tables
    ]
    return [names for names in maps if names.theirs]


def tables_of(asked: Vocabulary | None) -> Mapping[str, tuple[Table | None, ...]]:
    """The tables of a vocabulary, or of all, by its name; that of our own names is None.

    Raises:
        ValueError: there is no such vocabulary, or the table is none.
    """
    known = {"resblocks": (None,), **VOCABULARIES}
    if asked is None:
        return known
    if isinstance(asked, Mapping):
        check_table(asked)
        return {"your table": ({**WITHOUT_WEIGHTS, **asked},)}
    if asked not in list(known):  # what cannot be hashed is no name either
        raise ValueError(f"vocabulary must be one of {', '.join(known)}, a table or None, got {asked!r}")
    return {asked: known[asked]}


def nameless(net: nn.Module, vocabulary: Vocabulary) -> str:
    """Which layers of the net keep it from being said in the vocabulary."""
    (name, tables), *_ = tables_of(vocabulary).items()
    return f"every layer of the net must have a name in {name}, but these have none: {_fewest(net, tables)}"


def _fewest(net: nn.Module, tables: Iterable[Table | None]) -> str:
    """The layers without a name in the table that fits best."""
    fewest = min((nameless_layers(net, table) for table in tables if table is not None), key=len, default=["weights"])
    return ", ".join(fewest[:3]) + (", ..." if len(fewest) > 3 else "")


def _hint(key: str) -> str:
    """What would make a misfit fit."""
    return "; drop_head=True leaves it out" if key.startswith("head.") else ""


def _first_hint(given: Tensor, wanted: torch.Size) -> str:
    """The same of the first convolution, whose channels and dimensions can be adapted."""
    if 2 < given.dim() < len(wanted):
        return "; inflate='centre' or 'mean' adapts the dimensions"
    how = "'sum' or 'repeat'" if wanted[1] == 1 else "'repeat'"
    adapts = given.shape[2:] == wanted[2:] and given.shape[1] != wanted[1]
    return f"; first_conv={how} adapts the channels" if adapts else ""


def _read_file(path: Path) -> Mapping[str, Tensor]:
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix not in (".pt", ".pth", ".th", ".ckpt", ".bin", ".tar"):
        raise ValueError(
            f"a file of weights must be .safetensors, .pt, .pth, .th, .ckpt, .bin or .tar, got {path.name!r}"
        )
    try:
        given: Mapping[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"a file of weights must hold tensors and plain types alone, {path.name!r} {_what_it_holds(path, error)}"
        ) from error
    except (EOFError, RuntimeError, LookupError, ValueError) as error:
        raise ValueError(_not_whole(path, error)) from error
    if not isinstance(given, Mapping):
        raise ValueError(f"a file of weights must hold tensors by name, got {type(given).__name__} in {path.name!r}")
    return given


def _read_safetensors(path: Path) -> Mapping[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(_not_whole(path, error)) from error


def _not_whole(path: Path, error: Exception) -> str:
    reason = re.split(r"\. |\n", str(error))[0] or type(error).__name__  # torch goes on with unsafe advice
    return f"a file of weights must be whole, {path.name!r} cannot be read ({reason})"


def _what_it_holds(path: Path, error: pickle.UnpicklingError) -> str:
    """In words what torch found in a file that it did not load."""
    # Builtins come without a module.
    if call := re.search(r"GLOBAL (?:(\S+) whose module \S+ is blocked|(\w+) was not)", str(error)):
        return f"would call {call[1] or call[2]} when it is loaded, as no weights do: do not load it"
    if other := re.search(r"Unsupported global: GLOBAL (\S+)", str(error)):
        advice = f"hand over what torch.load({path.name!r}, weights_only=False) gives"
        return f"holds also {other[1]}: where you trust it, {advice}"
    return "is no file of torch.save: was something else downloaded, such as a page or a pointer of Git LFS?"


def _plain_dense_name(key: str) -> str:
    # The files that torchvision publishes for its DenseNets say "norm.1" where its code says "norm1".
    return re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", key)
