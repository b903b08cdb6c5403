"""How large the weights of each layer were when training began, and are now that it has ended.

    python benchmarks/weights.py FOLDER ... --data-dir data/cifar10-jpeg    # seconds

The folders are those of finished runs of `sweep.py`. The size is the norm of the whole tensor. Behind a batch norm it
changes nothing that a convolution hands on, but the gradient of the weight is inversely proportional to it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torch import nn
from trained import measure_runs

from resblocks.training import Dataset, load_trained
from resblocks.training.experiment import build_net

RESULTS = Path(__file__).resolve().parent / "results" / "weights_cpu_2026-11.json"


def measure(folder: Path, result: dict[str, Any], dataset: Dataset) -> dict[str, Any]:
    """The norms at the start, drawn again from the seed, and at the end, in the order of the layers."""
    start = norms(build_net(result["name"], dataset, result["settings"]["seed"]))
    end = norms(load_trained(folder).net)
    return {"settings": result["settings"], "norms": {name: [start[name], end[name]] for name in start}}


def norms(net: nn.Module) -> dict[str, float]:
    """Of the weights of convolutions and linear layers, by name."""
    return {name: float(weight.detach().norm()) for name, weight in net.named_parameters() if weight.dim() > 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="of finished runs")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    measure_runs(parser.parse_args(), measure)


if __name__ == "__main__":
    main()
