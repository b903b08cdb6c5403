"""What a finished run leaves behind, as plain data: numbers by epoch, gradients by layer, and how it was made."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

TITLES = {
    "baseline_cnn": "Baseline CNN",
    "baseline_cnn_bn": "Baseline CNN with batch norm",
}


def title(variant: str) -> str:
    """A variant in words."""
    said = re.sub(r"^resnet(\d+)", r"ResNet-\1", variant)
    return TITLES.get(variant) or said.replace("_noskip", " without skips").replace("_bn", " with batch norm")


@dataclass
class Result:
    """One net, one recipe, one seed. Accuracy is that of the last epoch: the best one would be chosen on the test set.

    `epochs`: per epoch {epoch, step, lr, train_loss, train_accuracy_percent, eval_loss, eval_accuracy_percent,
    images_per_second, seconds, eval_seconds}. `gradients`: {epoch, layers: [{name, mean_abs, norm}, ...]}, epoch 0 is
    the net at its initialisation. `model`: what `load_trained` needs beside the weights, {config, classes, shape, mean,
    std}; runs from before it was written have none. `earlier_environments`: those of the parts before a resume that
    differ from `environment`, oldest first.
    """

    name: str
    params: int
    settings: dict[str, Any]  # what the numbers depend on; a folder holds one run of one setting
    environment: dict[str, Any]  # what they were made with: versions, device, command, commit
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
        result = cls(**json.loads(Path(path).read_text()))
        if not result.epochs:
            raise ValueError(f"{path} holds no epochs")
        return result
