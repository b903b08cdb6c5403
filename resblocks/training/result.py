"""What a finished run leaves behind, as plain data: numbers by epoch, gradients by layer, and how it was made."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .extras import require

TITLES = {  # as the papers write the names
    r"^baseline_cnn_(\d+)": r"Baseline CNN-\1",
    r"^baseline_cnn": "Baseline CNN",
    r"^densenet(\d+)": r"DenseNet-\1",
    r"^resnet(\d+)": r"ResNet-\1",
    r"^preact_resnet(\d+)": r"Pre-activation ResNet-\1",
    r"^wrn_(\d+)_(\d+)": r"WRN-\1-\2",
    r"^resnext(\d+)_(\d+x\d+d)": r"ResNeXt-\1, \2",
    r"^densenet_bc_(\d+)_(\d+)": r"DenseNet-BC (L=\1, k=\2)",
    r"^densenet_(\d+)_(\d+)": r"DenseNet (L=\1, k=\2)",
    r"_torchinit": " from torch's draw",
    r"_noskip": " without skips",
    r"_bn$": " with batch norm",
}


def title(variant: str) -> str:
    """A variant in words."""
    for name, words in TITLES.items():
        variant = re.sub(name, words, variant)
    return variant


def seeds_in_words(runs: Iterable[tuple[str, int]]) -> str:
    """The seeds of runs given as (net, seed): "seeds 0, 1".

    Where the nets have different ones: "1 to 3 of the seeds 0, 1, 2 a net".
    """
    by_net: dict[str, set[int]] = {}
    for net, seed in runs:
        by_net.setdefault(net, set()).add(seed)
    used = sorted({seed for seeds in by_net.values() for seed in seeds})
    named = f"seed{'s' * (len(used) > 1)} {', '.join(map(str, used))}"
    counts = sorted({len(seeds) for seeds in by_net.values()})
    if counts == [len(used)]:
        return named
    return f"{' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} of the {named} a net"


def mean_and_std(values: Sequence[float], digits: int) -> str:
    """The value of a single run, or mean, sample standard deviation and number of several."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f} (n={len(values)})"


def interval(values: Sequence[float]) -> str:
    """Student's 95 % interval of the mean, cut at 0 and 100 %, which no accuracy exceeds; nothing for a single run."""
    if len(values) < 2:
        return ""
    quantile = require("scipy.stats", "scipy").t.ppf(0.975, len(values) - 1)
    mean, half = statistics.fmean(values), quantile * statistics.stdev(values) / len(values) ** 0.5
    return f"{max(mean - half, 0.0):.2f} to {min(mean + half, 100.0):.2f}"


def by_name(results: Sequence[Result]) -> list[list[Result]]:
    """The results of each net, which are its seeds."""
    seeds: dict[str, list[Result]] = {}
    for result in results:
        seeds.setdefault(result.name, []).append(result)
    return list(seeds.values())


@dataclass
class Result:
    """One net, one recipe, one seed. Accuracy is that of the last epoch: the best one would be chosen on the test set.

    Args:
        name: of the net.
        params: how many parameters it has.
        settings: what the numbers depend on; a folder holds one run of one setting.
        environment: what they were made with: versions, device, command, commit.
        epochs: for each {epoch, step, lr, train_loss, train_accuracy_percent, eval_loss, eval_accuracy_percent,
            images_per_second, seconds, eval_seconds}.
        gradients: for each epoch {epoch, layers: [{name, mean_abs, norm}, ...]}; epoch 0 is the net at its
            initialisation.
        model: what `load_trained` needs beside the weights, {config, classes, shape, mean, std}; runs from before it
            was written have none.
        earlier_environments: those of the parts before a resume that differ from `environment`, oldest first.
    """

    name: str
    params: int
    settings: dict[str, Any]
    environment: dict[str, Any]
    epochs: list[dict[str, Any]] = field(default_factory=list)
    gradients: list[dict[str, Any]] = field(default_factory=list)
    model: dict[str, Any] = field(default_factory=dict)
    earlier_environments: list[dict[str, Any]] = field(default_factory=list)

    @property
    def accuracy_percent(self) -> float:
        return float(self.epochs[-1]["eval_accuracy_percent"])

    @property
    def loss(self) -> float:
        return float(self.epochs[-1]["eval_loss"])

    @property
    def seconds(self) -> float:
        """Of training, evaluation not counted."""
        return float(sum(epoch["seconds"] for epoch in self.epochs))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def read(cls, path: str | Path) -> Result:
        """The result in a file.

        Raises:
            ValueError, TypeError: it is damaged.
        """
        result = cls(**json.loads(Path(path).read_text(encoding="utf-8")))
        if not result.epochs:
            raise ValueError(f"{path} holds no epochs")
        return result
