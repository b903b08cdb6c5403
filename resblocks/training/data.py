"""Data sets as whole tensors of bytes: CIFAR-10 and CIFAR-100, trees of image files, and the embedded digits."""

from __future__ import annotations

import functools
import hashlib
import urllib.error
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from einops import rearrange, reduce
from torch import Tensor

from resblocks.checks import check_integer

from . import sources
from .augment import derive_seed
from .extras import require


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images and labels, training part and evaluation part, each as one tensor.

    Args:
        name: what a result on it says, "CIFAR-10 (JPEG q75)" for instance.
        classes: their names, in the order of the labels.
        train_images, train_labels: the training part.
        test_images, test_labels: the evaluation part.
        split: what the evaluation part is: test or validation.

    Shape: images (N, C, H, W) uint8; labels (N,) int64; mean, std (C,) of the training pixels in [0, 1].

    Raises:
        ValueError: shapes, labels and classes do not belong together.
    """

    name: str
    classes: tuple[str, ...]
    train_images: Tensor = field(repr=False)
    train_labels: Tensor = field(repr=False)
    test_images: Tensor = field(repr=False)
    test_labels: Tensor = field(repr=False)
    split: str = "test"

    def __post_init__(self) -> None:
        if not all(isinstance(name, str) for name in self.classes) or len({*self.classes}) < len(self.classes):
            raise ValueError(f"classes must be distinct str, got {self.classes}")
        for part in ("train", "test"):
            images, labels = getattr(self, f"{part}_images"), getattr(self, f"{part}_labels")
            _check_tensor(f"{part}_images", images)
            _check_tensor(f"{part}_labels", labels)
            if images.ndim != 4 or images.dtype != torch.uint8 or len(images) == 0:
                raise ValueError(
                    f"{part}_images must be uint8 of shape (N, C, H, W), got {images.dtype} {tuple(images.shape)}"
                )
            if images.shape[3] in (1, 3) and images.shape[1] > 4:
                raise ValueError(
                    f"{part}_images must be of shape (N, C, H, W), got {tuple(images.shape)}, which looks like "
                    f"(N, H, W, C): images.permute(0, 3, 1, 2)"
                )
            if labels.shape != (len(images),) or labels.dtype != torch.int64:
                raise ValueError(f"{part}_labels must be {len(images)} int64, got {labels.dtype} {tuple(labels.shape)}")
            if not 0 <= int(labels.min()) <= int(labels.max()) < len(self.classes):
                low, high, last = int(labels.min()), int(labels.max()), len(self.classes) - 1
                raise ValueError(f"{part}_labels must lie in 0..{last}, got {low}..{high}")
        if self.train_images.shape[1:] != self.test_images.shape[1:]:
            raise ValueError(
                f"train and test images differ in shape: {self.train_images.shape[1:]}, {self.test_images.shape[1:]}"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one image."""
        channels, height, width = self.train_images.shape[1:]
        return channels, height, width

    @functools.cached_property
    def _moments(self) -> tuple[Tensor, Tensor]:
        sums = torch.zeros(2, self.shape[0], dtype=torch.float64)
        for images in self.train_images.split(5000):  # float64 of the whole of CIFAR-10 would be 1.2 GB
            pixels = images.cpu().double() / 255
            sums += torch.stack([reduce(pixels, "n c h w -> c", "sum"), reduce(pixels.square(), "n c h w -> c", "sum")])
        mean, square = sums / (len(self.train_images) * self.shape[1] * self.shape[2])
        return mean.float(), (square - mean.square()).clamp_min(1e-8).sqrt().float()

    @property
    def mean(self) -> Tensor:
        return self._moments[0]

    @property
    def std(self) -> Tensor:
        return self._moments[1]

    @functools.cached_property
    def key(self) -> str:
        """SHA-256 of all images and labels; two runs on the same key saw the same data."""
        digest = hashlib.sha256()
        for tensor in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            digest.update(tensor.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def with_validation(self, count: int, seed: int = 0) -> Dataset:
        """Hold `count` training images out for selection (45k/5k of He et al. 2015); the test set is not touched.

        Raises:
            ValueError: no image would be left on one side.
        """
        check_integer(0, validation=count)
        if not 0 < count < len(self.train_images):
            raise ValueError(f"validation must leave images on both sides of {len(self.train_images)}, got {count}")
        generator = torch.Generator().manual_seed(derive_seed("validation", seed))
        order = torch.randperm(len(self.train_images), generator=generator)
        held, kept = order[:count].sort().values, order[count:].sort().values
        return replace(
            self,
            train_images=self.train_images[kept],
            train_labels=self.train_labels[kept],
            test_images=self.train_images[held],
            test_labels=self.train_labels[held],
            split="validation",
        )


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a torch.Tensor, got {type(value).__name__}; torch.from_numpy makes one")


def load_dataset(
    name: str, data_dir: str | Path = "data", *, download: bool = True, cache_dir: str | Path | None = None
) -> Dataset:
    """A data set by name: cifar10, cifar100, digits, or folder (any tree train/<class>/, test/<class>/).

    Raises:
        ValueError: no such name.
        RuntimeError: the data are missing, damaged or not reachable; the message says what to do.
    """
    if name not in DATASETS:
        raise ValueError(f"no data set is named {name!r}; there are {', '.join(DATASETS)}")
    return DATASETS[name](Path(data_dir), download, cache_dir)


def load_digits() -> Dataset:
    """Real handwritten digits that come with scikit-learn, 1,797 images of 8x8, nothing to download.

    Every fifth image of each class is for the test (364), the rest for training (1,433). The images stay 8x8: enlarging
    them would add cost but no information.
    """
    digits = require("sklearn.datasets", "scikit-learn").load_digits()
    pixels = torch.as_tensor(digits.images) * (255 / 16)  # counts 0..16 of set pixels in 4x4 squares
    images = rearrange(pixels.round().to(torch.uint8), "n h w -> n 1 h w")
    labels = torch.as_tensor(digits.target).long()
    test = torch.zeros(len(images), dtype=torch.bool)
    for digit in range(10):
        test[(labels == digit).nonzero()[::5, 0]] = True
    classes = tuple(str(digit) for digit in digits.target_names)
    return Dataset("digits", classes, images[~test], labels[~test], images[test], labels[test])


def load_folder(path: str | Path, *, name: str | None = None, cache_dir: str | Path | None = None) -> Dataset:
    """A tree train/<class>/*, test/<class>/* of images of one size, or a tar archive of such a tree.

    Decoding is done once and kept in `cache_dir` (default: resblocks in the user's cache folder).
    """
    tree = sources.read_tree(Path(path), cache_dir)
    return Dataset(name or sources.stem(Path(path)), tree.classes, *tree.tensors)


def load_cifar10(data_dir: str | Path = "data", download: bool = True, cache_dir: str | Path | None = None) -> Dataset:
    """CIFAR-10 (Krizhevsky 2009): 50,000 + 10,000 images of 32x32.

    `data_dir` is the official archive, its unpacked folder, a folder with one of these (where a download goes, too),
    or the same images as files in train/<class>/, test/<class>/, also as a tar archive. Files that went through JPEG
    are another data set, slightly blurred: the name says so.
    """
    return _load_cifar("CIFAR-10", sources.CIFAR10, Path(data_dir), download, cache_dir)


def load_cifar100(data_dir: str | Path = "data", download: bool = True, cache_dir: str | Path | None = None) -> Dataset:
    """CIFAR-100 with its 100 fine labels; `data_dir` as for `load_cifar10`."""
    return _load_cifar("CIFAR-100", sources.CIFAR100, Path(data_dir), download, cache_dir)


def _load_cifar(
    title: str, official: sources.Official, data_dir: Path, download: bool, cache_dir: str | Path | None
) -> Dataset:
    if found := official.find(data_dir):
        return Dataset(title, *official.read(found))
    if sources.is_tree(data_dir):
        tree, other = sources.read_tree(data_dir, cache_dir), "give the right --data-dir, or --dataset folder"
        if len(tree.classes) != official.num_classes:
            raise RuntimeError(
                f"{data_dir} has {len(tree.classes)} classes where {title} has {official.num_classes}: {other}"
            )
        images = tree.tensors[0]
        if images.shape[1:] != (3, 32, 32):
            raise RuntimeError(
                f"{data_dir} has images of {tuple(images.shape[1:])}, those of {title} are (3, 32, 32): {other}"
            )
        return Dataset(f"{title} ({tree.encoding})", tree.classes, *tree.tensors)
    options = (
        f"put {official.archive} there, give --data-dir a folder or archive with train/<class>/ and test/<class>/ "
        f"images, or take --dataset digits"
    )
    if data_dir.suffix and not data_dir.is_dir():
        raise RuntimeError(f"{title}: {data_dir} is not there or not a readable archive of it; {options}")
    if not download:
        raise RuntimeError(f"{title} is not in {data_dir}: {options}")
    try:
        return Dataset(title, *official.read(official.download(data_dir)))
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", None) or error
        raise RuntimeError(
            f"{title} is not in {data_dir} and {official.url} cannot be reached ({reason}): {options}"
        ) from error


DATASETS: dict[str, Callable[[Path, bool, str | Path | None], Dataset]] = {
    "cifar10": load_cifar10,
    "cifar100": load_cifar100,
    "digits": lambda data_dir, download, cache_dir: load_digits(),
    "folder": lambda data_dir, download, cache_dir: load_folder(data_dir, cache_dir=cache_dir),
}
