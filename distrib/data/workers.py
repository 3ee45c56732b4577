"""Data workers: when they are forked, and what is said when one ends before its work is done."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from typing import Any

import torch.distributed as dist
from torch.utils.data import DataLoader

from distrib.collectives.threads import let_threads_finish
from distrib.errors import DataError


def iterator_of(loader: DataLoader[Any]) -> Iterator[Any]:
    """Return a loader's iterator; its workers are forked while no thread of gloo is at work.

    A worker that is forked while such a thread is about to take the interpreter's lock is stuck for ever, and with it
    the job (CPython issue 112275).
    """
    if loader.num_workers and dist.is_available() and dist.is_initialized():
        let_threads_finish()
    return iter(loader)


@contextmanager
def naming_dead_workers(iterator: Any) -> Iterator[None]:
    """Turn what torch raises when a worker has been killed, which may be an EOFError, into our error.

    Args:
        iterator: A DataLoader's iterator.

    Raises:
        DataError: D0519, naming the worker's process id and signal.
    """
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:
        workers = getattr(iterator, "_workers", ())
        ended = wait([x.sentinel for x in workers], timeout=1)
        for worker in workers:
            if worker.sentinel in ended:  # it has closed its pipes; its exit code comes a moment later
                worker.join(timeout=1)
        dead = [(x.pid, x.exitcode) for x in workers if (x.exitcode or 0) < 0]
        if not dead:
            raise
        told = ", ".join(f"{pid} by {_name(code)}" for pid, code in dead)
        raise DataError(
            "D0519",
            f"the data worker with process id {told} was ended from outside, and its batches are lost",
            fix="if it was SIGKILL, the machine had probably run out of memory: use fewer workers or smaller batches; "
            "if SIGBUS, enlarge /dev/shm",
        ) from error


def _name(exit_code: int) -> str:
    try:
        return signal.Signals(-exit_code).name
    except ValueError:
        return f"signal {-exit_code}"
