"""The right to write one checkpoint: a lock, a hidden sibling to write into, and the swap that makes it visible.

    .step-00001200.lock               held while a save runs; given back by the system when its owner dies
    .step-00001200.tmp-<12 hex>       being written, or replaced and being removed: never read
    .step-00001200.old-<12 hex>       the previous one, for the instant of a swap that cannot be one step

A name without a live lock is left over from a job that died; the next save in the same directory removes it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from distrib.checkpoint import remote
from distrib.checkpoint.format import MAGIC, MANIFEST, Manifest, dump
from distrib.checkpoint.location import Location, Url
from distrib.checkpoint.storage import LockedError, Storage, entries, is_our_lock, remove_tree
from distrib.checkpoint.tensorfile import write_bytes
from distrib.errors import CheckpointError

_log = logging.getLogger(__name__)
_LOCK = re.compile(r"\.(?P<name>.+)\.lock")
_TOKEN = re.compile(r"[0-9a-f]{12}")
_SMALL_FILES_BYTES = 2**20  # room for manifest, documents and the file system's own blocks


def is_checkpoint(directory: Location) -> bool:
    """Whether a directory or URL has a manifest of ours; says nothing about its state."""
    if isinstance(directory, Url):
        return remote.is_checkpoint(directory)
    manifest = directory / MANIFEST
    try:
        if directory.is_symlink() or not stat.S_ISREG(manifest.lstat().st_mode):
            return False
        with manifest.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


class Claim:
    """The exclusive right to replace `target`; `take` makes one, and its end gives it back.

    Attributes:
        target: The checkpoint's directory.
        temp: The hidden sibling that becomes it.
        folder: "": the files lie beside the manifest.
    """

    folder = ""

    def __init__(self, target: Path, storage: Storage, *, durable: bool, lock: int) -> None:
        self.target, self.storage, self.durable = target, storage, durable
        self.temp = _sibling(target, "tmp")
        self._lock = lock
        self._aside: Path | None = None
        self._keep = False

    @classmethod
    def take(cls, target: Path, storage: Storage, *, durable: bool) -> Claim:
        """Lock `target`, remove what dead jobs left beside it, and make the directory to write into. Main only.

        Raises:
            CheckpointError: if another job has it, or something that is no checkpoint is in its place.
            OSError: if the file system refuses.
        """
        storage.make_dirs(target.parent)
        claim = cls(target, storage, durable=durable, lock=_lock(target, storage))
        try:
            _clean(target, storage)
            check_replaceable(target)
            clean_strays(target.parent, storage)
            storage.make_dir(claim.temp)
        except BaseException:
            claim.release()
            raise
        return claim

    def make_room(self, folders: Iterable[str], num_bytes: int) -> None:
        """Make the folders, and refuse to begin what cannot fit on the disk.

        Raises:
            CheckpointError: if less than `num_bytes` are free.
        """
        for folder in folders:
            self.storage.make_dir(self.temp / folder)
        needed, free = num_bytes + _SMALL_FILES_BYTES, self.storage.free_bytes(self.temp)
        if needed > free:
            raise CheckpointError(
                "D0713",
                f"the checkpoint needs {needed / 2**20:,.1f} MiB, but only {free / 2**20:,.1f} MiB are free",
                where=str(self.target.parent),
                fix="make room there, keep fewer checkpoints, or save to another file system",
            )

    def complete(self, manifest: Manifest) -> None:
        """Write the manifest, make the directories durable and show the checkpoint."""
        write_bytes(self.storage, self.temp / MANIFEST, dump(manifest), durable=self.durable)
        for folder in sorted(
            {folder for name in [*manifest.files, MANIFEST] for folder in Path(name).parents}
        ):
            self.sync_dir(self.temp / folder)
        self.commit()

    def commit(self) -> None:
        """Make `temp` the checkpoint, in one step where the system can; on failure the previous one is back."""
        undo = self._swap()
        try:
            self.sync_dir(self.target.parent)
        except OSError:
            self._keep = True  # neither is removed unless the swap was undone
            undo()
            self._keep = False
            raise

    def sync_dir(self, path: Path) -> None:
        """Make a directory's entries durable, if this save is to be."""
        if self.durable:
            self.storage.sync_dir(path)

    def release(self) -> None:
        """Remove what is not the checkpoint and give the lock back; what cannot be removed is left to the next save."""
        try:
            self._remove_rest()
            self.storage.unlink(_lock_path(self.target))
        except OSError as error:
            _log.warning("could not tidy up beside %s: %s; the next save will", self.target, error)
        finally:
            with contextlib.suppress(OSError):
                self.storage.close(self._lock)

    def _remove_rest(self) -> None:
        if self._keep:
            raise OSError(f"the swap with {self.temp.name} could be neither made durable nor undone")
        if self._aside is not None:
            self.storage.rename(self._aside, self.temp)
        if self.temp.exists():
            remove_tree(self.storage, self.temp)

    def _swap(self) -> Callable[[], None]:
        """Exchange `temp` and `target` and return what undoes it."""
        target, temp, storage = self.target, self.temp, self.storage
        if not target.exists():
            storage.rename(temp, target)
            return lambda: storage.rename(target, temp)
        if storage.exchange(temp, target):
            return lambda: _exchange_back(storage, temp, target)
        aside = _sibling(target, "old")
        storage.rename(target, aside)
        try:
            storage.rename(temp, target)
        except OSError:
            self._keep = True  # until it is back; a reader or the next save brings it back otherwise
            storage.rename(aside, target)
            self._keep = False
            raise
        self._aside = aside
        return self._undo_aside

    def _undo_aside(self) -> None:
        assert self._aside is not None, "only a swap by two renames is undone so"
        self.storage.rename(self.target, self.temp)
        self.storage.rename(self._aside, self.target)
        self._aside = None


def _exchange_back(storage: Storage, temp: Path, target: Path) -> None:
    storage.exchange(temp, target)


def check_replaceable(target: Path) -> None:
    """Refuse a target that is neither absent, an empty directory, nor a checkpoint.

    Raises:
        CheckpointError: naming what is there.
    """
    try:
        mode = target.lstat().st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(mode):
        if is_checkpoint(target) or not any(entries(target)):
            return
        found = "a directory that holds files but no checkpoint"
    else:
        found = "a symbolic link" if stat.S_ISLNK(mode) else "a file"
    raise CheckpointError(
        "D0711",
        f"is {found}; expected nothing, an empty directory or an older checkpoint",
        where=str(target),
        fix="save to another directory, or move what is there away",
    )


def clean_strays(parent: Path, storage: Storage) -> None:
    """Remove what saves of dead jobs left in `parent`; a checkpoint they had moved aside comes back."""
    for entry in entries(parent):
        found = _LOCK.fullmatch(entry)
        if found is None or not is_our_lock(parent / entry):
            continue
        target = parent / found["name"]
        try:
            with locked(target, storage):
                _clean(target, storage)
        except LockedError:
            continue  # its owner lives
        except OSError as error:
            _log.warning("could not remove what a dead job left at %s: %s", target, error)


def restore_aside(target: Location, storage: Storage) -> None:
    """Bring back a checkpoint that a job had moved aside when it died in the middle of a swap."""
    if isinstance(target, Url) or target.exists() or not any(_siblings(target, "old")):
        return
    with contextlib.suppress(OSError), locked(target, storage):
        _clean(target, storage)


@contextmanager
def locked(target: Path, storage: Storage) -> Iterator[None]:
    """Hold the lock of a checkpoint.

    Raises:
        LockedError: if a live owner has it.
    """
    path = _lock_path(target)
    lock = storage.lock(path)
    try:
        yield
        storage.unlink(path)
    finally:
        storage.close(lock)


def remove_checkpoint(target: Location, storage: Storage) -> None:
    """Remove a checkpoint so that no instant shows a part of it.

    Raises:
        LockedError: if a job is saving to it.
        OSError: if the file system refuses.
        CheckpointError: if the store of a URL refuses.
    """
    if isinstance(target, Url):
        remote.remove_checkpoint(target)
        return
    with locked(target, storage):
        gone = _sibling(target, "tmp")
        storage.rename(target, gone)
        remove_tree(storage, gone)


def _clean(target: Path, storage: Storage) -> None:
    """Finish what a dead owner of `target` left undone; its lock is held."""
    for aside in _siblings(target, "old"):
        if not target.exists() and is_checkpoint(aside):
            storage.rename(aside, target)
        else:
            storage.rename(aside, _sibling(target, "tmp"))
    for temp in _siblings(target, "tmp"):
        remove_tree(storage, temp)


def _lock(target: Path, storage: Storage) -> int:
    try:
        return storage.lock(_lock_path(target))
    except LockedError as error:
        raise CheckpointError(
            "D0712",
            f"another job is saving there: {error.strerror}",
            where=str(target),
            fix=f"give each job a directory of its own; if that job is gone, remove {_lock_path(target)}",
        ) from error


def _lock_path(target: Path) -> Path:
    return target.with_name(f".{target.name}.lock")


def _sibling(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{kind}-{secrets.token_hex(6)}")


def _siblings(target: Path, kind: str) -> list[Path]:
    start = f".{target.name}.{kind}-"
    found = (
        target.parent / name
        for name in entries(target.parent)
        if name.startswith(start) and _TOKEN.fullmatch(name, len(start))
    )
    return [path for path in found if stat.S_ISDIR(os.lstat(path).st_mode)]
