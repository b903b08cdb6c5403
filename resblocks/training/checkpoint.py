"""Checkpoints that survive a kill, a full disk and a flipped bit: one file, its digest beside it, the last two kept."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from pathlib import Path
from typing import Any

import torch

from .extras import require
from .files import digest_path, is_intact, remove_leftovers, write_digested

KEEP = 2


def checkpoint_path(folder: Path, step: int, epochs_done: int) -> Path:
    """Names sort by age. Step and finished epochs fix the content, so one name never holds two states."""
    return folder / f"step{step:09d}-epoch{epochs_done:05d}.pt"


def list_checkpoints(folder: str | Path) -> list[Path]:
    """Oldest first, sound or not; no files but those of `checkpoint_path`, since the old ones of them are deleted."""
    return sorted(path for path in Path(folder).glob("step*.pt") if re.fullmatch(r"step\d{9,}-epoch\d{5,}", path.stem))


def has_checkpoint(folder: str | Path) -> bool:
    """Whether there is one that a run can go on from."""
    return any(is_intact(path) for path in reversed(list_checkpoints(folder)))


def save_checkpoint(folder: str | Path, state: dict[str, Any], *, step: int, epochs_done: int) -> Path:
    """Write, read back, and only then delete what is older than the last two.

    Args:
        state: tensors and plain types, in dicts and lists, and nothing else.

    Raises:
        RuntimeError: the disk is full or faulty; the checkpoints from before are still there.
    """
    folder = Path(folder)
    path = checkpoint_path(folder, step, epochs_done)
    if not (path.exists() and is_intact(path)):
        buffer = io.BytesIO()
        torch.save(state, buffer)
        older = list_checkpoints(folder)
        try:
            write_digested(path, buffer.getbuffer())
        except RuntimeError as error:
            kept = f"{older[-1]} is kept, the same command goes on from it" if older else "there is none from before"
            raise RuntimeError(f"no checkpoint at step {step}: {error}; {kept}") from error
    for old in list_checkpoints(folder)[:-KEEP]:
        with contextlib.suppress(PermissionError):  # Windows, while a scanner looks at it: the next save tries again
            old.unlink(missing_ok=True)
            digest_path(old).unlink(missing_ok=True)
    remove_leftovers(folder)
    return path


def load_checkpoint(folder: str | Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that is whole, or None; tensors come on the CPU.

    A damaged one is named in a warning and put aside with its digest, lest a later one be counted against it, and the
    one before is used.
    """
    for path in reversed(list_checkpoints(folder)):
        if is_intact(path):
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            return path, state
        warnings.warn(
            f"checkpoint {path} is damaged or incomplete and is not used; going back to the one before", stacklevel=2
        )
        aside = path.with_suffix(".damaged")
        path.replace(aside)
        if digest_path(path).exists():
            digest_path(path).replace(digest_path(aside))
    return None


def save_weights(path: str | Path, net: torch.nn.Module) -> None:
    """The state dict as safetensors, with its SHA-256 beside it."""
    plain = torch.contiguous_format
    weights = {  # copies: the format has no word for two names of one tensor
        name: tensor.detach().cpu().clone(memory_format=plain) for name, tensor in net.state_dict().items()
    }
    write_digested(path, require("safetensors.torch").save(weights))


def load_weights(path: str | Path, net: torch.nn.Module) -> None:
    """Load what `save_weights` wrote, names and shapes all equal.

    Raises:
        RuntimeError: the file does not agree with the SHA-256 beside it, or belongs to another net.
    """
    path = Path(path)
    if not is_intact(path):
        raise RuntimeError(f"{path} and {digest_path(path).name} must be there and agree: it is damaged or incomplete")
    net.load_state_dict(require("safetensors.torch").load_file(path))
