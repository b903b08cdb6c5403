"""Finished runs of sweep.py, and the images on which their nets are looked at."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resblocks.training import Dataset, load_dataset, normalise
from resblocks.training.environment import environment
from resblocks.training.files import write_json


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


def measure_runs(
    options: argparse.Namespace, measure: Callable[[Path, dict[str, Any], Dataset], dict[str, Any]]
) -> None:
    """Write what `measure` finds of the net of each folder, from its folder, its result and the data."""
    dataset = load_dataset("cifar10", options.data_dir)
    found = {"dataset": dataset.name, "environment": environment(torch.device("cpu")), "nets": {}}
    for folder in options.folders:
        result = result_of(folder, dataset)
        found["nets"][result["name"]] = measure(folder, result, dataset)
        write_json(options.out, found)
        print(result["name"], flush=True)


def some_images(dataset: Dataset, count: int) -> tuple[Tensor, Tensor]:
    """So many training images, always the same, normalised and without augmentation, and their labels."""
    return some_of(dataset, dataset.train_images, dataset.train_labels, count)


def some_test_images(dataset: Dataset, count: int) -> tuple[Tensor, Tensor]:
    """So many test images, always the same, and their labels."""
    return some_of(dataset, dataset.test_images, dataset.test_labels, count)


def some_of(dataset: Dataset, images: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """So many of the images, normalised, and of the labels."""
    rows = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:count]
    return normalise(images[rows], dataset.mean, dataset.std), labels[rows]
