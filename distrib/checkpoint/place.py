"""The seam between a save and where its bytes go: a directory, written beside its place and swapped in, or a store."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from distrib.checkpoint.claim import Claim
from distrib.checkpoint.format import Manifest
from distrib.checkpoint.location import Location, Url
from distrib.checkpoint.remote import RemoteClaim, RemoteDraft
from distrib.checkpoint.storage import Storage, writing
from distrib.checkpoint.store import Write


class Place(Protocol):
    """The exclusive right to replace a checkpoint, held by rank 0 while a save runs."""

    folder: str  # where the files lie relative to the manifest

    @property
    def temp(self) -> Location:
        """Where the files of this save go; any rank makes a `Draft` of it."""
        ...

    def make_room(self, folders: Iterable[str], num_bytes: int) -> None:
        """Prepare for files in these folders, and refuse what cannot fit."""
        ...

    def complete(self, manifest: Manifest) -> None:
        """Show the checkpoint, whose files are all written, in one step; on failure the previous one is there."""
        ...

    def release(self) -> None:
        """Remove what is not the checkpoint, and let others save there; never raises for what cannot be removed."""
        ...


class Draft(Protocol):
    """The files that one rank writes, and that nobody reads yet."""

    def is_visible(self) -> bool:
        """Whether this rank sees what rank 0 has made."""
        ...

    def writing(self, name: str, size: int) -> AbstractContextManager[Write]:
        """Write a new file of `size` bytes; gives what appends to it."""
        ...


class LocalDraft:
    """Files in a directory; no two ranks share one, so each is written and synced by one."""

    def __init__(self, temp: Path, storage: Storage, *, durable: bool) -> None:
        self._temp, self._storage, self._durable = temp, storage, durable

    def is_visible(self) -> bool:
        """Whether this host sees the directory that rank 0 has made."""
        return self._temp.is_dir()

    def writing(self, name: str, size: int) -> AbstractContextManager[Write]:
        """Write a file below the directory."""
        return writing(self._storage, self._temp / name, durable=self._durable)


def take_place(target: Location, storage: Storage, *, durable: bool) -> Place:
    """Lock `target` and prepare what is going to replace it. Main only.

    Args:
        target: The checkpoint.
        storage: The operations on local files.
        durable: Whether to wait for the medium; an object store always does.

    Raises:
        CheckpointError: if another job has it, or something that is no checkpoint is in its place.
        OSError: if the file system refuses.
    """
    if isinstance(target, Url):
        return RemoteClaim.take(target)
    return Claim.take(target, storage, durable=durable)


def is_unwritable(directory: Location) -> bool:
    """Whether no checkpoint could be written in a directory that may have to be made; nobody knows of a URL."""
    if isinstance(directory, Url):
        return False
    nearest = next(x for x in (directory, *directory.parents) if x.exists())
    return not (nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK))


def draft_at(temp: Location, storage: Storage, *, durable: bool) -> Draft:
    """Return what writes this rank's files below `temp`, which rank 0's `Place` has."""
    if isinstance(temp, Url):
        return RemoteDraft(temp)
    return LocalDraft(temp, storage, durable=durable)
