"""Files that are whole or not there: atomic writes, digests beside them, and the lock on an output folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, ClassVar

_TEMPORARY = ".tmp-"  # prefix of files under way; what a killed writer left is found, and removed, by it


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


def write_atomic(path: str | Path, data: bytes | memoryview | str) -> None:
    """Write so that a reader, or a reader after a crash, sees the old file or the new one and never a part.

    The temporary file lies in the target's own folder, because a rename is atomic only within one file system; both
    the file and the folder's entry are forced to the disk.

    Raises:
        RuntimeError: the disk is full or not writable; what `path` held before is unharmed.
    """
    path = Path(path)
    temporary = path.with_name(f"{_TEMPORARY}{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise RuntimeError(
            f"could not write {path}: {error.strerror or error}; free space there or choose another folder"
        ) from error


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str | Path, value: Any) -> None:
    """`write_atomic` of indented JSON."""
    write_atomic(path, json.dumps(value, indent=1) + "\n")


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
    """True when `path` and its digest are there and agree. One flipped bit in a tensor loads silently otherwise."""
    try:
        return digest_path(path).read_text().split()[:1] == [sha256(path)]
    except (OSError, UnicodeDecodeError):
        return False


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of writers that were killed; call it only while holding the folder's lock."""
    for leftover in folder.glob(f"{_TEMPORARY}*"):
        leftover.unlink(missing_ok=True)


class FolderLock:
    """One run for one folder: `with FolderLock(folder): ...`.

    The lock is a file created with O_EXCL that names process and host. A lock whose process is dead on this very host
    is taken over (a killed run must be able to go on); one of another host is respected, since nobody can ask there.

    Raises:
        RuntimeError: another run holds the folder.
    """

    _held: ClassVar[set[Path]] = set()  # by this very process, which is alive whatever its number says

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder).resolve() / "lock"

    def __enter__(self) -> FolderLock:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def acquire(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(100):
            try:
                descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            except FileExistsError:
                if self._take_over():
                    break
                continue
            with os.fdopen(descriptor, "w") as file:
                file.write(self._owner())
            break
        else:
            raise RuntimeError(f"could not get {self.path}: other runs keep taking it")
        self._held.add(self.path)

    def release(self) -> None:
        if self.path in self._held:
            self._held.discard(self.path)
            self.path.unlink(missing_ok=True)

    @staticmethod
    def _owner() -> str:
        return json.dumps({"pid": os.getpid(), "host": socket.gethostname()})

    def _take_over(self) -> bool:
        """True: the dead owner's lock is ours now. False: it vanished meanwhile, try again."""
        with contextlib.suppress(FileNotFoundError), self.path.open("r+") as file, _exclusive(file.fileno()):
            owner = self._read_owner(file)
            if self.path in self._held or not _is_dead(owner):
                who = f"process {owner.get('pid', 'unknown')} on {owner.get('host', 'an unknown host')}"
                raise RuntimeError(
                    f"{self.path.parent} is in use by another run ({who}): "
                    f"choose another output folder, or remove {self.path} if that run is gone"
                )
            file.seek(0)
            file.truncate()
            file.write(self._owner())
            file.flush()
            # Ours only if the name still leads to the file that we wrote: its owner may have removed it since.
            return os.path.samestat(os.fstat(file.fileno()), os.stat(self.path))
        return False

    @staticmethod
    def _read_owner(file: Any) -> dict[str, Any]:
        for _ in range(50):  # between creating the lock and naming its owner lies a moment
            file.seek(0)
            with contextlib.suppress(json.JSONDecodeError):
                owner = json.loads(file.read())
                return owner if isinstance(owner, dict) else {}
            time.sleep(0.02)
        return {}  # killed in that moment


def _is_dead(owner: dict[str, Any]) -> bool:
    if not owner:
        return True
    if owner.get("host") != socket.gethostname() or os.name != "posix":  # os.kill(pid, 0) is no question on Windows
        return False
    try:
        os.kill(int(owner["pid"]), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, KeyError, ValueError):
        return False
    return int(owner["pid"]) == os.getpid()  # our own number from a life before (containers start at low numbers)


@contextlib.contextmanager
def _exclusive(descriptor: int) -> Iterator[None]:
    """Only one process at a time may take over a dead lock."""
    if os.name != "posix":
        yield
        return
    import fcntl

    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
