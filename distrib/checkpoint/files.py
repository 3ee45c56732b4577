"""Reading files of a checkpoint: inside its directory only, by ranges, with errors that name file and fix."""

from __future__ import annotations

import errno
import os
import stat
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

from distrib.checkpoint.format import MAX_JSON_BYTES, Extent, FileRecord, checksum
from distrib.errors import CheckpointError

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
_BUFFER = 2**20  # bytes hashed at a time: small enough to stay in the cache
_ANOTHER = "load another checkpoint, or copy this one again from where it is whole"


class Directory:
    """An open checkpoint directory. What was opened stays the same one, even if another is swapped into its place."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._reading(path):
            self._descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self.close = weakref.finalize(self, os.close, self._descriptor)

    @contextmanager
    def open(self, name: str) -> Iterator[int]:
        """Open a regular file and yield its descriptor; no link is followed on the way.

        Raises:
            CheckpointError: if it is missing, a link, no regular file, or cannot be read.
        """
        folder, _, base = name.rpartition("/")
        with self._reading(self.path / name):
            parent = (
                os.open(folder, _READ | os.O_DIRECTORY, dir_fd=self._descriptor)
                if folder
                else self._descriptor
            )
            try:
                file = os.open(base, _READ | os.O_NONBLOCK, dir_fd=parent)
            finally:
                if folder:
                    os.close(parent)
            try:
                self._check_regular(file, name)
                yield file
            finally:
                os.close(file)

    def read(self, name: str, record: FileRecord | None = None) -> bytes:
        """Return a whole JSON file, checked against its record if one is given.

        Raises:
            CheckpointError: if it is damaged, or too large to be one of ours.
        """
        with self.open(name) as file:
            size = os.fstat(file).st_size
            if size > MAX_JSON_BYTES:
                raise CheckpointError(
                    "D0707",
                    f"is {size} bytes long; expected at most {MAX_JSON_BYTES}",
                    where=str(self.path / name),
                    fix="do not load it; it was not written by distrib",
                )
            data = _read_all(file, size)
        if record is not None:
            self._compare(len(data), record.size, name)
            if checksum(data) != record.xxh3:
                raise self.damaged(name, None, record.xxh3, checksum(data))
        return data

    def check_size(self, name: str, record: FileRecord) -> None:
        """Refuse a file that is missing or has another size than its record says."""
        with self.open(name) as file:
            self._compare(os.fstat(file).st_size, record.size, name)

    def check(self, extent: Extent) -> None:
        """Refuse a range of bytes that does not have its checksum."""
        hasher, buffer = xxhash.xxh3_64(), memoryview(bytearray(min(_BUFFER, extent.stop - extent.start)))
        with self.open(extent.file) as file:
            at = extent.start
            while at < extent.stop:
                view = buffer[: extent.stop - at]
                self.read_into(file, extent.file, view, at)
                hasher.update(view)
                at += len(view)
        if hasher.hexdigest() != extent.xxh3:
            raise self.damaged(extent.file, extent.name, extent.xxh3, hasher.hexdigest())

    def read_into(self, file: int, name: str, view: memoryview, at: int) -> None:
        """Fill `view` with the bytes from offset `at` on."""
        while view:
            count = os.preadv(file, [view], at)
            if not count:
                self._compare(os.fstat(file).st_size, at + len(view), name, at_least=True)
            view, at = view[count:], at + count

    def damaged(self, name: str, tensor: str | None, expected: str, found: str) -> CheckpointError:
        """Return the error of bytes that are not those that were written."""
        what = f"the data of tensor {tensor!r} are" if tensor else "the file is"
        return CheckpointError(
            "D0706",
            f"{what} damaged: XXH3 is {found}, expected {expected}",
            where=str(self.path / name),
            fix=_ANOTHER,
        )

    def _compare(self, size: int, expected: int, name: str, *, at_least: bool = False) -> None:
        if size != expected:
            raise CheckpointError(
                "D0705",
                f"is {size} bytes long; expected {'at least ' if at_least else ''}{expected}",
                where=str(self.path / name),
                fix=_ANOTHER,
            )

    def _check_regular(self, file: int, name: str) -> None:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise CheckpointError("D0707", "is not a regular file", where=str(self.path / name), fix=_ANOTHER)

    @contextmanager
    def _reading(self, path: Path) -> Iterator[None]:
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


def _read_all(file: int, size: int) -> bytes:
    """Return up to `size` bytes; fewer if the file has become shorter."""
    data = b""
    while len(data) < size and (part := os.pread(file, size - len(data), len(data))):
        data += part
    return data
