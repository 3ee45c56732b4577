"""Saving while training goes on: one thread, one save at a time, and no error is lost."""

from __future__ import annotations

import atexit
import concurrent.futures.thread
import contextlib
import logging
import threading
import time
from collections.abc import Callable

from distrib.checkpoint.location import Location
from distrib.checkpoint.staging import Arena
from distrib.checkpoint.writer import Saving
from distrib.collectives.base import Collectives

_log = logging.getLogger(__name__)
_HEAD_START_S = 0.005  # for the training loop


class Pending(threading.Thread):
    """A save that is being written. The interpreter waits for it when it ends.

    Args:
        saving: What to finish; its tensors are copies.
        collectives: For this thread alone.
        after: Called with the path when the checkpoint is complete.
    """

    def __init__(self, saving: Saving, collectives: Collectives, after: Callable[[], None]) -> None:
        super().__init__(name="checkpoint", daemon=False)
        self.path = saving.target
        self._saving, self._collectives, self._after = saving, collectives, after
        self._error: BaseException | None = None

    def run(self) -> None:
        time.sleep(_HEAD_START_S)  # gives back the interpreter's lock, which a new thread holds at first
        try:
            self._saving.finish(self._collectives)
            self._after()
        except BaseException as error:  # noqa: BLE001 (raised where somebody waits, or logged at the end)
            self._error = error
        finally:
            del self._saving, self._collectives, self._after  # a handle that is kept must not keep the copies

    def wait(self) -> Location:
        """Return the path when the checkpoint is complete.

        Raises:
            CheckpointError: if it could not be written; once, then it counts as told.
        """
        self.join()
        error, self._error = self._error, None
        if error is not None:
            raise error
        return self.path

    def tell(self) -> None:
        """Log an error that nobody has waited for."""
        self.join()
        if self._error is not None:
            _log.error("%s was not saved: %s", self.path, self._error)
            self._error = None


class Background:
    """Starts saves, each when the last one is done; their copies share one block of memory.

    Args:
        collectives: The ranks that save together.

    Attributes:
        arena: Where the copies lie.
    """

    def __init__(self, collectives: Collectives) -> None:
        self._main = collectives
        self._beside: Collectives | None = None  # made by the first save
        self.arena = Arena()
        self._last: Pending | None = None
        _before_executors_end(_join_savers)

    def start(self, saving: Saving, after: Callable[[], None]) -> Pending:
        """Write in a thread what has been copied. Collective; after `wait`.

        Args:
            saving: Begun with this object's arena.
            after: Called in that thread when the checkpoint is complete.
        """
        self._beside = self._beside or self._main.beside()
        self._last = Pending(saving, self._beside, after)
        self._last.start()
        atexit.register(self._last.tell)  # the save alone: this object and its memory may go before
        return self._last

    def wait(self) -> None:
        """Wait for the last save; the same outcome on all ranks.

        Raises:
            CheckpointError: if it failed and nobody has been told so far.
        """
        last, self._last = self._last, None
        if last is not None:
            atexit.unregister(last.tell)
            last.wait()


def _join_savers() -> None:
    """Wait for every save that is being written."""
    for thread in threading.enumerate():
        if isinstance(thread, Pending):
            thread.join()


def _before_executors_end(function: Callable[[], None]) -> None:
    """Call `function` when the main thread has ended, while thread pools still take work.

    The interpreter shuts all pools before it waits for other threads, and the clients of object stores look up names
    in one: without this, a save that is still being written would fail when it needs a new connection. `atexit` is
    later still. Python has no public hook at this point; concurrent.futures uses this one, and must have done so first.
    """
    assert concurrent.futures.thread  # imported, so registered: the hooks are called in reverse order
    register = getattr(threading, "_register_atexit", None)
    if register is not None:
        with contextlib.suppress(RuntimeError):  # the interpreter is ending already
            register(function)
