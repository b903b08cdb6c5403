"""The folder of one run: whose it is, and whether it is finished."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import nn

from .checkpoint import list_checkpoints
from .files import is_intact, write_json
from .recipe import whole_recipe
from .result import Result


def layout(net: nn.Module) -> str:
    """Digest of names and shapes of the state dict: two nets with the same one can exchange weights."""
    layout = [(name, tuple(tensor.shape)) for name, tensor in net.state_dict().items()]
    return hashlib.sha256(repr(layout).encode()).hexdigest()[:16]


def layers(net: nn.Module) -> str:
    """Digest of what the state dict does not tell: kinds and options of all modules, and where skips are off."""
    said = [(name, type(m).__qualname__, m.extra_repr(), getattr(m, "skip", None)) for name, m in net.named_modules()]
    return hashlib.sha256(repr(said).encode()).hexdigest()[:16]


def claim(out: Path, settings: dict[str, Any]) -> None:
    """Write the settings into a new folder; in an old one they must be the same."""
    path = out / "run.json"
    if not path.exists():
        if list_checkpoints(out):
            raise ValueError(
                f"out: {out} holds checkpoints but no run.json, so whose they are is not known: choose another --out"
            )
        write_json(path, settings)
        return
    try:
        there, here = _flat(json.loads(path.read_text())), _flat(settings)
    except ValueError as error:
        raise ValueError(f"out: {path} is damaged ({error}): choose another --out, or remove {out}") from error
    there.setdefault("net.layers", here.get("net.layers"))  # folders from before it was written
    there = _flat({"recipe": whole_recipe({})}) | there
    if different := [key for key in {**there, **here} if there.get(key) != here.get(key)]:
        changes = "; ".join(f"{key} is {there.get(key)!r} there, {here.get(key)!r} now" for key in different)
        raise ValueError(
            f"out: {out} holds a run of other settings ({changes}): choose another --out, or remove that folder"
        )


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


def read_finished(out: Path) -> Result | None:
    """The result of a run that wrote all it had to write, else None."""
    if not (out / "result.json").exists() or not is_intact(out / "weights.safetensors"):
        return None
    try:
        return Result.read(out / "result.json")
    except (ValueError, TypeError):
        return None  # damaged: the last checkpoint leads to the same result
