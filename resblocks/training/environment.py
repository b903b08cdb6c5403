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


def environment(device: torch.device, ranks: int = 1) -> dict[str, Any]:
    """Plain data to be kept beside a result."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("resblocks", "torchvision", "numpy"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "command": shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]]),
        "commit": commit(),
        "versions": versions,
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
        "processes": ranks,
    }


def commit() -> str | None:
    """The commit of the source that runs, with "+changes" where files differ from it; None outside a checkout."""
    folder = Path(__file__).resolve().parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, timeout=10, check=True
        )
        changes = subprocess.run(
            ["git", "status", "--porcelain", "--", str(folder.parent)],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores)"
