"""The folder of a finished run as something that names what is in an image."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from resblocks.config import from_config, to_config
from resblocks.undisturbed import unwrapped

from .augment import normalise
from .checkpoint import load_weights
from .data import Dataset
from .result import Result
from .sources import open_image, plain, to_tensor

if TYPE_CHECKING:
    from PIL.Image import Image


def describe(net: nn.Module, dataset: Dataset) -> dict[str, Any]:
    """What it takes to use the weights, as plain data; `config` is None where the net has none."""
    try:
        config = to_config(net) if net is unwrapped(net) else None  # whose weights have other names
        json.dumps(config, allow_nan=False)
    except Exception:  # no net of ours, one that was changed, nameless or infinite arguments, a constructor's error
        config = None
    return {
        "config": config,
        "classes": list(dataset.classes),
        "shape": list(dataset.shape),
        "mean": dataset.mean.tolist(),
        "std": dataset.std.tolist(),
    }


class Trained(nn.Module):
    """A trained net behind the pixels' normalisation, and before the names of its classes; `load_trained` makes it.

    Evaluated in float32 and with the run's test-time augmentation; a run in bfloat16 may have rounded otherwise.

    Shape: images (N, C, H, W) uint8 of the training images' shape -> probabilities (N, classes).

    Raises:
        ValueError: images of another type or shape.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, result: Result) -> None:
        super().__init__()
        self.net, self.classes, self.shape = net, tuple(result.model["classes"]), tuple(result.model["shape"])
        self.flip = result.settings["recipe"]["tta"] == "flip"
        device = next(net.parameters()).device
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(result.model[name], device=device))

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8 or images.shape[1:] != self.shape:
            expected = ", ".join(map(str, self.shape))
            raise ValueError(f"images must be uint8 of shape (N, {expected}), got {images.dtype} {tuple(images.shape)}")
        pixels = normalise(images.to(self.mean.device), self.mean, self.std).to(next(self.net.parameters()).dtype)
        logits: Tensor = self.net(pixels).float()
        if self.flip:
            logits = (logits + self.net(pixels.flip(3)).float()) / 2
        return logits.softmax(1)

    def train(self, mode: bool = True) -> Trained:
        """Stay in evaluation mode."""
        return super().train(False)

    def predict(self, image: Tensor | Image | str | Path) -> dict[str, float]:
        """The probability of each class, the likeliest first, for one image: (C, H, W) uint8, of Pillow, or a file.

        Files and images of Pillow become grey or coloured as those of the training, and are resized to their size.

        Raises:
            ValueError: something else, a tensor of another type or shape, pixels of more than 8 bits, no tensor for
                a net that takes neither grey nor coloured images.
            RuntimeError: a file that is not such an image.
        """
        picture: Any = None
        if isinstance(image, (str, Path)):
            picture = open_image(Path(image), Path(image).read_bytes())
        elif not isinstance(image, Tensor):
            picture = plain(image)
        if picture is not None:
            channels, height, width = self.shape
            if channels not in (1, 3):
                raise ValueError(f"image must be a tensor for a net of {channels} channels, got {image!r}")
            image = to_tensor(picture.convert("L" if channels == 1 else "RGB").resize((width, height)))
        assert isinstance(image, Tensor)
        found = self(image[None])[0]
        return {self.classes[index]: found[index].item() for index in found.argsort(descending=True).tolist()}


def load_trained(folder: str | Path, net: nn.Module | None = None, *, trust: Sequence[str] = ()) -> Trained:
    """The net that `fit` left in a folder, in evaluation mode; `.to("cuda")` moves it.

    Args:
        net: takes the weights; None builds it from the config in result.json, which nets of this package have.
        trust: modules of your own that the config may name, see `resblocks.config.from_config`.

    Raises:
        ValueError: no finished run, one that does not say mean, std and classes, or a net that a config cannot say.
        RuntimeError: the weights are damaged, or of another net.
    """
    path = Path(folder) / "result.json"
    try:
        result = Result.read(path)
    except (OSError, ValueError, TypeError, KeyError) as error:
        inside = sorted(found.parent.name for found in Path(folder).glob("*/result.json"))
        hint = f"; it has those of {', '.join(inside)}" if inside else ""
        raise ValueError(f"folder must hold a finished run, got {folder} ({error}){hint}") from error
    if not {"mean", "std", "classes", "shape", "config"} <= result.model.keys():
        raise ValueError(f"folder must hold a run that says mean, std and classes, {path} does not: use load_weights")
    if net is None:
        if result.model["config"] is None:
            raise ValueError(f"net must be given: {path} holds no config of {result.name}")
        net = from_config(result.model["config"], trust=trust)
    load_weights(path.with_name("weights.safetensors"), net)
    return Trained(net, result).eval()
