"""Data workers: when they are forked, and what is said when one ends before its work is done."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import wait
from typing import Any

import torch.distributed as dist
from torch.utils.data import DataLoader, get_worker_info

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


def worker_init(loader: DataLoader[Any]) -> Callable[[int], None]:
    """Return what a worker calls first; the user's `worker_init_fn` finds its own data set in the worker's information."""
    return _WorkerInit(loader.worker_init_fn)


class _WorkerInit:
    def __init__(self, function: Callable[[int], None] | None) -> None:
        self._function = function

    def __call__(self, worker: int) -> None:
        sys.excepthook = partial(_unless_the_rank_has_gone, sys.excepthook)
        if self._function is None:
            return
        info = get_worker_info()
        assert info is not None, "torch calls this in a worker"
        ours: Any = info.dataset
        object.__setattr__(info, "dataset", ours.dataset)  # it is frozen
        self._function(worker)


def _unless_the_rank_has_gone(report: Callable[..., None], kind: type[BaseException], *others: Any) -> None:
    """Keep a worker from telling that its rank hangs up on it: the rank ends, and says itself why.

    What goes wrong in the data set's code does not come here; torch sends it to the rank.
    """
    if not issubclass(kind, ConnectionError):
        report(kind, *others)


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
        told = ", ".join(f"{pid} ({_name(code)})" for pid, code in dead)
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
