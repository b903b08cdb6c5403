"""The folder of one run: whose it is, and whether it is finished."""

from __future__ import annotations

import hashlib
import json
import math
import re
import warnings
import zlib
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resblocks.undisturbed import restored

from .augment import normalise
from .checkpoint import has_checkpoint, list_checkpoints
from .data import Dataset
from .extras import require
from .files import is_intact, write_json
from .recipe import Recipe, whole_recipe
from .result import Result

START = "net.starting_weights"
GRADIENT = "net.first_gradient"


def layout_digest(net: nn.Module) -> str:
    """Digest of names and shapes of the state dict: two nets with the same one can exchange weights."""
    layout = [(name, tuple(tensor.shape)) for name, tensor in net.state_dict().items()]
    return hashlib.sha256(repr(layout).encode()).hexdigest()[:16]


def layers_digest(net: nn.Module) -> str:
    """Digest of what the state dict does not tell: kinds and options of all modules, and where skips are off."""
    said = [(name, type(m).__qualname__, m.extra_repr(), switch(m)) for name, m in net.named_modules()]
    without_addresses = re.sub(r" at 0x[0-9a-f]+", "", repr(said))
    return hashlib.sha256(without_addresses.encode()).hexdigest()[:16]


def switch(module: nn.Module) -> bool | None:
    """The skip switch of a module that has one; others call something else so."""
    skip = getattr(module, "skip", None)
    return skip if isinstance(skip, bool) else None


def fingerprint(state: dict[str, Tensor]) -> list[float]:
    """Sum, norm and a sum that knows the order of all values of a state dict but counts, which grow beyond any weight.

    No digest of the bits: weights drawn from one seed may differ in the last digits from processor to processor.
    """
    values = {
        name: tensor.detach().cpu().double().flatten().nan_to_num(0, 0, 0)
        for name, tensor in state.items()
        if tensor.is_floating_point()
    }
    total = float(sum(tensor.sum() for tensor in values.values()))
    norm = math.hypot(*(float(tensor.norm()) for tensor in values.values()))
    return [total, norm, float(sum(tensor @ _mixing_weights(name, len(tensor)) for name, tensor in values.items()))]


def _mixing_weights(name: str, size: int) -> Tensor:
    """Weights of a sum over the values of a tensor, none like the next. Shape: (size,)."""
    return torch.arange(size, dtype=torch.float64).add_(zlib.crc32(name.encode()) % 1000).cos_()


def same_values(one: list[float], other: list[float], tolerance: float = 1e-4) -> bool:
    """Whether two fingerprints are of the same values, up to rounding; those of two seeds are about a norm apart."""
    return all(abs(mine - theirs) <= tolerance * one[1] for mine, theirs in zip(one, other, strict=True))


def first_gradient(net: nn.Module, dataset: Dataset) -> list[float] | None:
    """Fingerprint of the gradient of a few images: of what `forward` does, which no name tells and a zero head hides.

    In evaluation mode, where all processors agree. None where the net does not take the images so, or makes nothing
    finite of them.
    """
    weights = {name: weight for name, weight in net.named_parameters() if weight.requires_grad}
    device = next(iter(weights.values())).device
    images = normalise(dataset.train_images[:4], dataset.mean, dataset.std).to(device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad(), restored(net):
        torch.manual_seed(0)  # some nets draw in evaluation, too
        try:
            logits = net.eval()(images)
            loss = F.cross_entropy(logits, torch.zeros(len(images), dtype=torch.int64, device=device))
            gradients: tuple[Tensor | None, ...] = torch.autograd.grad(loss, [*weights.values()], allow_unused=True)
        except Exception:  # which `check_net` will explain
            return None
    found = {name: one for name, one in zip(weights, gradients, strict=True) if one is not None}
    return fingerprint(found) if all(one.isfinite().all() for one in found.values()) else None


def run_settings(net: nn.Module, name: str, dataset: Dataset, recipe: Recipe, **options: Any) -> dict[str, Any]:
    """All that a run depends on, as plain data: what its folder is known by."""
    data = {"name": dataset.name, "split": dataset.split, "sha256": dataset.key, "classes": list(dataset.classes)}
    about_net = net_settings(net, name) | {"first_gradient": first_gradient(net, dataset)}
    return {"net": about_net, "dataset": data, "recipe": recipe.as_dict(), **options}


def net_settings(net: nn.Module, name: str) -> dict[str, Any]:
    """What of a net decides the run: its layers, the weights it starts from, and which of them are frozen."""
    settings: dict[str, Any] = {"name": name, "layout": layout_digest(net), "layers": layers_digest(net)}
    settings["starting_weights"] = fingerprint(net.state_dict())
    frozen = sorted(name for name, weight in net.named_parameters() if not weight.requires_grad)
    return settings | ({"frozen": frozen} if frozen else {})


def check_same(given: list[dict[str, Any]]) -> None:
    """Compare the settings of all processes: each node has a command line and a disk of its own.

    The weights to start from may differ, as all processes get those of the first.

    Raises:
        ValueError: they differ.
    """
    first, *others = ({**_flat(settings), START: None, GRADIENT: None} for settings in given)
    for rank, other in enumerate(others, start=1):
        if different := _different(first, other):
            changes = "; ".join(
                f"{key} is {first.get(key)!r} on process 0, {other.get(key)!r} on {rank}" for key in different
            )
            raise ValueError(
                f"settings must be the same on all processes ({changes}): give all one command and the same data"
            )


def check_settings(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of the run that the folder holds, or those given where it holds none; nothing is written.

    A run without a checkpoint and a result has nothing to lose and does not keep the folder. A stopped run goes on from
    its checkpoint, whatever weights it is given, so that a net that was not seeded is not lost: then a warning says so.
    A finished run takes the weights that it started from, or those that it ended with.

    Raises:
        ValueError: the folder holds a run of other settings.
    """
    path = out / "run.json"
    if not list_checkpoints(out) and not (out / "result.json").exists():
        return settings
    if not path.exists():
        raise ValueError(f"out: {out} holds a run but no run.json, so whose it is is not known: choose another --out")
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        if not (isinstance(written, dict) and {START, GRADIENT} <= _flat(written).keys()):
            raise ValueError("it holds no settings")
    except ValueError as error:
        raise ValueError(f"out: {path} is damaged ({error}): choose another --out, or remove {out}") from error
    here = _flat(settings)
    there = _flat({"recipe": whole_recipe({})}) | _flat(written)
    different = _different(there, here)
    if START in different and same_values(there[START], here[START]):
        different.remove(START)
    if GRADIENT in different and (START in different or _same_gradient(there[GRADIENT], here[GRADIENT])):
        different.remove(GRADIENT)
    if different == [START]:
        if read_finished(out) is None:
            return _goes_on(out, written, settings)
        if same_values(fingerprint(require("safetensors.torch").load_file(out / "weights.safetensors")), here[START]):
            return written
    if different:
        changes = "; ".join(f"{key} is {there.get(key)!r} there, {here.get(key)!r} now" for key in different)
        raise ValueError(
            f"out: {out} holds a run of other settings ({changes}): choose another --out, or remove that folder"
        )
    return settings


def _same_gradient(one: list[float] | None, other: list[float] | None) -> bool:
    """Up to the rounding of another device, which the layers enlarge; what cannot be told may be the same."""
    return one is None or other is None or same_values(one, other, 5e-2)


def _goes_on(out: Path, there: dict[str, Any], here: dict[str, Any]) -> dict[str, Any]:
    """The settings of a stopped run that differ in the starting weights."""
    if not has_checkpoint(out):
        return here
    warnings.warn(f"{out} holds a run that started from other weights: it goes on with its own", stacklevel=2)
    return {**here, "net": there["net"]}


def claim(out: Path, settings: dict[str, Any]) -> None:
    """Write the settings beside the run; one without a checkpoint starts anew, and so do they."""
    if not has_checkpoint(out):
        write_json(out / "run.json", settings)


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


def _different(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return [key for key in {**one, **other} if one.get(key) != other.get(key)]


def read_finished(out: Path) -> Result | None:
    """The result of a run that wrote all it had to write, else None."""
    if not (out / "result.json").exists() or not is_intact(out / "weights.safetensors"):
        return None
    try:
        result = Result.read(out / "result.json")
        written = json.loads((out / "run.json").read_text(encoding="utf-8"))
        whole = len(result.epochs) == result.settings["recipe"]["epochs"]
        return result if whole and _what(result.settings) == _what(written) else None
    except (ValueError, TypeError, KeyError):
        return None  # damaged, or copied here: the last checkpoint leads to the same result


def _what(settings: dict[str, Any]) -> list[Any]:
    """Of a run's settings those that are the same on every machine, to the last digit."""
    net, dataset = settings["net"], settings["dataset"]
    return [net["name"], net["layers"], dataset["sha256"], whole_recipe(settings["recipe"]), settings["seed"]]
