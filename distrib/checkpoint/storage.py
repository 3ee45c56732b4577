"""The few file operations behind a checkpoint, each a method, so that a test can make the n-th one fail."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from distrib.checkpoint.location import Location, Url
from distrib.checkpoint.store import Store, Write

LOCK_MAGIC = "distrib-checkpoint lock"
_RENAME_EXCHANGE = 2  # linux/fs.h
_AT_FDCWD = -100  # linux/fcntl.h
_OWNER_S = 1.0
_WRITEBACK = 32 * 2**20  # bytes
_WRITE = 2  # SYNC_FILE_RANGE_WRITE, linux/fs.h
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOLCK, errno.EPERM)


_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)  # Linux has it
if _sync_file_range is not None:
    _sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


class LockedError(OSError):
    """Another owner holds a lock; the message says who."""


class Storage:
    """Local or mounted file systems.

    Every method raises `OSError` as the system reports it. Files are created anew, never through a link, with the
    permissions that the umask leaves.
    """

    def make_dirs(self, path: Path) -> None:
        """Create a directory and its parents where they are missing."""
        path.mkdir(parents=True, exist_ok=True)

    def make_dir(self, path: Path) -> None:
        """Create a directory that must not exist."""
        path.mkdir()

    def create(self, path: Path) -> int:
        """Create a file that must not exist and return its descriptor."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)

    def write(self, file: int, data: bytes | memoryview) -> None:
        """Append all of `data`."""
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(file, rest) :]

    def start_writeback(self, file: int, start: int, size: int) -> None:
        """Let the system begin to bring a range of a file to the medium, where it can; nothing waits for it."""
        if _sync_file_range is not None:
            _sync_file_range(file, start, size, _WRITE)

    def sync(self, file: int) -> None:
        """Wait until a file's bytes are on the medium."""
        os.fsync(file)

    def close(self, file: int) -> None:
        """Close a descriptor, which also gives back a lock that it holds."""
        os.close(file)

    def sync_dir(self, path: Path) -> None:
        """Wait until a directory's entries are on the medium."""
        file = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(file)
        finally:
            os.close(file)

    def rename(self, source: Path, target: Path) -> None:
        """Give a directory or file another name; an existing file or empty directory there is replaced."""
        source.rename(target)

    def exchange(self, a: Path, b: Path) -> bool:
        """Swap two directories in one atomic step; returns False where the system cannot."""
        renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
        if renameat2 is None:
            return False
        if renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
            return True
        code = ctypes.get_errno()
        if code in _UNSUPPORTED:
            return False
        raise OSError(code, os.strerror(code), str(b))

    def unlink(self, path: Path) -> None:
        """Remove a file or a link."""
        path.unlink()

    def remove_dir(self, path: Path) -> None:
        """Remove an empty directory."""
        path.rmdir()

    def free_bytes(self, path: Path) -> int:
        """Return how many bytes an ordinary user can still write below `path`."""
        found = os.statvfs(path)
        return found.f_bavail * found.f_frsize

    def lock(self, path: Path) -> int:
        """Take the lock file `path` for this process and return its descriptor.

        The system gives the lock back when the process ends, however it ends. Where locks are not supported
        (some network file systems), the owner's host and pid in the file decide.

        Raises:
            LockedError: if a live owner has it.
        """
        while True:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            try:
                _take(file, path)
                if _same_file(file, path):  # else its owner removed it between our open and our lock
                    os.ftruncate(file, 0)
                    os.pwrite(file, f"{LOCK_MAGIC}\n{socket.gethostname()}\n{os.getpid()}\n".encode(), 0)
                    return file
            except OSError:
                os.close(file)
                raise
            os.close(file)


def remove_tree(storage: Storage, path: Path) -> None:
    """Remove a directory and all below it; links are removed, not followed."""
    with os.scandir(path) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        if entry.is_dir(follow_symlinks=False):
            remove_tree(storage, path / entry.name)
        else:
            storage.unlink(path / entry.name)
    storage.remove_dir(path)


@contextmanager
def writing(storage: Storage, path: Path, *, durable: bool) -> Iterator[Write]:
    """Create a file and give what appends to it; the file is whole when the body has ended without an error.

    Args:
        storage: The file operations.
        path: A file that does not exist.
        durable: Whether to end only when the bytes are on the medium.
    """
    file = storage.create(path)
    try:
        yield _Durable(storage, file).write if durable else partial(storage.write, file)
        if durable:
            storage.sync(file)
    finally:
        storage.close(file)


class _Durable:
    """Appends to a file that is going to be synced: the disk works while the next bytes are prepared."""

    def __init__(self, storage: Storage, file: int) -> None:
        self._storage, self._file = storage, file
        self._size = self._started = 0  # bytes

    def write(self, data: bytes | memoryview) -> None:
        self._storage.write(self._file, data)
        self._size += len(data)
        if self._size - self._started >= _WRITEBACK:
            self._storage.start_writeback(self._file, self._started, self._size - self._started)
            self._started = self._size


def entries(path: Location) -> Iterator[str]:
    """Yield the names in a directory or directly below a URL, sorted; none if it does not exist."""
    if isinstance(path, Url):
        yield from Store(path).names()
        return
    with contextlib.suppress(FileNotFoundError):
        yield from sorted(entry.name for entry in path.iterdir())


def is_our_lock(path: Path) -> bool:
    """Whether a file is a lock that `Storage.lock` wrote."""
    try:
        with path.open("rb") as file:
            return file.read(len(LOCK_MAGIC)) == LOCK_MAGIC.encode()
    except OSError:
        return False


def _take(file: int, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise LockedError(errno.EAGAIN, _owner(file), str(path)) from error
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        if _owner_lives(file):
            raise LockedError(errno.EAGAIN, _owner(file), str(path)) from error


def _same_file(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _read_owner(file: int) -> tuple[str, int] | None:
    """Return host and pid; who has just taken the lock needs a moment to write them."""
    end = time.monotonic() + _OWNER_S
    while (owner := _written_owner(file)) is None and time.monotonic() < end:
        time.sleep(_OWNER_S / 20)
    return owner


def _written_owner(file: int) -> tuple[str, int] | None:
    lines = os.pread(file, 512, 0).decode(errors="replace").splitlines()
    return (lines[1], int(lines[2])) if len(lines) == 3 and lines[2].isdigit() else None


def _owner(file: int) -> str:
    owner = _read_owner(file)
    return f"process {owner[1]} on host {owner[0]}" if owner else "another process"


def _owner_lives(file: int) -> bool:
    owner = _read_owner(file)
    if owner is None or owner == (socket.gethostname(), os.getpid()):
        return False
    if owner[0] != socket.gethostname():
        return True
    try:
        os.kill(owner[1], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
