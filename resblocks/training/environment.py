"""With what a number was made: command, commit, versions, device. No names of machines or people."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from resblocks._products import processor_name


def environment(device: torch.device, ranks: int = 1, **more: Any) -> dict[str, Any]:
    """Plain data to be kept beside a result, with what else the caller wants to be said."""
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for package in ("resblocks", "torchvision", "numpy"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "command": _command(),
        "commit": commit(),
        "versions": versions,
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
        "processes": ranks,
        **more,
    }


def commit() -> str | None:
    """The commit of the source that runs, with "+changes" where files differ from it; None outside a checkout of it."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(
            command, cwd=here.parent, capture_output=True, text=True, timeout=30, check=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # an installed copy may lie in the checkout of something else
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", "..") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _command() -> str:
    """How the programme was started, without the folders of its file and of absolute paths."""
    first = Path(sys.argv[0])
    start = ["python", "-m", __package__] if first.name == "__main__.py" else [first.name]
    return shlex.join([*start, *map(_without_folders, sys.argv[1:])])


def _without_folders(argument: str) -> str:
    """An argument with the last part of an absolute path alone: the folders before may name people and machines."""
    option, equals, value = ("", "", argument) if Path(argument).is_absolute() else argument.partition("=")
    return f"{option}{equals}{Path(value).name}" if Path(value).is_absolute() else argument


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = processor_name().replace(",", "")
    said = [platform.machine(), torch.backends.cpu.get_cpu_capability(), *([name] if name else [])]
    return f"{device.type} ({', '.join(said)}, {os.cpu_count()} cores)"
