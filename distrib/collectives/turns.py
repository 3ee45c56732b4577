"""Taking turns over the job's key-value store: no device collective, and no time limit.

A rank that waits asks the store for a key, again and again in short intervals, so that the store's connection is never
held and nothing else that uses it is kept waiting.
"""

from __future__ import annotations

import json
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.util import Finalize
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import Store

from distrib.errors import CollectiveError
from distrib.logging import notice

_SHORTEST_S, _LONGEST_S = 0.001, 0.2  # between two questions to the store
_TELL_EVERY_S = 60.0
_STAY_AFTER_FAILURE_S = 1.0  # so that those who wait learn of it before the store goes with this process
_STAY_AT_END_S = 30.0  # the same for those who have not come yet
_MAX_TEXT = 1000  # characters of an exception's text that the others are told


class Turns:
    """One rank's side of taking turns.

    The store counts how often each rank has come to a point, so that any number of objects may use one store.

    Args:
        store: The store that all ranks share.
        rank: This rank.
        tell_every_s: Seconds between two lines about a wait that goes on.
        tell: Where such a line goes.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        *,
        tell_every_s: float = _TELL_EVERY_S,
        tell: Callable[[str], None] = notice,
    ) -> None:
        self._store, self._rank = store, rank
        self._tell_every_s, self._tell = tell_every_s, tell
        self._left: dict[str, int] = {}  # key of a body that has ended -> how many follow
        self._at_exit: Finalize | None = None

    @contextmanager
    def go_first(self, scope: str, where: str, followers: int) -> Iterator[None]:
        """Run the body while the others of `scope` wait for its end; they are told of an exception.

        Args:
            scope: Who takes part: "main", "node 3". All of them come here, or to `follow`, equally often.
            where: The script's "file:line".
            followers: How many others take part.
        """
        self._forget_seen()
        key = self._key(scope)
        who = {"rank": self._rank, "host": socket.gethostname(), "where": where, "since": time.time()}
        with _connection(scope):
            self._store.set(f"{key}/who", json.dumps(who))
        try:
            yield
        except BaseException as error:
            with suppress(dist.DistError):  # the body's own exception says more
                self._store.set(key, json.dumps({"failed": _summary(error)}))
                waiting = self._store.add(f"{key}/waiting", 0)
                self._stay(key, waiting, time.monotonic() + _STAY_AFTER_FAILURE_S)
            raise
        with _connection(scope):
            self._store.set(key, json.dumps({}))
        if self._at_exit is None:
            # runs in forked children of multiprocessing too, where atexit does not before Python 3.13
            self._at_exit = Finalize(None, self.close, exitpriority=0)
        self._left[key] = followers

    def follow(self, scope: str, where: str, *, speaks: bool) -> None:
        """Return when the first rank of `scope` has left its body.

        Args:
            scope: As for `go_first`.
            where: The script's "file:line".
            speaks: Whether this rank tells about a long wait; one of a scope is enough.

        Raises:
            CollectiveError: if the first rank's body raised, or the store is gone.
        """
        key = self._key(scope)

        def tell(seconds: float) -> None:
            self._tell(
                f"rank {self._rank} has waited {seconds:.0f} s at {where} for {self._who(key, scope)} to go first"
            )

        with _connection(scope):
            self._store.add(f"{key}/waiting", 1)
            self._wait(key, tell if speaks else None)
            outcome: dict[str, Any] = json.loads(self._store.get(key))
            who = self._who(key, scope)
            self._store.add(f"{key}/seen", 1)
        if "failed" in outcome:
            raise CollectiveError(
                "D0402",
                f"{who}, which went first, failed: {outcome['failed']}",
                where=where,
                fix="look at that rank's own error; this rank only followed it",
            )

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Run the body on rank 0, then on rank 1, and so on; every rank is known to come here."""
        scope = "in turn"
        number = self._count(scope)
        if self._rank:
            with _connection(scope):
                self._wait(f"distrib/{scope}/{number}/{self._rank - 1}", None)
        try:
            yield
        finally:
            with _connection(scope):
                self._store.set(f"distrib/{scope}/{number}/{self._rank}", "")

    def _key(self, scope: str) -> str:
        return f"distrib/first/{scope}/{self._count(scope)}"

    def _count(self, scope: str) -> int:
        with _connection(scope):
            return self._store.add(f"distrib/count/{scope}/{self._rank}", 1)

    def close(self) -> None:
        """Stay until those who follow have seen that this rank is done, since the store may go with it."""
        deadline = time.monotonic() + _STAY_AT_END_S
        with suppress(dist.DistError):
            for key, followers in self._left.items():
                self._stay(key, followers, deadline)
        self._left.clear()

    def _forget_seen(self) -> None:
        """Drop the bodies whose end all have seen: nobody asks for their keys any more."""
        with suppress(dist.DistError):  # who comes next meets it too, and says where
            for key in [key for key, followers in self._left.items() if self._seen(key) >= followers]:
                for name in (key, f"{key}/who", f"{key}/waiting", f"{key}/seen"):
                    self._store.delete_key(name)
                del self._left[key]

    def _wait(self, key: str, tell: Callable[[float], None] | None) -> None:
        began = told = time.monotonic()
        for _ in _pauses():
            if self._store.check([key]):
                return
            now = time.monotonic()
            if tell is not None and now - told >= self._tell_every_s:
                told = now
                tell(now - began)

    def _stay(self, key: str, followers: int, deadline: float) -> None:
        for _ in _pauses():
            if self._seen(key) >= followers or time.monotonic() > deadline:
                return

    def _seen(self, key: str) -> int:
        return self._store.add(f"{key}/seen", 0)

    def _who(self, key: str, scope: str) -> str:
        """Say who goes first, as far as it has told."""
        if not self._store.check([f"{key}/who"]):
            return f"the first rank of {scope!r}, which has not come to it yet,"
        who = json.loads(self._store.get(f"{key}/who"))
        since = time.strftime("%H:%M:%S", time.localtime(who["since"]))
        return f"rank {who['rank']} on {who['host']} (there since {since}, at {who['where']})"


def _pauses() -> Iterator[None]:
    """Yield for ever, after longer and longer pauses, at once the first time."""
    pause_s = _SHORTEST_S
    while True:
        yield
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_S)


@contextmanager
def _connection(scope: str) -> Iterator[None]:
    try:
        yield
    except dist.DistError as error:
        raise CollectiveError(
            "D0402",
            f"waiting for the first rank of {scope!r} failed: the job's key-value store is gone: {error}",
            fix="look for the rank that ended first; the store lives in rank 0 or in the launcher",
        ) from error


def _summary(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}: {str(error)[:_MAX_TEXT]}{place}"
