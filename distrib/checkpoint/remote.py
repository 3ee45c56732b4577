"""A checkpoint in an object store: the manifest is one request, and refers to files that only its own save has written.

    run/step-00001200/manifest.json                         names the folder of its files; written last, in one request
    run/step-00001200/files-<12 hex>/model/rank-00000...    the files of one save
    run/.step-00001200.lock                                 there while a save runs

An older checkpoint stays readable until the new manifest has replaced its own; its files are removed after that. What
no manifest names and no live lock covers is left over from a save that died: the next save to the same parent removes it.
"""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Collection, Iterable
from contextlib import AbstractContextManager

from distrib.checkpoint import format as file_format
from distrib.checkpoint.format import MAGIC, MANIFEST, Manifest
from distrib.checkpoint.lease import Lease, check_owner, is_forgotten, read_owner
from distrib.checkpoint.location import Url
from distrib.checkpoint.storage import LockedError
from distrib.checkpoint.store import Store, Write
from distrib.errors import CheckpointError

_log = logging.getLogger(__name__)
_LOCK = re.compile(r"\.(?P<name>.+)\.lock")
_FOLDER = "files-"
_OURS = re.compile(rf"{_FOLDER}[0-9a-f]{{12}}|\.{re.escape(MANIFEST)}\.tmp-[0-9a-f]{{12}}")


class RemoteDraft:
    """The files that one rank writes for a save.

    Args:
        folder: Of the save's files, as its claim has chosen it.
    """

    def __init__(self, folder: Url) -> None:
        self._store = Store(folder)

    def is_visible(self) -> bool:
        """Whether this rank sees the lock that rank 0 has taken.

        Raises:
            CheckpointError: if it is another save's by now.
        """
        folder = self._store.url
        beside, name = Store(folder.parent.parent), _lock_name(folder.parent)
        owner = read_owner(beside, name)
        if owner is None:
            return False
        check_owner(beside, name, owner, folder.name.removeprefix(_FOLDER))
        return True

    def writing(self, name: str, size: int) -> AbstractContextManager[Write]:
        """Write a file of the save."""
        return self._store.writing(name, size)


class RemoteClaim:
    """The exclusive right to replace the checkpoint at a URL; `take` makes one, and its end gives it back.

    Attributes:
        temp: Where the files of this save go.
        folder: The same, as the manifest names it.
    """

    def __init__(self, target: Url, lease: Lease) -> None:
        self.folder = _FOLDER + lease.owner.id
        self.temp = target / self.folder
        self._target, self._lease = Store(target), lease
        self._shown = False
        self._keep = ""  # why something is left

    @classmethod
    def take(cls, target: Url) -> RemoteClaim:
        """Lock `target` and remove what dead jobs left there and beside it. Main only.

        Raises:
            CheckpointError: if another job has it, something that is no checkpoint is in its place, or the store refuses.
        """
        if "/" not in target.rest.strip("/"):
            raise CheckpointError(
                "D0741",
                "names a bucket; expected a place in it",
                where=str(target),
                fix=f'save to "{target}/step-1", for example',
            )
        store, beside = Store(target), Store(target.parent)
        _check_replaceable(store)
        try:
            lease = Lease.take(beside, _lock_name(target), secrets.token_hex(6))
        except LockedError as error:
            raise CheckpointError(
                "D0712",
                f"another job is saving there: {error.strerror}",
                where=str(target),
                fix="give each job a place of its own",
            ) from error
        claim = cls(target, lease)
        try:
            _tidy(store)
            _tidy_beside(beside, _lock_name(target))
        except BaseException:
            claim.release()
            raise
        return claim

    def make_room(self, folders: Iterable[str], num_bytes: int) -> None:
        """Do nothing: a store has room, and folders are parts of names."""

    def complete(self, manifest: Manifest) -> None:
        """Write the manifest, and then remove the files of the checkpoint that it replaces.

        Raises:
            CheckpointError: if a file is missing, the lock was lost, or the store refuses; then the older one is there.
        """
        self._lease.check()
        self._check_files(manifest)
        self._publish(file_format.dump(manifest))
        try:
            _remove(self._target, set(self._target.names()) - {MANIFEST, self.folder})
        except CheckpointError as error:
            self._keep = f"files of the replaced checkpoint are left: {error.problem}"

    def release(self) -> None:
        """Remove what is not the checkpoint and give the lock back; what cannot be removed is left to the next save."""
        try:
            if not self._shown:
                self._target.remove(self.folder)
        except CheckpointError as error:
            self._keep = error.problem
        if self._keep:
            _log.warning("could not tidy up at %s: %s; the next save will", self._target.url, self._keep)
        try:
            self._lease.release(remove=not self._keep)
        except CheckpointError as error:
            _log.warning("the lock of %s is left: %s", self._target.url, error.problem)

    def _check_files(self, manifest: Manifest) -> None:
        """Make sure that all files are there, also those of other ranks; nobody may have removed one meanwhile."""
        listed = self._target.sizes(self.folder)
        for name, record in manifest.files.items():
            path = f"{self.folder}/{name}"
            found = listed.get(path, None) if path in listed else self._target.size(path)
            if found != record.size:
                raise CheckpointError(
                    "D0745",
                    f"{record.size} bytes were written, but the store has {'none' if found is None else found}",
                    where=str(self._target.url / path),
                    fix="save again; see that no other job and no rule of the bucket removes files there",
                )

    def _publish(self, data: bytes) -> None:
        self._shown = True  # so far as anybody knows, once the request is on its way
        try:
            self._target.put(MANIFEST, data)
        except CheckpointError:
            # It may have got through although its answer did not, or may still do so. The files of both checkpoints
            # stay; those that turn out to be nobody's are removed by the next save.
            self._keep = "it is not known which checkpoint is there"
            if self._target.get(MANIFEST) != data:
                raise
            self._keep = ""


def is_checkpoint(url: Url) -> bool:
    """Whether there is a manifest of ours at `url`.

    Raises:
        CheckpointError: if the store does not answer.
    """
    return _has_manifest(Store(url))


def entries(url: Url) -> list[str]:
    """Return the names directly below `url`, sorted."""
    return Store(url).names()


def remove_checkpoint(target: Url) -> None:
    """Remove a checkpoint so that no instant shows a part of it: the manifest first.

    Raises:
        LockedError: if a job is saving to it.
        CheckpointError: if the store refuses.
    """
    beside, name = Store(target.parent), _lock_name(target)
    owner = read_owner(beside, name)
    if owner is not None and not is_forgotten(owner):
        raise LockedError(0, str(owner), str(target))  # without waiting: the next save tries again
    lease = Lease.take(beside, name, secrets.token_hex(6))
    done = False
    try:
        store = Store(target)
        store.remove(MANIFEST)
        store.remove("")
        done = True
    finally:
        lease.release(remove=done)


def _check_replaceable(store: Store) -> None:
    if _has_manifest(store):
        return
    found = [name for name in store.names() if not _OURS.fullmatch(name)]
    if found:
        raise CheckpointError(
            "D0711",
            f"has objects but no checkpoint: {', '.join(found[:3])}",
            where=str(store.url),
            fix="save to another place, or move what is there away",
        )


def _has_manifest(store: Store) -> bool:
    size = store.size(MANIFEST)
    return size is not None and size > len(MAGIC) and store.get(MANIFEST, len(MAGIC)) == MAGIC


def _tidy(store: Store) -> None:
    """Remove what saves have written there and no manifest names; the lock is held."""
    data = store.get(MANIFEST)  # not from a listing, which may be late
    try:
        used = file_format.load(data, str(store.url / MANIFEST)).folder if data else ""
    except CheckpointError as error:
        _log.warning("%s; nothing is removed there", error)
        return
    _remove(store, [name for name in store.names() if _OURS.fullmatch(name) and name != used])


def _tidy_beside(beside: Store, own_lock: str) -> None:
    """Remove what dead jobs left of other checkpoints below the same parent."""
    try:
        locks = [found for found in map(_LOCK.fullmatch, beside.names()) if found and found[0] != own_lock]
    except CheckpointError as error:  # who may write below a name need not be allowed to list above it
        _log.warning("%s; what dead jobs left beside it is not removed", error)
        return
    for found in locks:
        entry = found[0]
        try:
            owner = read_owner(beside, entry)
            if owner is None or not owner.id or not is_forgotten(owner):
                continue
            lease = Lease.take(beside, entry, secrets.token_hex(6))
            try:
                _tidy(Store(beside.url / found["name"]))
            finally:
                lease.release()
        except (CheckpointError, LockedError) as error:
            _log.warning("could not remove what a dead job left at %s: %s", beside.url / found["name"], error)


def _remove(store: Store, names: Collection[str]) -> None:
    for name in sorted(names):
        store.remove(name)


def _lock_name(target: Url) -> str:
    return f".{target.name}.lock"
