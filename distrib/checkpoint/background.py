"""Saving while training goes on: one thread, one save at a time, and no error is lost."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

from distrib.checkpoint.staging import Arena
from distrib.checkpoint.writer import Saving
from distrib.collectives.base import Collectives

_log = logging.getLogger(__name__)


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
        try:
            self._saving.finish(self._collectives)
            self._after()
        except BaseException as error:  # noqa: BLE001 (raised where somebody waits, or logged at the end)
            self._error = error

    def wait(self) -> Path:
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
    """

    def __init__(self, collectives: Collectives) -> None:
        self._main, self._beside = collectives, None
        self._arena = Arena()
        self._last: Pending | None = None

    _beside: Collectives | None

    def start(self, saving: Saving, after: Callable[[], None]) -> Pending:
        """Copy what is to be saved, and go on writing in a thread. Collective; after `wait`.

        Args:
            saving: A planned save.
            after: Called in that thread when the checkpoint is complete.
        """
        self._beside = self._beside or self._main.beside()
        saving.stage(self._arena)
        self._last = Pending(saving, self._beside, after)
        self._last.start()
        return self._last

    def wait(self) -> None:
        """Wait for the last save; the same outcome on all ranks.

        Raises:
            CheckpointError: if it failed and nobody has been told so far.
        """
        last, self._last = self._last, None
        if last is not None:
            last.wait()

    def finish(self) -> None:
        """At the end of the process: wait, and log a failure that nobody has been told of."""
        if self._last is not None:
            self._last.tell()
            self._last = None
