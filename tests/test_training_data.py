"""Data sets: what is read is what was written, and what is missing or damaged is said in one line."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import struct
import sys
import tarfile
import time
import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from training_workers import tiny_dataset

from resblocks.training import Dataset, load_cifar10, load_cifar100, load_dataset, load_digits, load_folder, sources
from resblocks.training.files import digest_path

CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def _colour(index: int) -> tuple[int, int, int]:
    return (index * 16, 255 - index * 16, index)


def _write_tree(
    root: Path,
    classes: tuple[str, ...] = ("cat", "dog"),
    kind: str = "png",
    count: int = 3,
    size: tuple[int, int] = (6, 8),
) -> Path:
    """Images of one colour that says class and part."""
    for part, offset in (("train", 0), ("test", 1)):
        for index, name in enumerate(classes):
            folder = root / part / name
            folder.mkdir(parents=True)
            for number in range(count - offset):
                image = Image.new("RGB", size, _colour(index))
                image.save(folder / f"{number:04}.{kind}", **({"quality": 75} if kind == "jpg" else {}))
    return root


def _archive(tree: Path, target: Path, mode: str) -> Path:
    with tarfile.open(target, mode) as archive:
        for part in ("train", "test"):
            archive.add(tree / part, part)
    return target


def test_tree_becomes_tensors(tmp_path: Path) -> None:
    data = load_folder(_write_tree(tmp_path / "pets"), cache_dir=tmp_path / "cache")
    assert (data.name, data.classes, data.shape) == ("pets", ("cat", "dog"), (3, 8, 6))
    assert data.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.test_labels.tolist() == [0, 0, 1, 1]
    for image, label in zip(data.train_images, data.train_labels, strict=True):
        assert image[:, 0, 0].tolist() == list(_colour(int(label)))
        assert (image == image[:, :1, :1]).all()


@pytest.mark.parametrize(("suffix", "mode"), [(".tar", "w"), (".tar.gz", "w:gz"), (".tar.xz", "w:xz")])
def test_archive_of_a_tree_equals_the_tree(suffix: str, mode: str, tmp_path: Path) -> None:
    tree = _write_tree(tmp_path / "pets")
    archive = _archive(tree, tmp_path / f"packed{suffix}", mode)
    assert load_folder(archive, cache_dir=tmp_path / "cache").key == load_folder(tree, cache_dir=tmp_path / "cache").key


def test_of_a_file_replaced_in_an_archive_the_new_one_is_read(tmp_path: Path) -> None:
    """`tar -r` and `tar -u` leave the old one where it was."""
    tree = _write_tree(tmp_path / "pets")
    archive, image = _archive(tree, tmp_path / "pets.tar", "w"), "train/cat/0001.png"
    Image.new("RGB", (6, 8), (9, 9, 9)).save(tree / image)
    with tarfile.open(archive, "a") as more:
        more.add(tree / image, image)
    assert load_folder(archive, cache_dir=tmp_path / "cache").key == load_folder(tree, cache_dir=tmp_path / "cache").key


def test_cache_of_another_decoder_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree, cache = _write_tree(tmp_path / "pets"), tmp_path / "cache"
    key = load_folder(tree, cache_dir=cache).key
    monkeypatch.setattr(sources, "_DECODER", sources._DECODER + 1)
    monkeypatch.setattr(sources, "to_tensor", lambda image: torch.zeros(3, 8, 6, dtype=torch.uint8))
    assert load_folder(tree, cache_dir=cache).key != key


def test_cache_is_used_checked_and_follows_the_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree, cache = _write_tree(tmp_path / "pets"), tmp_path / "cache"
    key = load_folder(tree, cache_dir=cache).key
    (cached,) = cache.glob("pets-*.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(sources, "_decode", None)  # would raise
        assert load_folder(tree, cache_dir=cache).key == key
    content = bytearray(cached.read_bytes())
    content[-1] ^= 1
    cached.write_bytes(content)
    with pytest.warns(UserWarning, match="is damaged and is made anew"):
        assert load_folder(tree, cache_dir=cache).key == key
    assert load_folder(tree, cache_dir=cache).key == key
    Image.new("RGB", (6, 8), (9, 9, 9)).save(tree / "train" / "cat" / "0000.png")
    assert load_folder(tree, cache_dir=cache).key != key


def test_cache_that_cannot_be_written_costs_only_a_warning(tmp_path: Path) -> None:
    tree = _write_tree(tmp_path / "pets")
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="the decoded images are not kept"):
        assert load_folder(tree, cache_dir=tmp_path / "file" / "cache").shape == (3, 8, 6)


def test_a_cache_without_its_digest_is_not_trusted(tmp_path: Path) -> None:
    tree, cache = _write_tree(tmp_path / "pets"), tmp_path / "cache"
    load_folder(tree, cache_dir=cache)
    (cached,) = cache.glob("*.safetensors")
    digest_path(cached).unlink()
    with pytest.warns(UserWarning, match="made anew"):
        load_folder(tree, cache_dir=cache)


@pytest.mark.parametrize(("kind", "name"), [("jpg", "CIFAR-10 (JPEG q75)"), ("png", "CIFAR-10 (PNG)")])
def test_name_says_what_the_images_went_through(kind: str, name: str, tmp_path: Path) -> None:
    tree = _write_tree(tmp_path / "tree", CIFAR_CLASSES, kind, size=(32, 32))
    data = load_cifar10(tree, download=False, cache_dir=tmp_path / "cache")
    assert (data.name, data.classes) == (name, CIFAR_CLASSES)


def test_what_is_no_image_may_be_of_any_size(tmp_path: Path) -> None:
    tree = _write_tree(tmp_path / "pets")
    (tree / "all.zip").touch()
    os.truncate(tree / "all.zip", 2**43)
    assert len(load_folder(tree, cache_dir=tmp_path / "cache").train_images) == 6


def test_images_of_several_sizes_are_seen_before_all_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree, opened = _write_tree(tmp_path / "pets", count=9), []
    Image.new("RGB", (9, 9)).save(tree / "test" / "cat" / "0001.png")
    open_image = sources.open_image
    monkeypatch.setattr(sources, "open_image", lambda *args: opened.append(args) or open_image(*args))
    with pytest.raises(RuntimeError, match="must have one size"):
        load_folder(tree, cache_dir=tmp_path / "cache")
    assert len(opened) == 2


def test_archive_that_says_a_file_is_larger_than_the_memory_is_named(tmp_path: Path) -> None:
    member = tarfile.TarInfo("train/cat/0.png")
    member.size = 2**43
    (tmp_path / "pets.tar").write_bytes(member.tobuf())
    with pytest.raises(RuntimeError, match=r"train/cat/0\.png says it is larger than the memory: get it again"):
        load_folder(tmp_path / "pets.tar", cache_dir=tmp_path / "cache")


def test_images_of_another_size_are_not_cifar(tmp_path: Path) -> None:
    tree = _write_tree(tmp_path / "tree", CIFAR_CLASSES)
    with pytest.raises(RuntimeError, match=r"images of \(3, 8, 6\), those of CIFAR-10 are \(3, 32, 32\).*folder"):
        load_cifar10(tree, download=False, cache_dir=tmp_path / "cache")


def test_images_of_other_classes_are_not_cifar(tmp_path: Path) -> None:
    tree = _write_tree(tmp_path / "tree", size=(32, 32))
    with pytest.raises(RuntimeError, match="tree has 2 classes where CIFAR-10 has 10: give the right --data-dir"):
        load_cifar10(tree, download=False, cache_dir=tmp_path / "cache")


def test_links_to_folders_are_followed_but_not_upwards(tmp_path: Path) -> None:
    tree = _write_tree(tmp_path / "pets")
    for part in ("train", "test"):
        (tree / part / "fox").symlink_to(tree / part / "dog")
        (tree / part / "cat" / "up").symlink_to(tree)
    data = load_folder(tree, cache_dir=tmp_path / "cache")
    assert data.classes == ("cat", "dog", "fox")
    assert len(data.train_images) == 9


def test_link_to_what_is_not_there_raises(tmp_path: Path) -> None:
    tree = _write_tree(tmp_path / "pets")
    (tree / "train" / "cat" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(RuntimeError, match=r"gone\.png links to .*nowhere\.png, which is not there"):
        load_folder(tree, cache_dir=tmp_path / "cache")


def test_link_to_what_is_not_there_and_no_image_is_left_alone(tmp_path: Path) -> None:
    tree = _write_tree(tmp_path / "pets")
    (tree / "latest").symlink_to(tmp_path / "nowhere")
    assert len(load_folder(tree, cache_dir=tmp_path / "cache").train_images) == 6


def test_picture_of_a_camera_is_turned_as_it_was_held(tmp_path: Path) -> None:
    image = Image.new("RGB", (2, 4))
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.save(tmp_path / "a.png", exif=exif)
    turned = sources.open_image(tmp_path / "a.png", (tmp_path / "a.png").read_bytes())
    assert turned.size == (4, 2)
    assert turned.getpixel((3, 0)) == (255, 0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_that_of_pillow(orientation: int) -> None:
    image = Image.frombytes("L", (2, 3), bytes(range(6)))
    image.getexif()[0x0112] = orientation
    turned = ImageOps.exif_transpose(image)
    assert (sources.plain(image).size, sources.plain(image).tobytes()) == (turned.size, turned.tobytes())


@pytest.mark.parametrize(
    ("mode", "becomes"), [("1", "L"), ("L", "L"), ("LA", "L"), ("P", "RGB"), ("RGBA", "RGB"), ("CMYK", "RGB")]
)
def test_image_becomes_grey_or_coloured(mode: str, becomes: str) -> None:
    assert sources.plain(Image.new(mode, (2, 3))).mode == becomes


def test_archive_with_dots_in_its_names_is_read_whole(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "pets.tar", "w") as archive:
        archive.add(_write_tree(tmp_path / "pets"), "data/../pets")
    assert len(load_folder(tmp_path / "pets.tar", cache_dir=tmp_path / "cache").train_images) == 6


def test_archive_that_was_appended_to_counts_as_it_ends(tmp_path: Path) -> None:
    archive = _archive(_write_tree(tmp_path / "old"), tmp_path / "pets.tar", "w")
    _archive(_write_tree(tmp_path / "new", size=(4, 5)), archive, "a")
    assert load_folder(archive, cache_dir=tmp_path / "cache").shape == (3, 5, 4)


def test_links_in_a_ring_are_named(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "pets.tar", "w") as archive:
        for name, target in (("1.png", "2.png"), ("2.png", "1.png")):
            member = tarfile.TarInfo(f"train/cat/{name}")
            member.type, member.linkname = tarfile.SYMTYPE, target
            archive.addfile(member)
    with pytest.raises(RuntimeError, match=r"train/cat/1\.png in .* links to 2\.png, which is no file of the archive"):
        load_folder(tmp_path / "pets.tar", cache_dir=tmp_path / "cache")


def test_archive_that_changes_while_it_is_read_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = _archive(_write_tree(tmp_path / "first"), tmp_path / "pets.tar", "w")
    second = _archive(_write_tree(tmp_path / "second", ("x", "y")), tmp_path / "new.tar", "w")
    decode = sources._decode
    monkeypatch.setattr(sources, "_decode", lambda path: decode(second.replace(path)))
    with pytest.warns(UserWarning, match=r"are not kept: .*pets\.tar changed while it was read"):
        load_folder(first, cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_files_that_are_left_out_are_said(tmp_path: Path) -> None:
    tree = _write_tree(tmp_path / "pets")
    (tree / "train" / "cat" / "more").mkdir()
    Image.new("RGB", (6, 8)).save(tree / "train" / "cat" / "more" / "1.png")
    Image.new("RGB", (6, 8)).save(tree / "test" / "cat" / "2.tif")
    with pytest.warns(UserWarning, match=r"2 files of .*pets are left out, .*: no images \.jpg"):
        assert len(load_folder(tree, cache_dir=tmp_path / "cache").train_images) == 6


def test_grey_images_among_coloured_ones_become_coloured(tmp_path: Path) -> None:
    tree = _write_tree(tmp_path / "pets")
    Image.new("L", (6, 8), 7).save(tree / "train" / "cat" / "0000.png")
    assert load_folder(tree, cache_dir=tmp_path / "cache").train_images[0].unique().tolist() == [7]


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_links_in_an_archive_lead_to_their_files(kind: bytes, tmp_path: Path) -> None:
    archive = _archive(_write_tree(tmp_path / "pets"), tmp_path / "pets.tar", "w")
    with tarfile.open(archive, "a") as more:
        link = tarfile.TarInfo("train/cat/again.png")
        link.type, link.linkname = kind, "train/dog/0000.png" if kind == tarfile.LNKTYPE else "../dog/0000.png"
        more.addfile(link)
    data = load_folder(archive, cache_dir=tmp_path / "cache")
    assert data.train_images[3, :, 0, 0].tolist() == list(_colour(1))
    with tarfile.open(archive, "a") as more:
        link.name, link.linkname = "train/cat/gone.png", "../../elsewhere.png"
        more.addfile(link)
    with pytest.raises(RuntimeError, match=r"gone.png in .*pets.tar links to .*elsewhere.png, which is no file of"):
        load_folder(archive, cache_dir=tmp_path / "cache")


def test_hidden_files_are_no_images(tmp_path: Path) -> None:
    tree = _write_tree(tmp_path / "pets")
    (tree / "train" / "cat" / "._0000.png").write_bytes(b"what macOS keeps of a file")
    (tree / "train" / ".cache").mkdir()
    Image.new("RGB", (6, 8)).save(tree / "train" / ".cache" / "1.png")
    data = load_folder(tree, cache_dir=tmp_path / "cache")
    assert (data.classes, len(data.train_images)) == (("cat", "dog"), 6)


def test_image_of_too_many_pixels_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(RuntimeError, match=r"cat/0000.png is not an image that can be used \(.*decompression bomb"):
        load_folder(_write_tree(tmp_path / "pets"), cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("fault", [("home", RuntimeError("no home")), ("exists", PermissionError("not searchable"))])
def test_cache_that_cannot_be_found_costs_only_a_warning(
    fault: tuple[str, Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise fault[1]

    tree = _write_tree(tmp_path / "pets")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, fault[0], fail)
    with pytest.warns(UserWarning, match=f"the decoded images are not kept: {fault[1]}"):
        assert load_folder(tree).shape == (3, 8, 6)


def test_file_put_in_the_place_of_another_is_noticed(tmp_path: Path) -> None:
    """`cp -p` and rsync keep size and time."""
    tree, cache = _write_tree(tmp_path / "pets", kind="bmp"), tmp_path / "cache"
    key, old = load_folder(tree, cache_dir=cache).key, tree / "train" / "cat" / "0000.bmp"
    about = old.stat()
    Image.new("RGB", (6, 8), (9, 9, 9)).save(tmp_path / "new.bmp")
    os.utime(tmp_path / "new.bmp", ns=(about.st_atime_ns, about.st_mtime_ns))
    (tmp_path / "new.bmp").replace(old)
    assert (old.stat().st_size, old.stat().st_mtime_ns) == (about.st_size, about.st_mtime_ns)
    assert load_folder(tree, cache_dir=cache).key != key


def test_what_killed_writers_left_in_the_cache_goes_after_an_hour(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    for name, age in {
        f".tmp-{'1' * 16}-a.safetensors": 4000,
        f".tmp-{'2' * 16}-b.safetensors.sha256": 4000,
        f".tmp-{'3' * 16}-c.safetensors": 0,
        ".tmp-notes.txt": 4000,
    }.items():
        (cache / name).write_text("")
        os.utime(cache / name, (time.time() - age,) * 2)
    load_folder(_write_tree(tmp_path / "pets"), cache_dir=cache)
    left = {path.name for path in cache.glob(".tmp-*")}
    assert left == {f".tmp-{'3' * 16}-c.safetensors", ".tmp-notes.txt"}


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file system that takes any bytes")
def test_folder_whose_name_is_not_utf8_is_read(tmp_path: Path) -> None:
    tree = _write_tree(tmp_path / os.fsdecode(b"caf\xe9"))
    for _ in range(2):
        assert load_folder(tree, cache_dir=tmp_path / "cache").name == "caf?"


@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_truncated_archive_is_named(keep: float, tmp_path: Path) -> None:
    archive = _archive(_write_tree(tmp_path / "tree", CIFAR_CLASSES, count=20), tmp_path / "cifar.tar.xz", "w:xz")
    content = archive.read_bytes()
    archive.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(RuntimeError, match=r"cifar.tar.xz is truncated or damaged \(.*\): get it again"):
        load_cifar10(archive, cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def _empty(tree: Path) -> None:
    for file in tree.rglob("*.png"):
        file.unlink()


def _one_class_less(tree: Path) -> None:
    for file in (tree / "test" / "dog").iterdir():
        file.unlink()


def _odd_size(tree: Path) -> None:
    Image.new("RGB", (9, 9)).save(tree / "train" / "dog" / "0001.png")


def _deep_image(tree: Path) -> None:
    Image.new("I;16", (6, 8)).save(tree / "train" / "dog" / "0001.png")


def _deep_colours(kind: int, channels: int, tree: Path) -> None:
    """A PNG of 16 bits a channel, which Pillow reads but does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header, rows = struct.pack(">IIBBBBB", 6, 8, 16, kind, 0, 0, 0), bytes(8 * (1 + 6 * 2 * channels))
    png = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (tree / "train" / "dog" / "0001.png").write_bytes(b"\x89PNG\r\n\x1a\n" + png)


def _postscript(tree: Path) -> None:
    (tree / "train" / "dog" / "0001.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 8\nshowpage\n")


def _endless(tree: Path) -> None:
    os.truncate(tree / "train" / "dog" / "0001.png", 2**43)


def _second_place(tree: Path) -> None:
    _write_tree(tree / "backup")


def _broken_image(tree: Path) -> None:
    file = tree / "train" / "dog" / "0001.png"
    file.write_bytes(file.read_bytes()[:40])


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (_empty, "holds no images in train/<class>/ and test/<class>/: --data-dir needs"),
        (_one_class_less, "the classes of train/ and test/ differ: dog in only one of them"),
        (
            _odd_size,
            r"must have one size, test/cat/0000.png is \(3, 8, 6\), train/dog/0001.png is \(3, 9, 9\)",
        ),
        (_broken_image, "dog/0001.png is not an image that can be used"),
        (_deep_image, "dog/0001.png is not an image that can be used .its pixels have more than 8 bits, mode I;16"),
        (partial(_deep_colours, 2, 3), "dog/0001.png is not an image .*more than 8 bits, mode RGB;16B"),
        (partial(_deep_colours, 4, 2), "dog/0001.png is not an image .*more than 8 bits, mode LA;16B"),
        (_postscript, r"dog/0001.png is not an image that can be used \(cannot identify"),  # nor is it run
        (_endless, "dog/0001.png says it is larger than the memory"),
        (_second_place, r"holds train/ and test/ in more than one place \(., backup\)"),
    ],
)
def test_faulty_trees_are_refused(fault, message: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    fault(_write_tree(tmp_path / "pets"))
    with pytest.raises(RuntimeError, match=message):
        load_folder(tmp_path / "pets", cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("name", ["missing", "missing.tar.xz"])
def test_missing_folder_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="is neither a folder nor a tar archive"):
        load_folder(tmp_path / name)
    with pytest.raises(
        RuntimeError, match=r"CIFAR-10.*(give --data-dir a folder|put cifar-10-python.tar.gz there).*--dataset digits"
    ):
        load_cifar10(tmp_path / name, download=False)


def test_cifar_out_of_reach_says_what_to_do_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "CIFAR10", replace(sources.CIFAR10, url="http://127.0.0.1:9/cifar-10-python.tar.gz"))
    with pytest.raises(
        RuntimeError, match=r"cannot be reached .*Connection refused.*put cifar-10-python.tar.gz there"
    ) as error:
        load_cifar10(tmp_path / "data")
    assert "\n" not in str(error.value)
    assert list((tmp_path / "data").iterdir()) == []


# The official format, with MD5s of our own small files in torchvision's tables


def _official(kind: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    import torchvision

    source = getattr(torchvision.datasets, kind)
    label = "labels" if kind == "CIFAR10" else "fine_labels"
    files = {}
    for number, (name, _) in enumerate([*source.train_list, *source.test_list]):
        pixels = torch.full((4, 3072), number, dtype=torch.uint8).numpy()
        files[name] = pickle.dumps({"data": pixels, label: [0, 1, 2, number]})
    meta = {"label_names": list(CIFAR_CLASSES), "fine_label_names": [f"class{number}" for number in range(100)]}
    files[source.meta["filename"]] = pickle.dumps(meta)
    md5 = {name: hashlib.md5(data, usedforsecurity=False).hexdigest() for name, data in files.items()}
    for table in ("train_list", "test_list"):
        monkeypatch.setattr(source, table, [[name, md5[name]] for name, _ in getattr(source, table)])
    monkeypatch.setitem(source.meta, "md5", md5[source.meta["filename"]])
    return {f"{source.base_folder}/{name}": data for name, data in files.items()}


def _pack(files: dict[str, bytes], target: Path) -> Path:
    with tarfile.open(target, "w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return target


@pytest.mark.parametrize(("kind", "load", "train"), [("CIFAR10", load_cifar10, 20), ("CIFAR100", load_cifar100, 4)])
@pytest.mark.parametrize("form", ["archive", "folder of the archive", "unpacked", "folder of the unpacked"])
def test_official_files_are_read_in_every_form(
    kind, load, train: int, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    files = _official(kind, monkeypatch)
    where = tmp_path
    if "archive" in form:
        packed = _pack(files, tmp_path / getattr(sources, kind).archive)
        where = packed if form == "archive" else tmp_path
    else:
        for name, data in files.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(data)
        where = tmp_path / next(iter(files)).split("/")[0] if form == "unpacked" else tmp_path
    data = load(where, download=False)
    assert len(data.train_images) == train
    assert len(data.test_images) == 4
    assert len(data.classes) == getattr(sources, kind).num_classes
    assert data.train_images[:, 0, 0, 0].tolist() == sorted(number for number in range(train // 4) for _ in range(4))
    assert data.test_labels.tolist() == [0, 1, 2, train // 4]


def test_archive_wins_over_a_folder_that_lacks_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = _official("CIFAR10", monkeypatch)
    _pack(files, tmp_path / sources.CIFAR10.archive)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(b"")
    assert len(load_cifar10(tmp_path, download=False).train_images) == 20
    (tmp_path / sources.CIFAR10.archive).unlink()
    with pytest.raises(RuntimeError, match=r"data_batch_1 in .* is truncated or damaged"):
        load_cifar10(tmp_path, download=False)


def test_official_file_with_a_flipped_bit_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = _official("CIFAR10", monkeypatch)
    name = "cifar-10-batches-py/data_batch_3"
    files[name] = files[name][:-1] + bytes([files[name][-1] ^ 1])
    _pack(files, tmp_path / sources.CIFAR10.archive)
    with pytest.raises(
        RuntimeError, match=r"data_batch_3 in .* is truncated or damaged .its MD5 is wrong.: get https://"
    ):
        load_cifar10(tmp_path)


def test_official_archive_that_lacks_a_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = _official("CIFAR10", monkeypatch)
    del files["cifar-10-batches-py/test_batch"]
    _pack(files, tmp_path / sources.CIFAR10.archive)
    with pytest.raises(RuntimeError, match="lacks test_batch"):
        load_cifar10(tmp_path)


def test_download_is_checked_and_leaves_nothing_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = _pack(_official("CIFAR10", monkeypatch), tmp_path / "served.tar.gz")
    digest = hashlib.sha256(packed.read_bytes()).hexdigest()
    official = replace(sources.CIFAR10, url=packed.as_uri(), digest=digest)
    monkeypatch.setattr(sources, "CIFAR10", official)
    assert len(load_cifar10(tmp_path / "data").train_images) == 20
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["cifar-10-python.tar.gz"]
    monkeypatch.setattr(sources, "CIFAR10", replace(official, digest="0" * 64))
    with pytest.raises(RuntimeError, match="invalid hash"):
        load_cifar10(tmp_path / "other")
    assert list((tmp_path / "other").iterdir()) == []


def test_loader_by_name_passes_the_options_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "download_url_to_file", None)  # would raise
    for name in ("cifar10", "cifar100"):
        with pytest.raises(RuntimeError, match=r"is not in .*empty: put"):
            load_dataset(name, tmp_path / "empty", download=False)
    load_dataset("folder", _write_tree(tmp_path / "pets"), cache_dir=tmp_path / "cache")
    assert list((tmp_path / "cache").glob("pets-*.safetensors"))


# Digits, splits and checks


def test_digits_are_real_and_split_for_good() -> None:
    data = load_digits()
    assert (data.name, data.shape, len(data.classes)) == ("digits", (1, 8, 8), 10)
    assert (len(data.train_images), len(data.test_images)) == (1433, 364)
    assert torch.bincount(data.test_labels).min() >= 35
    assert data.key == load_dataset("digits").key
    assert int(data.train_images.max()) == 255
    assert not (set(map(bytes, data.train_images.numpy())) & set(map(bytes, data.test_images.numpy())))


def test_moments_are_those_of_the_training_pixels() -> None:
    data = load_digits()
    pixels = data.train_images.double() / 255
    assert data.mean.item() == pytest.approx(pixels.mean().item(), rel=1e-6)
    assert data.std.item() == pytest.approx(pixels.std(correction=0).item(), rel=1e-6)


def test_moments_of_many_images_and_of_a_single_colour() -> None:
    images, labels = torch.randint(256, (5001, 1, 1, 1), dtype=torch.uint8), torch.zeros(5001, dtype=torch.int64)
    images[:5000] //= 4  # all but the last batch of the sums
    data = Dataset("x", ("a",), images, labels, images, labels)
    pixels = images.double() / 255
    assert data.mean.item() == pytest.approx(pixels.mean().item(), rel=1e-6)
    assert data.std.item() == pytest.approx(pixels.std(correction=0).item(), rel=1e-6)
    assert replace(data, train_images=torch.full_like(images, 7)).std.item() > 0


@pytest.mark.parametrize("part", ["train_images", "train_labels", "test_images", "test_labels"])
def test_key_is_that_of_images_and_labels(part: str) -> None:
    data = tiny_dataset()
    changed = getattr(data, part).clone()
    changed[0] = (changed[0] + 1) % 3
    assert replace(data, **{part: changed}).key != data.key


def test_validation_keeps_each_image_with_its_label() -> None:
    labels = torch.arange(50)
    images = labels.to(torch.uint8).view(-1, 1, 1, 1)
    split = Dataset("x", tuple(map(str, range(50))), images, labels, images, labels).with_validation(20)
    assert torch.equal(split.test_images.flatten(), split.test_labels)
    assert torch.equal(split.train_images.flatten(), split.train_labels)


def test_validation_comes_out_of_the_training_images_only() -> None:
    data = load_digits()
    split = data.with_validation(200, seed=3)
    assert (split.split, len(split.train_images), len(split.test_images)) == ("validation", 1233, 200)
    both = torch.cat([split.train_images, split.test_images])
    assert sorted(map(bytes, both.numpy())) == sorted(map(bytes, data.train_images.numpy()))
    assert split.key == data.with_validation(200, seed=3).key
    assert split.key != data.with_validation(200, seed=4).key
    with pytest.raises(ValueError, match="validation must leave images on both sides of 1433, got 1433"):
        data.with_validation(1433)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_labels": torch.zeros(3, dtype=torch.int64)}, "train_labels must be 4 int64"),
        ({"test_labels": torch.full((4,), 2)}, r"test_labels must lie in 0..1, got 2..2"),
        ({"train_images": torch.zeros(4, 3, 2, 2)}, "train_images must be uint8"),
        ({"test_images": torch.zeros(4, 1, 2, 2, dtype=torch.uint8)}, "differ in shape"),
        ({"train_images": torch.zeros(0, 3, 2, 2, dtype=torch.uint8)}, "train_images must be uint8 of shape"),
        ({"classes": (0, 1)}, r"classes must be distinct str, got \(0, 1\)"),
        ({"classes": ("a", "a")}, r"classes must be distinct str, got \('a', 'a'\)"),
    ],
)
def test_dataset_that_does_not_fit_together_is_refused(change: dict[str, Any], message: str) -> None:
    images, labels = torch.zeros(4, 3, 2, 2, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)
    fine = Dataset("x", ("a", "b"), images, labels, images, labels)
    with pytest.raises(ValueError, match=message):
        replace(fine, **change)


def test_unknown_dataset_is_refused() -> None:
    with pytest.raises(ValueError, match="no data set is named 'mnist'; there are cifar10, cifar100, digits, folder"):
        load_dataset("mnist")


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((6, 1, 8, 8), np.uint8), "train_images must be a torch.Tensor, got ndarray"),
        (torch.zeros(6, 8, 8, 3, dtype=torch.uint8), r"looks like \(N, H, W, C\): images.permute"),
    ],
)
def test_images_in_another_form_are_named(images, message):
    labels = torch.zeros(6, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        Dataset("x", ("a",), images, labels, images, labels)
