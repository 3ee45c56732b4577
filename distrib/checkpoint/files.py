"""Reading files of a checkpoint: inside its directory only, by ranges, with errors that name file and fix."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import stat
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

import xxhash

from distrib.checkpoint.format import MANIFEST, MAX_JSON_BYTES, Extent, FileRecord, checksum
from distrib.checkpoint.location import Location, Url
from distrib.checkpoint.objects import Objects
from distrib.checkpoint.parallel import num_threads
from distrib.errors import CheckpointError

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
_BUFFER = 2**20  # bytes hashed at a time: small enough to stay in the cache
_ANOTHER = "load another checkpoint, or copy this one again from where it is whole"


_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, linux/mman.h; Linux 5.14 has it
_PAGE = mmap.PAGESIZE

_ROOM = 4  # a file is mapped where this many of its size are free

# magic numbers of linux/magic.h and statfs(2): ext2 to ext4, xfs, btrfs, f2fs, zfs, bcachefs, overlayfs, tmpfs, ramfs
_LOCAL = frozenset({0xEF53, 0x58465342, 0x9123683E, 0xF2F52010, 0x2FC12FC1, 0xCA451A4E, 0x794C7630, 0x01021994, 0x858458F6})  # fmt: skip

_fstatfs = getattr(ctypes.CDLL(None), "fstatfs", None) if sys.platform == "linux" else None
_madvise = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None
if _madvise is not None:
    _madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class OpenFile(Protocol):
    """A file of a checkpoint, open for reading."""

    piece: int  # bytes that are best asked for at a time

    @property
    def size(self) -> int:
        """Its size in bytes."""
        ...

    def read(self) -> bytes:
        """Return all of it."""
        ...

    def read_into(self, view: memoryview, at: int) -> int:
        """Fill `view` from offset `at` on, as far as one request goes; returns the bytes read, 0 at the end."""
        ...


class Files(Protocol):
    """What lies in a checkpoint's place."""

    def open(self, name: str) -> AbstractContextManager[OpenFile]:
        """Open a file by its path below the place."""
        ...

    def mapped(self, name: str) -> mmap.mmap | None:
        """Map a file so that changes stay in this process; None where that is not possible, or not wise."""
        ...

    def close(self) -> None:
        """Give it back; safe to call twice."""
        ...


class Directory:
    """An open checkpoint, in a directory or at a URL.

    Of a directory, what was opened stays the same one, even if another is swapped into its place.

    Attributes:
        path: Its directory or URL.
        threads: How many threads are best to read with; a store is asked for several ranges at once anyway.
    """

    def __init__(self, path: Location) -> None:
        self.path = path
        self.threads = 1 if isinstance(path, Url) else num_threads()
        self._folder = ""
        with self._reading(path):
            self._files: Files = Objects(path) if isinstance(path, Url) else _LocalFiles(path)
        self.close = self._files.close

    def enter(self, folder: str) -> None:
        """Take the names of all files as relative to `folder`, which the manifest names; "" for none."""
        self._folder = folder

    def where(self, name: str) -> str:
        """Return a file's path or URL, for messages."""
        return str(self.path / self._full(name))

    @contextmanager
    def open(self, name: str) -> Iterator[OpenFile]:
        """Open a regular file; no link is followed on the way.

        Raises:
            CheckpointError: if it is missing, a link, no regular file, or cannot be read.
        """
        with self._reading(self.path / self._full(name)), self._files.open(self._full(name)) as file:
            yield file

    def mapped(self, name: str) -> mmap.mmap | None:
        """Map a file so that changes stay in this process; None if it should rather be read.

        Raises:
            CheckpointError: if it is missing, a link, no regular file, or cannot be opened.
        """
        with self._reading(self.path / self._full(name)):
            return self._files.mapped(self._full(name))

    def read(self, name: str, record: FileRecord | None = None) -> bytes:
        """Return a whole JSON file, checked against its record if one is given.

        Raises:
            CheckpointError: if it is damaged, or too large to be one of ours.
        """
        with self.open(name) as file:
            if file.size > MAX_JSON_BYTES:
                raise CheckpointError(
                    "D0707",
                    f"is {file.size} bytes long; expected at most {MAX_JSON_BYTES}",
                    where=self.where(name),
                    fix="do not load it; it was not written by distrib",
                )
            data = file.read()
        if record is not None:
            self._compare(len(data), record.size, name)
            if checksum(data) != record.xxh3:
                raise self.damaged(name, None, record.xxh3, checksum(data))
        return data

    def check_size(self, name: str, record: FileRecord) -> None:
        """Refuse a file that is missing or has another size than its record says."""
        with self.open(name) as file:
            self._compare(file.size, record.size, name)

    def check(self, extent: Extent) -> None:
        """Refuse a range of bytes that does not have its checksum."""
        with self.open(extent.file) as file:
            hasher = xxhash.xxh3_64()
            buffer = memoryview(bytearray(min(file.piece, extent.stop - extent.start)))
            at = extent.start
            while at < extent.stop:
                view = buffer[: extent.stop - at]
                self.read_into(file, extent.file, view, at)
                hasher.update(view)
                at += len(view)
        if hasher.hexdigest() != extent.xxh3:
            raise self.damaged(extent.file, extent.name, extent.xxh3, hasher.hexdigest())

    def read_into(self, file: OpenFile, name: str, view: memoryview, at: int) -> None:
        """Fill `view` with the bytes from offset `at` on."""
        while view:
            count = file.read_into(view, at)
            if not count:
                self._compare(file.size, at + len(view), name, at_least=True)
            view, at = view[count:], at + count

    def damaged(self, name: str, tensor: str | None, expected: str, found: str) -> CheckpointError:
        """Return the error of bytes that are not those that were written."""
        what = f"the data of tensor {tensor!r} are" if tensor else "the file is"
        return CheckpointError(
            "D0706",
            f"{what} damaged: XXH3 is {found}, expected {expected}",
            where=self.where(name),
            fix=_ANOTHER,
        )

    def _compare(self, size: int, expected: int, name: str, *, at_least: bool = False) -> None:
        if size != expected:
            raise CheckpointError(
                "D0705",
                f"is {size} bytes long; expected {'at least ' if at_least else ''}{expected}",
                where=self.where(name),
                fix=_ANOTHER,
            )

    def _full(self, name: str) -> str:
        return f"{self._folder}/{name}" if self._folder and name != MANIFEST else name

    @contextmanager
    def _reading(self, path: Location) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise CheckpointError("D0704", "is missing", where=str(path), fix=_ANOTHER) from error
        except OSError as error:
            link = error.errno in (errno.ELOOP, errno.ENOTDIR)  # what O_NOFOLLOW makes of one
            raise CheckpointError(
                "D0707" if link else "D0715",
                "is reached through a symbolic link" if link else f"cannot be read: {error.strerror}",
                where=str(path),
                fix="copy the checkpoint so that its files are regular ones" if link else _ANOTHER,
            ) from error


class _LocalFiles:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._maps: dict[str, mmap.mmap | None] = {}
        self._mapping = threading.Lock()
        self._descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self.close = weakref.finalize(self, os.close, self._descriptor)

    @contextmanager
    def open(self, name: str) -> Iterator[_LocalFile]:
        file = self._open(name)
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise CheckpointError(
                    "D0707", "is not a regular file", where=str(self._path / name), fix=_ANOTHER
                )
            yield _LocalFile(file)
        finally:
            os.close(file)

    def mapped(self, name: str) -> mmap.mmap | None:
        """Map a file of a local file system, once; it lives as long as what lies in it.

        It keeps its space on the medium while it is mapped, removed or not: where space is short it should be read.
        """
        with self._mapping:
            if name not in self._maps:
                with self.open(name) as file:
                    self._maps[name] = file.mapped()
            return self._maps[name]

    def _open(self, name: str) -> int:
        """Open a file by a path of which no part may be a link."""
        *folders, base = name.split("/")
        parent = self._descriptor
        with ExitStack() as opened:
            for folder in folders:
                parent = os.open(folder, _READ | os.O_DIRECTORY, dir_fd=parent)
                opened.callback(os.close, parent)
            return os.open(base, _READ | os.O_NONBLOCK, dir_fd=parent)


class _LocalFile:
    piece = _BUFFER

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @property
    def size(self) -> int:
        return os.fstat(self._descriptor).st_size

    def read(self) -> bytes:
        """Return the bytes up to the present end; fewer if the file becomes shorter."""
        data, size = b"", self.size
        while len(data) < size and (part := os.pread(self._descriptor, size - len(data), len(data))):
            data += part
        return data

    def read_into(self, view: memoryview, at: int) -> int:
        view = view[: self.piece]
        _back_with_pages(view)
        return os.preadv(self._descriptor, [view], at)

    def mapped(self) -> mmap.mmap | None:
        """Map it privately if it lies on a local file system with room for several of it."""
        space = os.fstatvfs(self._descriptor)
        if space.f_bavail * space.f_frsize < _ROOM * self.size or not _is_local(self._descriptor):
            return None
        return mmap.mmap(self._descriptor, self.size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)


def _is_local(descriptor: int) -> bool:
    """Whether a file lies where its bytes last while it is open, whoever removes its name: not on a network."""
    if _fstatfs is None:
        return False
    found = (ctypes.c_ulong * 64)()  # more than any struct statfs; f_type comes first
    return _fstatfs(descriptor, ctypes.byref(found)) == 0 and found[0] & 0xFFFFFFFF in _LOCAL


def _back_with_pages(view: memoryview) -> None:
    """Have the kernel give memory its pages in one call: in the middle of a read it does so page by page, which is slower.

    Where it cannot, the read does it.
    """
    if _madvise is not None and len(view) >= _PAGE:
        start = ctypes.addressof(ctypes.c_char.from_buffer(view)) & -_PAGE
        _madvise(start, len(view), _POPULATE_WRITE)
