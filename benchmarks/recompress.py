"""A data set once more through JPEG: what a second loss costs says how much the first one may have cost.

python benchmarks/recompress.py data/cifar10-jpeg    # how far apart both are
"""

from __future__ import annotations

import io
import sys
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from resblocks.training.data import Dataset, load_cifar10

QUALITY = 75  # with 4:2:0 chroma, which is Pillow's default: as the images of CIFAR-10 that we have
SHIFT = 4  # pixels by which the blocks lie elsewhere: in the old ones hardly anything would be lost again


def recompressed(dataset: Dataset) -> Dataset:
    """All images, encoded and decoded, under a name that says so."""
    return replace(
        dataset,
        name=f"{dataset.name}, again through JPEG q{QUALITY}",
        train_images=through_jpeg(dataset.train_images),
        test_images=through_jpeg(dataset.test_images),
    )


def through_jpeg(images: Tensor) -> Tensor:
    """Shape: (N, 3, H, W) of bytes -> the same."""
    inside = np.s_[SHIFT:-SHIFT, SHIFT:-SHIFT]
    margins = ((SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0))
    decoded = np.empty_like(images.permute(0, 2, 3, 1).numpy(), order="C")
    for number, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        buffer = io.BytesIO()
        Image.fromarray(np.pad(image, margins, mode="reflect")).save(buffer, "jpeg", quality=QUALITY)
        decoded[number] = np.asarray(Image.open(buffer))[inside]
    return torch.from_numpy(decoded).permute(0, 3, 1, 2).contiguous()


def distances(images: Tensor, others: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB. Shape: twice (N, 3, H, W) of bytes -> (N,)."""
    error = (images.float() - others.float()).square().mean((1, 2, 3))
    return 10 * torch.log10(255**2 / error)


if __name__ == "__main__":
    images = load_cifar10(sys.argv[1], download=False).test_images
    print(f"median over {len(images)} test images: {distances(images, through_jpeg(images)).median():.1f} dB")
