"""A function on N real ranks: their results, or the one traceback that matters."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

from distrib.testing.rank import Failure, FunctionAddress, address_of, rank_main

_AFTER_FAILURE_S = 5.0  # how long the other ranks may take to fail too, so that the first cause can be told


class RanksFailed(AssertionError):  # noqa: N818 (an assertion about several ranks)
    """A rank raised, died or did not finish; the message is the root cause's own traceback."""


@dataclass
class _Rank:
    number: int
    process: ForkServerProcess
    results: connection.Connection
    stacks: Path
    outcome: tuple[bool, Any] | None = None


def run_ranks(fn: Callable[..., Any], n: int, *args: Any, timeout_s: float = 60, **kwargs: Any) -> list[Any]:
    """Call `fn(*args, **kwargs)` in `n` processes that form a job of world size `n` on this machine.

    Each process has the variables that `distrib launch` sets, one CPU thread, and no process group yet: an
    `Accelerator` or `init_process_group` makes it. Processes are forked from a server that has torch loaded.

    Args:
        fn: A function at module level (of any file), so that the ranks can import it.
        n: World size, at least 1.
        args: Picklable arguments, equal on all ranks.
        timeout_s: Seconds after which the ranks are killed and their stacks shown.
        kwargs: Picklable keyword arguments.

    Returns:
        What each rank returned (picklable), in rank order.

    Raises:
        RanksFailed: if a rank raised, died of a signal or overran the time; no process is left behind.
    """
    with contextlib.ExitStack() as stack:
        port = stack.enter_context(_reserved_port())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ranks-")))
        running: list[_Rank] = []
        stack.callback(_kill, running)  # first: a start may fail when others are there already
        for rank in range(n):
            running.append(_start(rank, n, port, folder, address_of(fn), args, kwargs))  # noqa: PERF401 (as above)
        _collect(running, time.monotonic() + timeout_s, timeout_s)
    return [rank.outcome[1] for rank in running if rank.outcome is not None]


def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["distrib.testing.preload"])
    return context


@contextlib.contextmanager
def _reserved_port() -> Iterator[int]:
    """Hold a free port, bound but not listening, so that no other job is given it."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


def _start(
    rank: int, n: int, port: int, folder: Path, function: FunctionAddress, args: Sequence[Any], kwargs: Any
) -> _Rank:
    env = {
        "RANK": str(rank), "WORLD_SIZE": str(n), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(n),
        "NODE_RANK": "0", "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    context = _context()
    ours, theirs = context.Pipe(duplex=False)
    stacks = folder / f"stacks-{rank}"
    process = context.Process(
        target=rank_main,
        args=(env, multiprocessing.get_start_method(), str(stacks), theirs, function, args, kwargs),
        name=f"rank-{rank}",
    )
    process.start()
    theirs.close()
    return _Rank(rank, process, ours, stacks)


def _collect(running: list[_Rank], deadline: float, timeout_s: float) -> None:
    failed: _Rank | None = None
    while waiting := [rank for rank in running if rank.outcome is None]:
        ready = connection.wait([rank.results for rank in waiting], max(deadline - time.monotonic(), 0))
        if not ready:
            break
        for rank in waiting:
            if rank.results in ready:
                rank.outcome = _outcome(rank)
                if failed is None and not rank.outcome[0]:
                    failed, deadline = rank, min(deadline, time.monotonic() + _AFTER_FAILURE_S)
    failures = [rank for rank in running if rank.outcome is not None and not rank.outcome[0]]
    if failures:
        raise RanksFailed(_report(failures, len(running)))
    if late := [rank for rank in running if rank.outcome is None]:
        raise RanksFailed(_late_report(late, timeout_s))
    for rank in running:
        rank.process.join(max(deadline - time.monotonic(), 1))


def _outcome(rank: _Rank) -> tuple[bool, Any]:
    try:
        outcome: tuple[bool, Any] = pickle.loads(rank.results.recv_bytes())  # noqa: S301 (from our own child)
    except (EOFError, ConnectionResetError):
        rank.process.join(_AFTER_FAILURE_S)
        return False, Failure(_how_it_ended(rank.process.exitcode), consequence=False, at=time.time())
    return outcome


def _how_it_ended(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f"killed by {signal.Signals(-exit_code).name}"
    return f"exit code {exit_code} without a result"


def _report(failures: list[_Rank], n: int) -> str:
    """Say what failed first: an exception that is no mere consequence of a lost peer, the earliest of them."""
    order = sorted(failures, key=lambda rank: (rank.outcome[1].consequence, rank.outcome[1].at))  # type: ignore[index]
    root, *others = order
    assert root.outcome is not None
    lines = [f"rank {root.number} of {n} failed:", root.outcome[1].text.rstrip()]
    if others:
        lines.append("also failed: " + ", ".join(f"rank {rank.number}" for rank in others))
    return "\n".join(lines)


def _late_report(late: list[_Rank], timeout_s: float) -> str:
    for rank in late:
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank.process.pid or 0, signal.SIGUSR1)  # faulthandler writes every thread's stack
    time.sleep(0.5)
    parts = [f"rank {rank.number}:\n{_read(rank.stacks)}" for rank in late]
    return f"no result after {timeout_s:g} s; where the ranks stood:\n" + "\n".join(parts)


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else "(no stack: the process did not answer)"


def _kill(running: list[_Rank]) -> None:
    for rank in running:
        if rank.process.is_alive():
            with contextlib.suppress(ProcessLookupError):  # it has not got so far as to have a group
                os.killpg(rank.process.pid or 0, signal.SIGKILL)
            rank.process.kill()
        rank.process.join()
        rank.results.close()
