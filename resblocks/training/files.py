"""Files that are whole or not there: atomic writes, digests beside them, and the lock on an output folder."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import socket
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, TextIO

_TEMPORARY = ".tmp-"  # prefix of files under way
LEFTOVERS = f"{_TEMPORARY}{'[0-9a-f]' * 16}-*"  # what killed writers left; names of others are not like that


def sha256(data: bytes | memoryview | Path) -> str:
    """SHA-256 of bytes, or of a file's content, in hexadecimal."""
    if isinstance(data, Path):
        with data.open("rb") as file:
            return _digest(file)
    return hashlib.sha256(data).hexdigest()


def _digest(file: BinaryIO) -> str:  # hashlib.file_digest would need Python 3.11
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say what to do where the disk is full or not writable: a RuntimeError."""
    try:
        yield
    except OSError as error:
        raise RuntimeError(
            f"could not write {path}: {error.strerror or error}; free space there or choose another folder"
        ) from error


def write_atomic(path: str | Path, data: bytes | memoryview | str) -> None:
    """Write so that a reader, or a reader after a crash, sees the old file or the new one and never a part.

    The temporary file lies in the target's own folder, because a rename is atomic only within one file system; both
    the file and the folder's entry are forced to the disk.

    Raises:
        RuntimeError: the disk is full or not writable; what `path` held before is unharmed.
    """
    path = Path(path)
    # A name of chance: in containers that share a volume, all processes may have the number 1.
    temporary = path.with_name(f"{_TEMPORARY}{os.urandom(8).hex()}-{path.name}")
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("xb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)  # it has gone where the rename was reached


def no_link(path: str, flags: int) -> int:
    """For the argument `opener` of `open`: a link in a folder from elsewhere must not lead out of it."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some shared file systems cannot do that for a folder
            raise
    finally:
        os.close(descriptor)


def write_json(path: str | Path, value: Any) -> None:
    """`write_atomic` of indented JSON.

    Raises:
        ValueError: a number is infinite or NaN, which JSON does not have.
    """
    write_atomic(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def digest_path(path: Path) -> Path:
    """Where the SHA-256 of `path` is kept: beside it, in the format of `sha256sum -c`."""
    return path.with_name(path.name + ".sha256")


def write_digested(path: str | Path, data: bytes | memoryview) -> None:
    """`write_atomic` with the SHA-256 beside it, then read back and compare.

    The digest is taken of the bytes in memory, so that a fault on the way to the disk shows. It is written first: a
    crash between the two leaves a digest without its file, or an old file that no longer passes, never a pass for
    bytes that nobody checked.
    """
    path = Path(path)
    write_atomic(digest_path(path), f"{sha256(data)}  {path.name}\n")
    write_atomic(path, data)
    if not is_intact(path):
        raise RuntimeError(f"{path} does not read back as it was written: the disk or the memory is faulty")


def is_intact(path: Path) -> bool:
    """True when `path` and its digest are there and agree. One flipped bit in a tensor loads silently otherwise.

    Raises:
        RuntimeError: they cannot be read, which says nothing about what they hold.
    """
    try:
        return digest_path(path).read_bytes().split()[:1] == [sha256(path).encode()]
    except FileNotFoundError:
        return False
    except OSError as error:
        raise RuntimeError(
            f"could not read {path}: {error.strerror or error}; the same command goes on when the disk answers"
        ) from error


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of writers that were killed; call it only while holding the folder's lock."""
    for leftover in folder.glob(LEFTOVERS):
        leftover.unlink(missing_ok=True)


class FolderLock:
    """One run for one folder: `with FolderLock(folder): ...`.

    The lock is the operating system's, on a file in the folder that names process and host: it goes with the process,
    however that ends, so a killed run can go on at once. The file stays.

    Raises:
        RuntimeError: another run holds the folder, or it cannot be written to.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder).resolve() / "lock"
        self._file: TextIO | None = None

    def __enter__(self) -> FolderLock:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def acquire(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = open(self.path, "a+", encoding="utf-8", opener=no_link)  # noqa: SIM115
        except OSError as error:
            raise RuntimeError(f"{self.path.parent} cannot be an output folder: {error.strerror or error}") from error
        try:
            _lock(file)
        except BlockingIOError:
            file.seek(0)
            owner = file.read()
            file.close()
            raise RuntimeError(
                f"{self.path.parent} is in use by another run ({owner or 'just started'}): choose another output folder"
            ) from None
        except OSError as error:  # some file systems of clusters have no locks
            warnings.warn(f"{self.path.parent} has no lock ({error}): no other run may use it", stacklevel=2)
        self._file = file
        with writing(self.path):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()

    def release(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                _lock(self._file, False)  # for a forked child, which holds the file open, too
            with contextlib.suppress(OSError):  # what a full disk did not take is tried again
                self._file.close()
            self._file = None


def _lock(file: TextIO, on: bool = True) -> None:
    """Lock an open file until it is closed, or unlock it.

    Raises:
        BlockingIOError: it is locked.
    """
    if sys.platform == "win32":
        import msvcrt

        try:
            file.seek(2**30)  # it locks bytes: one far behind the text, which others are to read
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK if on else msvcrt.LK_UNLCK, 1)
        except OSError as error:
            raise BlockingIOError(str(error)) from error
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB if on else fcntl.LOCK_UN)
