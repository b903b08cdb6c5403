"""Finished runs of sweep.py, and the training images on which their nets are looked at."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resblocks.training import Dataset, normalise


def parser_of(doc: str | None, results: Path, figure: Path) -> argparse.ArgumentParser:
    """The command line of a script that measures such nets, writes results and draws a figure of them."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*", help="of finished runs")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, default=results)
    parser.add_argument("--figure", type=Path, default=figure)
    parser.add_argument("--draw", action="store_true", help="draw the figure from the file, run nothing")
    return parser


def result_of(folder: Path, dataset: Dataset) -> dict[str, Any]:
    """What a run wrote when it ended; it must have been trained on that data."""
    result: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    if result["settings"]["dataset"].get("sha256") != dataset.key:
        raise SystemExit(f"error: {folder} was trained on other data than {dataset.name}")
    return result


def some_images(dataset: Dataset, count: int) -> tuple[Tensor, Tensor]:
    """So many training images, always the same, normalised and without augmentation, and their labels."""
    rows = torch.randperm(len(dataset.train_labels), generator=torch.Generator().manual_seed(0))[:count]
    return normalise(dataset.train_images[rows], dataset.mean, dataset.std), dataset.train_labels[rows]
