"""Where the bytes come from: official CIFAR archives, checked by digest, and trees of image files, decoded once."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import lzma
import os
import pickle
import posixpath
import re
import tarfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from .extras import require
from .files import LEFTOVERS, is_intact, sha256, write_digested

_IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".webp")
# What Pillow may take a file for, whatever its name says: others of its readers start programs (PostScript's).
_FORMATS = ("JPEG", "PNG", "BMP", "PPM", "WEBP", "GIF", "TIFF")
_PARTS = ("train", "test")
_DECODER = 2  # to be raised where other images or pixels come out of the same files: what is cached is decoded again
_DAMAGED = (tarfile.ReadError, EOFError, lzma.LZMAError, zlib.error, OSError, ValueError, OverflowError)
Tensors = tuple[Tensor, Tensor, Tensor, Tensor]  # train images and labels, test images and labels


def is_archive(path: Path) -> bool:
    """True for a file whose name says tar archive, compressed or not."""
    return path.is_file() and (".tar" in path.suffixes or path.suffix in (".tgz", ".txz"))


def stem(path: Path) -> str:
    """The name of a folder, or of an archive without its endings; "?" for what of it is not UTF-8."""
    name = path.name.partition(".")[0] if is_archive(path) else path.resolve().name
    return name.encode(errors="replace").decode()


def members(path: Path, wanted: Callable[[PurePosixPath], bool]) -> Iterator[tuple[PurePosixPath, bytes | None]]:
    """The files of a folder or of a tar archive, in sorted or archive order; nothing is unpacked to the disk.

    Those that are not wanted come without their content, which may be any size.

    Raises:
        RuntimeError: the archive is truncated or damaged, or holds a link to what is no file of it; a wanted file is
            larger than the memory.
    """
    if path.is_dir():
        for file in _files(path):
            name = PurePosixPath(file.relative_to(path).as_posix())
            with _in_memory(file):
                content = file.read_bytes() if wanted(name) else None
            yield name, content
        return
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.isfile() or member.islnk() or member.issym():
                    name = PurePosixPath(posixpath.normpath(member.name))
                    with _in_memory(path / name):
                        content = _content(path, archive, member) if wanted(name) else None
                    yield name, content
    except _DAMAGED as error:
        raise RuntimeError(f"{path} is truncated or damaged ({error}): get it again") from error


@contextlib.contextmanager
def _in_memory(name: Path) -> Iterator[None]:
    try:
        yield
    except MemoryError as error:
        raise RuntimeError(f"{name} says it is larger than the memory: get it again or remove it") from error


def _content(path: Path, archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """Of a file, or of the file in the archive that a link leads to."""
    try:
        content = archive.extractfile(member)
    except (KeyError, RecursionError):  # the second: links in a ring
        content = None
    if content is None:
        raise RuntimeError(
            f"{member.name} in {path} links to {member.linkname}, which is no file of the archive: "
            f"pack it with tar --dereference"
        )
    return content.read()


def _files(folder: Path) -> list[Path]:
    """All files below a folder, those behind links to folders too, sorted.

    Raises:
        RuntimeError: a folder that cannot be read, or a link to what is not there.
    """
    found = []
    for where, folders, names in os.walk(folder, followlinks=True, onerror=_unreadable):
        here = Path(where)
        above = {os.path.realpath(one) for one in (here, *here.parents) if one.is_relative_to(folder)}
        folders[:] = [name for name in folders if os.path.realpath(here / name) not in above]  # links upwards
        for file in (here / name for name in names):
            is_image = file.suffix.lower() in _IMAGES and not file.name.startswith(".")
            if is_image and file.is_symlink() and not file.exists():
                raise RuntimeError(f"{file} links to {file.readlink()}, which is not there: get it again or remove it")
            found += [file] if file.is_file() else []
    return sorted(found)


def _unreadable(error: OSError) -> None:
    raise RuntimeError(f"{error.filename} cannot be read: {error.strerror or error}") from error


# Official archives


@dataclass(frozen=True)
class Official:
    """An official CIFAR archive; every batch file is compared with the MD5 that torchvision holds before it is read."""

    url: str
    archive: str
    digest: str  # SHA-256 of the archive, as published with Keras
    torchvision_name: str
    labels: str
    meta_classes: str

    @property
    def num_classes(self) -> int:
        return 100 if self.labels == "fine_labels" else 10

    def find(self, path: Path) -> Path | None:
        """The archive or the unpacked folder: `path` itself or inside it, a folder that lacks files last."""
        folder = self._torchvision().base_folder
        candidates = (path / folder, path / self.archive, path)
        found = [place for place in candidates if place.name in (folder, self.archive) and place.exists()]
        found.sort(key=lambda place: place.is_dir() and not all((place / name).exists() for name in self._wanted()))
        return found[0] if found else None

    def download(self, folder: Path) -> Path:
        """Fetch the archive: it gets its name only when it is whole and its SHA-256 is right."""
        target = folder / self.archive
        folder.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(self.url, str(target), hash_prefix=self.digest, progress=os.isatty(2))
        return target

    def read(self, path: Path) -> tuple[tuple[str, ...], Tensor, Tensor, Tensor, Tensor]:
        """Classes, train images and labels, test images and labels.

        Raises:
            RuntimeError: a file is missing or is not the published one.
        """
        source = self._torchvision()
        train, test, wanted = dict(source.train_list), dict(source.test_list), self._wanted()
        content: dict[str, Any] = {}
        for name, data in members(path, lambda name: name.name in wanted):
            if data is not None:
                # MD5 guards against damage; pickle is loaded only for bytes that are the published ones.
                if hashlib.md5(data, usedforsecurity=False).hexdigest() != wanted[name.name]:
                    raise RuntimeError(
                        f"{name.name} in {path} is truncated or damaged (its MD5 is wrong): get {self.url} again"
                    )
                content[name.name] = pickle.loads(data, encoding="latin1")
        if missing := sorted(set(wanted) - set(content)):
            raise RuntimeError(f"{path} lacks {', '.join(missing)}: get {self.url} again")
        classes = tuple(content[source.meta["filename"]][self.meta_classes])
        return classes, *self._stack(content, list(train)), *self._stack(content, list(test))

    def _stack(self, content: dict[str, Any], names: list[str]) -> tuple[Tensor, Tensor]:
        images = torch.cat([torch.as_tensor(content[name]["data"]) for name in names])
        labels = [label for name in names for label in content[name][self.labels]]
        return rearrange(images, "n (c h w) -> n c h w", c=3, h=32), torch.tensor(labels)

    def _wanted(self) -> dict[str, str]:
        """The files with their MD5."""
        source = self._torchvision()
        return {**dict(source.train_list), **dict(source.test_list), source.meta["filename"]: source.meta["md5"]}

    def _torchvision(self) -> Any:
        return getattr(require("torchvision.datasets"), self.torchvision_name)


_HOST = "https://www.cs.toronto.edu/~kriz/"
CIFAR10 = Official(
    url=_HOST + "cifar-10-python.tar.gz",
    archive="cifar-10-python.tar.gz",
    digest="6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
    torchvision_name="CIFAR10",
    labels="labels",
    meta_classes="label_names",
)
CIFAR100 = Official(
    url=_HOST + "cifar-100-python.tar.gz",
    archive="cifar-100-python.tar.gz",
    digest="85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
    torchvision_name="CIFAR100",
    labels="fine_labels",
    meta_classes="fine_label_names",
)


# Trees of image files


@dataclass(frozen=True)
class Tree:
    """A decoded tree; `encoding` says what the images went through, e.g. "JPEG q75"."""

    classes: tuple[str, ...]
    encoding: str
    tensors: Tensors


def is_tree(path: Path) -> bool:
    """A folder with train/ in it, or a tar archive: something that `read_tree` can try."""
    return is_archive(path) or (path.is_dir() and (path / "train").is_dir())


def read_tree(path: Path, cache_dir: str | Path | None = None) -> Tree:
    """Decode train/<class>/* and test/<class>/*, or take what an earlier call decoded.

    The cache is one safetensors file under the key of content and decoder, whole and with its SHA-256 or not there.

    Raises:
        RuntimeError: nothing there, damaged, or images and classes that do not belong together.
    """
    if not (is_archive(path) or path.is_dir()):
        raise RuntimeError(
            f"{path} is neither a folder nor a tar archive: --data-dir needs train/<class>/ and test/<class>/ images"
        )
    safetensors = require("safetensors.torch")
    key = _content_key(path)
    try:
        cached = _cache_folder(cache_dir) / f"{stem(path)}-{key[:16]}-{_DECODER}.safetensors"
        is_there = cached.exists()
        is_sound = is_there and is_intact(cached)
    except (RuntimeError, OSError) as error:  # no home, or a folder that may not be searched
        warnings.warn(f"the decoded images are not kept: {error}", stacklevel=2)
        return _decode(path)
    if is_sound:
        return _unpack(safetensors.load_file(cached))
    if is_there:
        warnings.warn(f"{cached} is damaged and is made anew", stacklevel=2)
    tree = _decode(path)
    if _content_key(path) != key:
        warnings.warn(f"the decoded images are not kept: {path} changed while it was read", stacklevel=2)
        return tree
    about = json.dumps({"classes": tree.classes, "encoding": tree.encoding}).encode()
    names = ("train_images", "train_labels", "test_images", "test_labels")
    packed = {
        **dict(zip(names, tree.tensors, strict=True)),
        "about": torch.frombuffer(bytearray(about), dtype=torch.uint8),
    }
    try:
        write_digested(cached, safetensors.save(packed))
        _remove_leftovers(cached.parent)
    except RuntimeError as error:  # a cache is a convenience
        warnings.warn(f"the decoded images are not kept: {error}", stacklevel=2)
    return tree


def _remove_leftovers(cache: Path) -> None:
    """Remove what writers left that were killed; others may be writing, but none for an hour."""
    for leftover in cache.glob(LEFTOVERS):
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime > 3600:
                leftover.unlink()


def _unpack(packed: dict[str, Tensor]) -> Tree:
    about = json.loads(bytes(packed["about"].tolist()))
    tensors = packed["train_images"], packed["train_labels"], packed["test_images"], packed["test_labels"]
    return Tree(tuple(about["classes"]), about["encoding"], tensors)


def _cache_folder(cache_dir: str | Path | None) -> Path:
    if cache_dir is not None:
        return Path(cache_dir)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "resblocks"


def _content_key(path: Path) -> str:
    """Of an archive its bytes; of a folder names, sizes and times of all files, since reading them is the slow part."""
    if path.is_file():
        return sha256(path)
    listing = [(file.relative_to(path).as_posix(), file.stat()) for file in _files(path)]
    # A file put in the place of another may have its size and time, but not its inode and time of change, too.
    said = [(name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for name, s in listing]
    return sha256(repr(said).encode())


def _decode(path: Path) -> Tree:
    images: dict[PurePosixPath, Tensor] = {}
    encoding, others = None, []
    for name, data in members(path, _is_image_of_tree):
        if data is None:
            others += [name] if {*_PARTS} & {*name.parts[:-1]} and not _is_hidden(name) else []
            continue
        image = to_tensor(open_image(path / name, data))
        if name not in images:  # at once, before a tree of photographs fills the memory
            _same_size(path, {**dict(itertools.islice(images.items(), 1)), name: image})
        images[name] = image  # an archive may hold a name twice: the last counts
        encoding = encoding or _encoding(data)
    if len(roots := {name.parts[:-3] for name in images}) > 1:
        where = ", ".join("/".join(root) or "." for root in sorted(roots))
        raise RuntimeError(
            f"{path} holds train/ and test/ in more than one place ({where}): give --data-dir one of them"
        )
    if others:
        left_out = f"{len(others)} files of {path} are left out, {others[0]} for instance"
        warnings.warn(f"{left_out}: no images {', '.join(_IMAGES)} in train/<class>/ or test/<class>/", stacklevel=2)
    parts = {part: sorted(name for name in images if name.parts[-3] == part) for part in _PARTS}
    if encoding is None or not all(parts.values()):
        empty = " and ".join(f"{part}/<class>/" for part, names in parts.items() if not names)
        raise RuntimeError(f"{path} holds no images in {empty}: --data-dir needs train/<class>/ and test/<class>/")
    _same_size(path, images)
    classes = _same_classes(path, parts)
    if len({len(image) for image in images.values()}) > 1:  # grey images among coloured ones
        images = {name: image.expand(3, -1, -1) for name, image in images.items()}
    train, test = (_stack([images[name] for name in names], names, classes) for names in parts.values())
    return Tree(classes, encoding, (*train, *test))


def _is_image_of_tree(name: PurePosixPath) -> bool:
    """train/<class>/<image>, in an archive perhaps under a folder of its own."""
    is_image = name.suffix.lower() in _IMAGES and not _is_hidden(name)
    return is_image and len(name.parts) >= 3 and name.parts[-3] in _PARTS


def _is_hidden(name: PurePosixPath) -> bool:
    return any(part.startswith(".") for part in name.parts)  # such as the ._1.jpg beside 1.jpg of macOS


def _stack(images: list[Tensor], names: list[PurePosixPath], classes: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    return torch.stack(images), torch.tensor([classes.index(name.parts[-2]) for name in names])


def _same_classes(path: Path, parts: dict[str, list[PurePosixPath]]) -> tuple[str, ...]:
    train, test = ({name.parts[-2] for name in names} for names in parts.values())
    if train != test:
        raise RuntimeError(
            f"{path}: the classes of train/ and test/ differ: {', '.join(sorted(train ^ test))} in only one of them"
        )
    return tuple(sorted(train))


def _same_size(path: Path, images: dict[PurePosixPath, Tensor]) -> None:
    shapes = {name: tuple(image.shape) for name, image in images.items()}
    first = next(iter(shapes))
    for name, shape in shapes.items():
        if shape[1:] != shapes[first][1:]:
            raise RuntimeError(f"{path}: all images must have one size, {first} is {shapes[first]}, {name} is {shape}")


def open_image(name: Path, data: bytes) -> Any:
    """The image of Pillow, grey or coloured, in a file's content; the file's name is for the error.

    Raises:
        RuntimeError: it cannot be decoded, or has more than 8 bits.
    """
    pillow = require("PIL.Image", "pillow")
    try:
        with pillow.open(io.BytesIO(data), formats=_FORMATS) as image:
            return plain(image)
    except (OSError, SyntaxError, ValueError, pillow.DecompressionBombError) as error:
        raise RuntimeError(f"{name} is not an image that can be used ({error}): get it again or remove it") from error


_ORIENTATION = 0x0112  # of EXIF
_TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


def plain(image: Any) -> Any:
    """An image of Pillow the right way up, as grey or coloured, 8 bits each.

    Raises:
        ValueError: it has more.
    """
    if not hasattr(image, "getexif"):
        raise ValueError(
            f"image must be a tensor, an image of Pillow or the path of a file, got {type(image).__name__}"
        )
    # Of 16-bit colours the mode does not tell, and loading would cut them: how they are stored does.
    stored = re.search(r"\w+;16[BLN]", str(getattr(image, "tile", "")))
    if image.mode[0] in "IF" or stored:
        raise ValueError(f"its pixels have more than 8 bits, mode {stored[0] if stored else image.mode}")
    image.load()
    turn = _TURNS.get(image.getexif().get(_ORIENTATION))  # cameras store how they were held
    image = image.transpose(require("PIL.Image", "pillow").Transpose[turn]) if turn else image
    if image.mode in ("L", "RGB"):
        return image
    return image.convert("L" if image.mode in ("1", "LA") else "RGB")


def to_tensor(image: Any) -> Tensor:
    """A grey or coloured image of Pillow as (C, H, W) uint8."""
    width, height = image.size
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return rearrange(flat, "(h w c) -> c h w", h=height, w=width)


def _encoding(data: bytes) -> str:
    """ "JPEG q75", found by comparing the quantisation tables with those of each quality; else the format's name."""
    pillow = require("PIL.Image", "pillow")
    with pillow.open(io.BytesIO(data), formats=_FORMATS) as image:
        if image.format != "JPEG":
            return str(image.format)
        tables = image.quantization
    for quality in range(1, 101):
        buffer = io.BytesIO()
        pillow.new("RGB", (8, 8)).save(buffer, "JPEG", quality=quality)
        with pillow.open(buffer) as image:
            if image.quantization == tables:
                return f"JPEG q{quality}"
    return "JPEG"
