"""A lock in a store that has no locks: an object that its owner writes anew all the time, and that expires if it does not.

Nobody compares clocks of two hosts: whoever finds the lock taken watches it, and takes it over when it has not changed
for a while, or at once where it can see that the owner's process is gone. An owner that was silent for too long, a
suspended machine, notices before it makes its checkpoint visible; then its save fails. So two writers are never mixed,
even where a lock is broken by mistake: their files have different names, and one manifest names only its own.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

from distrib.checkpoint.storage import LockedError
from distrib.checkpoint.store import Store
from distrib.errors import CheckpointError

_log = logging.getLogger(__name__)
_FORMAT = "distrib-checkpoint-lock"


class Times(NamedTuple):
    """How long what takes, in seconds.

    Attributes:
        beat: Between two signs of life of an owner.
        lease: Without a sign of life, after which a lock may be taken over by a writer that has watched it.
        watch: Between two looks of such a writer.
        forgotten: Age by the wall clock, from which on a lock is nobody's without watching it: far above what clocks
            of two hosts differ by.
    """

    beat: float = 10.0
    lease: float = 60.0
    watch: float = 1.0
    forgotten: float = 3600.0


TIMES = Times()


@dataclass(frozen=True)
class Owner:
    """What a lock says.

    Attributes:
        id: Of the save.
        host: Name of the machine.
        space: Which processes `pid` counts among: machines and containers have their own.
        pid: Of the process.
        beat: How often it has been written.
        time: When it was written, in seconds since 1970, by the owner's clock.
    """

    id: str
    host: str
    space: str
    pid: int
    beat: int
    time: float

    @classmethod
    def me(cls, identity: str) -> Owner:
        """Return what this process writes at first."""
        return cls(identity, socket.gethostname(), _process_space(), os.getpid(), 0, time.time())

    def dump(self) -> bytes:
        """Return the lock's text."""
        return json.dumps({"format": _FORMAT, **asdict(self)}).encode()

    def is_gone(self) -> bool:
        """Whether this process can see that the owner's does not live, or that it is a former self."""
        if not self.space or (self.host, self.space) != (socket.gethostname(), _process_space()):
            return False
        if self.pid == os.getpid():
            return True
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return False

    def __str__(self) -> str:
        return f"process {self.pid} on host {self.host}"


class Lease:
    """A held lock; `take` makes one. A thread keeps it fresh until `release`.

    Args:
        store: Where it lies.
        name: The lock's name there.
        owner: What it says at first.
        times: How often it is written.
    """

    def __init__(self, store: Store, name: str, owner: Owner, times: Times) -> None:
        self.owner = owner
        self._store, self._name, self._times = store, name, times
        self._lost = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="checkpoint lock", daemon=True)

    @classmethod
    def take(cls, store: Store, name: str, identity: str, times: Times | None = None) -> Lease:
        """Take the lock; where another owner has it, watch until it shows life or has been silent for the lease.

        Raises:
            LockedError: if a live owner has it; the message says who.
            CheckpointError: if the store refuses.
        """
        times = times or TIMES
        lease = cls(store, name, Owner.me(identity), times)
        while not store.create(name, lease.owner.dump()):
            found = read_owner(store, name)
            if found is not None and not found.is_gone():
                _watch(store, name, found, times)
            if found is not None and read_owner(store, name) == found:
                store.remove(name)
        lease._thread.start()
        return lease

    def check(self) -> None:
        """Refuse to go on if the lock is not this one's any more.

        Raises:
            CheckpointError: naming who has it.
        """
        found = read_owner(self._store, self._name)
        if self._lost or found is None:
            raise _lost(self._store, self._name, found)
        check_owner(self._store, self._name, found, self.owner.id)

    def release(self, *, remove: bool = True) -> None:
        """Stop keeping it fresh and remove it, if it is still this one's.

        Args:
            remove: False leaves it, as the mark of something to be tidied up.
        """
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        found = read_owner(self._store, self._name) if remove else None
        if found is not None and found.id == self.owner.id:
            self._store.remove(self._name)

    def _keep(self) -> None:
        while not self._ended.wait(self._times.beat):
            try:
                found = read_owner(self._store, self._name)
                if found is None or found.id != self.owner.id:
                    self._lost = True
                    return
                self.owner = replace(self.owner, beat=self.owner.beat + 1, time=time.time())
                self._store.put(self._name, self.owner.dump())
            except CheckpointError as error:  # the next beat may get through; `check` decides in the end
                _log.warning("%s", error)


def read_owner(store: Store, name: str) -> Owner | None:
    """Return what a lock says; None if there is none. One that cannot be read is an unknown owner's."""
    data = store.get(name)
    if data is None:
        return None
    try:
        fields = json.loads(data)
        del fields["format"]
        return Owner(**fields)
    except (ValueError, TypeError, KeyError):
        return Owner("", "unknown", "", 0, 0, 0.0)


def check_owner(store: Store, name: str, found: Owner, identity: str) -> None:
    """Refuse a lock, as it was read, that is not the one of the save `identity`.

    Raises:
        CheckpointError: naming who has it.
    """
    if found.id != identity:
        raise _lost(store, name, found)


def _lost(store: Store, name: str, found: Owner | None) -> CheckpointError:
    return CheckpointError(
        "D0744",
        f"the lock was lost while the checkpoint was being written: {found or 'nobody'} has it",
        where=str(store.url / name),
        fix="give each job a place of its own; if this process was suspended for a minute, save again",
    )


def is_forgotten(owner: Owner, times: Times | None = None) -> bool:
    """Whether a lock is nobody's for sure, without watching it."""
    return owner.is_gone() or time.time() - owner.time > (times or TIMES).forgotten


def _watch(store: Store, name: str, found: Owner, times: Times) -> None:
    """Return when a lock has not changed for the lease, or is gone."""
    _log.info(
        "%s is locked by %s: waiting up to %g s for a sign of life", store.url / name, found, times.lease
    )
    end = time.monotonic() + times.lease
    while time.monotonic() < end:
        time.sleep(times.watch)
        now = read_owner(store, name)
        if now is None:
            return
        if now != found:
            raise LockedError(errno.EAGAIN, str(now), str(store.url / name))


def _process_space() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""
