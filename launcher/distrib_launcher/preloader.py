"""Imports once what every rank needs, then forks the ranks: `python preloader.py CONTROL MODULES KIND TARGET [args]`.

CONTROL is a socket to the launcher, over which come the orders to start ranks and their descriptors; MODULES are names
with commas between; the rest is the program, which stands there so that `ps` and `pkill -f` show it for every rank.

A rank is forked by a child of this process that then ends, so that the launcher, a subreaper, becomes the rank's
parent and can wait for it. The ranks do nothing before that. Another child serves the store over which they find each
other, so that the store outlives each of them. Linux only. Standard library only, but for what MODULES name.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import io
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

_MAX_MESSAGE = 1 << 20  # bytes
_MAX_FDS = 8
_MAX_REASON = 2000  # characters
_MOMENT_S = 0.0005
_HELD = (signal.SIGINT, signal.SIGTERM)
_STORE = "distrib.collectives.store"  # knows how to serve one
_DEVICES = "distrib.devices"  # knows which of them have been touched; both are there only if torch is


def main() -> None:
    """Load the modules, then start ranks until the launcher closes the socket. Returns in the ranks only."""
    control, modules, kind, target, *args = sys.argv[1:]
    if not getattr(sys.flags, "safe_path", False):  # Python 3.11 and newer
        sys.path.pop(0)  # this file's folder, where a module may have the name of somebody else's
    channel = socket.socket(fileno=int(control))
    channel.set_inheritable(False)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HELD)  # what the modules start is not to have them blocked
    loaded = preload([name for name in modules.split(",") if name])
    _send(channel, loaded)
    signal.pthread_sigmask(signal.SIG_BLOCK, _HELD)  # until a rank can handle them
    rank = _serve(channel)
    channel.detach()  # closed in a rank: the object must not close whatever has its number then
    if not getattr(sys.flags, "safe_path", False):
        sys.path.insert(0, "")  # for the worker to replace
    _reopen_streams()
    worker = _load("worker")
    worker.tie_to_launcher(rank.life, rank.launcher)
    worker.become(kind, target, args, rank.record)


def preload(modules: list[str]) -> dict[str, Any]:
    """Import modules, and say what stands against forking now.

    Returns:
        failed: name -> why it could not be imported. unsafe: reasons in words; empty if forking is safe. store: whether
        the ranks' store can be served.
    """
    failed, unsafe, threads = {}, [], threading.active_count()
    gc.disable()  # a fifth of the time of such imports is looking for garbage that is not there
    for name in modules:
        try:
            importlib.import_module(name)
        except BaseException as error:  # noqa: BLE001 (the program will see it again, and tell it better)
            failed[name] = f"{type(error).__name__}: {error}"[:_MAX_REASON]
        if threading.active_count() > threads:
            unsafe.append(f"importing {name} has started {threading.active_count() - threads} threads")
            threads = threading.active_count()
    gc.freeze()  # what is loaded stays shared by all ranks: no collection touches it
    gc.enable()
    if not unsafe and _native_threads():
        unsafe.append(f"what was imported has started {_native_threads()} native threads")
    if _DEVICES in sys.modules:
        touched = importlib.import_module(_DEVICES).initialized_devices()
        unsafe += [f"what was imported has initialised the device {name}" for name in touched]
    return {"failed": failed, "unsafe": unsafe, "store": _STORE in sys.modules}


def _native_threads() -> int:
    """Return how many threads there are beside this one, but for those of libraries that prepare for a fork.

    OpenBLAS, for one, ends its threads before a fork and starts new ones when it needs them.
    """
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    return len(os.listdir("/proc/self/task")) - 1  # noqa: PTH208 (names only)


@dataclass(frozen=True)
class _Rank:
    """What a rank needs of its order: descriptors, and the process that must be its parent."""

    life: int
    record: int
    launcher: int


def _serve(channel: socket.socket) -> _Rank:
    """Carry out orders until the launcher has closed its end. Returns in the ranks only."""
    store = None
    while True:
        orders, fds = _receive(channel)
        if store is not None:  # of the attempt before
            store.end()
            store = None
        if orders is None:
            os._exit(0)
        try:
            if orders["listening"]:
                store = _Store(fds.pop(0), [channel.fileno(), *fds])
            ranks = [(orders, fds)] + [_receive(channel) for _ in range(orders["others"])]
            if any(order is None for order, _ in ranks):
                os._exit(1)  # the launcher has gone, or could not tell us everything
            rank, answer = _fork_ranks(ranks, [channel.fileno(), *([store.life] if store else [])])
        except OSError as error:
            rank, answer = None, {"pids": [], "errno": error.errno}
        if rank is not None:
            return rank
        for _, own in ranks:
            for fd in own:
                os.close(fd)
        _send(channel, {**answer, "store": store.pid if store else 0})


def _fork_ranks(
    ranks: list[tuple[Any, list[int]]], private: list[int]
) -> tuple[_Rank | None, dict[str, Any]]:
    """Fork a process that forks the ranks and ends.

    Returns:
        In a rank, what it needs; here None, and the answer to the launcher: `pids` in the order of the ranks, and
        `errno`, which is not 0 if there are not all of them.
    """
    pids_read, pids_write = os.pipe()
    flush()
    between = os.fork()
    if between:
        os.close(pids_write)
        with os.fdopen(pids_read) as pipe:
            told = pipe.read()
        os.waitpid(between, 0)
        return None, json.loads(told)
    own, pids = os.getpid(), list[int]()
    refused = 0
    for number, (order, fds) in enumerate(ranks):
        try:
            pid = os.fork()
        except OSError as error:
            refused = error.errno or 1
            break
        if not pid:
            others = [fd for k, (_, its) in enumerate(ranks) if k != number for fd in its]
            for fd in (*private, *others, pids_read, pids_write):
                os.close(fd)
            return _as_rank(order, fds, own), {}
        pids.append(pid)
    with os.fdopen(pids_write, "w") as pipe:
        json.dump({"pids": pids, "errno": refused}, pipe)
    os._exit(0)


def _as_rank(order: Any, fds: list[int], between: int) -> _Rank:
    """Take one's session, streams and variables, and wait until the launcher is the parent."""
    os.setsid()
    life, record, *streams = fds
    for target, fd in zip((1, 2), streams, strict=False):
        os.dup2(fd, target)
        os.close(fd)
    if not order["stdin"]:
        nowhere = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nowhere, 0)
        os.close(nowhere)
    os.environ.update(order["env"])
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed()  # a fresh process would have numbers of its own; Python's `random` sees to itself
    while (
        os.getppid() == between
    ):  # it ends in a moment; its end is not seen before its children are handed on
        time.sleep(_MOMENT_S)
    return _Rank(life, record, order["launcher"])


class _Store:
    """A process that serves the ranks' store until it is told to end, or nobody is left who could tell it.

    Args:
        listening: The socket on which it listens.
        others: Descriptors that it has no business with.

    Attributes:
        pid: The process.
        life: The descriptor whose closing ends it.
    """

    def __init__(self, listening: int, others: list[int]) -> None:
        life, self.life = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            for fd in (self.life, *others):
                os.close(fd)
            self._serve(listening, life)
        os.close(listening)
        os.close(life)

    def _serve(self, listening: int, life: int) -> None:
        try:
            server = importlib.import_module(_STORE).serve(listening)
            os.read(life, 1)
            del server
        except BaseException:  # noqa: BLE001 (it goes no further)
            traceback.print_exc()
        finally:
            os._exit(0)

    def end(self) -> None:
        """End it, and wait for that."""
        os.close(self.life)
        os.waitpid(self.pid, 0)


def _reopen_streams() -> None:
    """Give Python streams that fit what now lies behind descriptors 0, 1 and 2."""
    for name, fd, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        before = getattr(sys, name)
        if before is None:
            continue
        unbuffered = bool(os.environ.get("PYTHONUNBUFFERED")) and mode == "w"
        raw = open(fd, f"{mode}b", 0 if unbuffered else -1, closefd=False)  # noqa: SIM115 (stays open)
        stream = io.TextIOWrapper(
            raw, before.encoding, before.errors, line_buffering=True, write_through=unbuffered
        )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def flush() -> None:
    """Write out what is buffered: each forked process would write it again."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()


def _receive(channel: socket.socket) -> tuple[Any, list[int]]:
    """Return one order and its descriptors; None if the launcher has closed its end, or not all of it came."""
    text, fds, flags, _ = socket.recv_fds(channel, _MAX_MESSAGE, _MAX_FDS)
    is_whole = text and not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC)
    return (json.loads(text) if is_whole else None), fds


def _send(channel: socket.socket, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # the launcher has gone; the next read tells
        channel.sendall(json.dumps(message).encode())


def _load(name: str) -> ModuleType:
    """Import a neighbour of this file under a name that nobody else uses, wherever the package is installed."""
    private = f"_distrib_{name}"
    spec = importlib.util.spec_from_file_location(private, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[private] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
