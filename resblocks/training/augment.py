"""Random crop, flip, cutout and size of a whole batch on the device, as pure functions of (seed, step)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .recipe import Recipe


def derive_seed(purpose: str, *numbers: int) -> int:
    """A 63-bit seed for one purpose: near inputs give unrelated seeds, and nothing depends on what ran before."""
    text = " ".join([purpose, *map(str, numbers)]).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


@dataclass(frozen=True)
class Draws:
    """The random numbers of a batch of B images, each of shape (B,): the only randomness of an augmentation."""

    top: Tensor  # first row of the crop's window in the padded image
    left: Tensor
    mirrored: Tensor  # bool
    cutout_top: Tensor
    cutout_left: Tensor

    def __getitem__(self, rows: slice) -> Draws:
        return Draws(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))


def draw(
    recipe: Recipe, count: int, height: int, width: int, *, seed: int, step: int, device: torch.device | str = "cpu"
) -> Draws:
    """Draw for the images of one step over all processes together, so that 1 and 2 ranks augment alike.

    Raises:
        ValueError: the cutout is larger than the image, or the border to reflect wider than the image has pixels.
    """
    if recipe.cutout > min(height, width):
        raise ValueError(f"cutout must fit into the images of {height}x{width} pixels, got {recipe.cutout}")
    if recipe.crop >= min(height, width) and recipe.padding == "reflect":
        raise ValueError(
            f"crop must be smaller than the images of {height}x{width} pixels to reflect them, got {recipe.crop}"
        )
    generator = torch.Generator(device).manual_seed(derive_seed("augment", seed, step))

    def below(limit: int) -> Tensor:
        return torch.randint(limit, (count,), generator=generator, device=device)

    window, square = 2 * recipe.crop + 1, recipe.cutout
    mirrored = below(2).bool() & recipe.flip
    return Draws(below(window), below(window), mirrored, below(height - square + 1), below(width - square + 1))


def draw_first_flips(count: int, *, seed: int) -> Tensor:
    """Which of all images an alternating flip mirrors in the even epochs; in the odd ones it mirrors the others.

    So two epochs in a row show each image once as it is and once mirrored. Flips drawn anew show half of them twice in
    the same way, and a short run fewer different ones (K. Jordan 2024, arXiv:2404.00498).

    Shape: -> (count,) bool, on the CPU.
    """
    generator = torch.Generator().manual_seed(derive_seed("flip", seed))
    return torch.randint(2, (count,), generator=generator).bool()


def augment(images: Tensor, rows: Tensor, draws: Draws, recipe: Recipe, mean: Tensor, std: Tensor) -> Tensor:
    """Take images out of the whole set, crop, flip, normalise and cut out, in this order.

    Selection, crop and flip only say which pixel comes from where, so they are one indexing of the bytes.

    Args:
        images: the whole set. rows: which of its images. mean, std: per channel, of pixels in [0, 1].

    Shape: images (N, C, H, W) uint8, rows (B,) -> (B, C, H, W) float32.
    """
    channels, height, width = images.shape[1:]
    y, y_inside = _source(draws.top, height, recipe)
    x, x_inside = _source(draws.left, width, recipe)
    x = torch.where(rearrange(draws.mirrored, "b -> b 1"), x.flip(1), x)
    x_inside = torch.where(rearrange(draws.mirrored, "b -> b 1"), x_inside.flip(1), x_inside)
    taken = images[
        rearrange(rows, "b -> b 1 1 1"),
        rearrange(torch.arange(channels, device=images.device), "c -> 1 c 1 1"),
        rearrange(y, "b h -> b 1 h 1"),
        rearrange(x, "b w -> b 1 1 w"),
    ]
    out = normalise(taken, mean, std)
    if recipe.padding == "zeros" and recipe.crop:
        out = out * (rearrange(y_inside, "b h -> b 1 h 1") & rearrange(x_inside, "b w -> b 1 1 w"))
    return cutout(out, draws.cutout_top, draws.cutout_left, recipe.cutout) if recipe.cutout else out


def _source(first: Tensor, size: int, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """From which row (column) of the image each row of the window comes, and whether it lies inside: (B, size) each."""
    at = rearrange(first, "b -> b 1") - recipe.crop + torch.arange(size, device=first.device)
    inside = (at >= 0) & (at < size)
    if recipe.padding == "reflect":  # 2 1 | 0 1 2 3 | 2 1, the border itself not repeated
        return size - 1 - (size - 1 - at.abs()).abs(), inside
    return at.clamp(0, size - 1), inside


def resize(images: Tensor, scale: float) -> Tensor:
    """Images of another size, averaged over what falls into a pixel: (B, C, H, W) -> (B, C, scale * H, scale * W)."""
    if scale == 1:
        return images
    size = [max(1, round(scale * side)) for side in images.shape[-2:]]
    return F.interpolate(images, size=size, mode="bilinear", antialias=True)


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Bytes to numbers of mean 0 and standard deviation 1 per channel: (B, C, H, W) uint8 -> float32."""
    mean, std = (rearrange(255 * statistic, "c -> c 1 1") for statistic in (mean, std))
    return (images.float() - mean) / std


def cutout(images: Tensor, top: Tensor, left: Tensor, size: int) -> Tensor:
    """Zero (after normalisation the mean colour) in a square of `size` pixels per image (DeVries and Taylor 2017).

    Shape: images (B, C, H, W), top and left (B,) -> (B, C, H, W).
    """
    rows, columns = (torch.arange(n, device=images.device) for n in images.shape[-2:])
    inside_rows = (rows >= rearrange(top, "b -> b 1")) & (rows < rearrange(top, "b -> b 1") + size)
    inside_columns = (columns >= rearrange(left, "b -> b 1")) & (columns < rearrange(left, "b -> b 1") + size)
    square = rearrange(inside_rows, "b h -> b 1 h 1") & rearrange(inside_columns, "b w -> b 1 1 w")
    return images.masked_fill(square, 0.0)
