"""Imports once what every rank needs, then forks the ranks: `python preloader.py CONTROL MODULES WANTED KIND TARGET [args]`.

CONTROL is a socket to the launcher, over which come the orders to start ranks and their descriptors; MODULES and
WANTED are names with commas between; the rest is the program, which stands there so that `ps` and `pkill -f` show it for
every rank.

A rank is forked by a child of this process that then ends, so that the launcher, a subreaper, becomes the rank's
parent and can wait for it. The ranks do nothing before that. Another child serves the store over which they find each
other, so that the store outlives each of them. Linux only. Standard library only, but for what
MODULES and WANTED name.
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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

_MAX_MESSAGE = 1 << 18  # bytes
_MAX_FDS = 8
_MAX_REASON = 2000  # characters
_MOMENT_S = 0.0005
_HELD = (signal.SIGINT, signal.SIGTERM)
_STORE = "distrib.collectives.store"  # knows how to serve one
_DEVICES = "distrib.devices"  # knows which of them have been touched; both are there only if torch is


def main() -> None:
    """Load the modules, then start ranks until the launcher closes the socket. Returns in the ranks only."""
    control, modules, wanted, kind, target, *args = sys.argv[1:]
    if not getattr(sys.flags, "safe_path", False):  # Python 3.11 and newer
        sys.path.pop(0)  # this file's folder, where a module may have the name of somebody else's
    channel = socket.socket(fileno=int(control))
    channel.set_inheritable(False)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HELD)  # what the modules start is not to have them blocked
    try:
        _send(channel, preload(_named(modules), _named(wanted), _folder_of(kind, target)))
        signal.pthread_sigmask(signal.SIG_BLOCK, _HELD)  # until a rank can handle them
        rank = _serve(channel)
    except (OSError, MemoryError) as error:
        _send(channel, {"error": f"{type(error).__name__}: {error}"[:_MAX_REASON]})
        os._exit(1)
    channel.detach()  # closed in a rank: the object must not close whatever has its number then
    if not getattr(sys.flags, "safe_path", False):
        sys.path.insert(0, "")  # for the worker to replace
    _reopen_streams()
    worker = _load("worker")
    worker.tie_to_launcher(rank.life, rank.launcher)
    worker.become(kind, target, args, rank.record)


def _named(names: str) -> list[str]:
    return [name for name in names.split(",") if name]


def _folder_of(kind: str, target: str) -> str:
    """Return where the program's own modules are; an empty text for a function, which brings its path along."""
    if kind == "function":
        return ""
    return os.path.dirname(os.path.realpath(target)) if kind == "script" else os.getcwd()  # noqa: PTH109, PTH120


def preload(modules: list[str], wanted: list[str], folder: str) -> dict[str, Any]:
    """Import modules, and say what stands against forking now.

    Args:
        modules: What everybody needs.
        wanted: What this program needs, perhaps from its own folder.
        folder: The program's own, which comes first where it looks for modules.

    Returns:
        failed: name -> why it could not be imported. unsafe: reasons in words; empty if forking is safe. store: whether
        the ranks' store can be served.
    """
    failed, unsafe, threads = {}, [], threading.active_count()
    known = set(sys.modules)
    gc.disable()  # much of the time of such imports is looking for garbage that is not there
    for name in [*modules, *wanted]:
        try:
            with _first(folder if name in wanted else ""):
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
    unsafe += [f"{path} has the name of a module that is loaded already" for path in _hidden(folder, known)]
    return {"failed": failed, "unsafe": unsafe, "store": _STORE in sys.modules}


@contextlib.contextmanager
def _first(folder: str) -> Iterator[None]:
    """Look for modules in a folder first; an empty text is none."""
    if folder:
        sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder:
            sys.path.remove(folder)


def _hidden(folder: str, known: set[str]) -> list[str]:
    """Return the program's own modules that it would not get, since one of that name has been loaded here.

    Args:
        folder: Where they are.
        known: What is loaded in every interpreter, before the program.
    """
    try:
        here = set(os.listdir(folder)) if folder else set()  # noqa: PTH208 (names only)
    except OSError:
        return []
    names = {name.partition(".")[0] for name in sys.modules} - known
    paths = {name: f"{folder}/{name}.py" for name in names if f"{name}.py" in here}
    paths |= {name: f"{folder}/{name}/__init__.py" for name in names & here}
    return sorted(
        path
        for name, path in paths.items()
        if getattr(sys.modules.get(name), "__file__", None) != path and os.path.isfile(path)  # noqa: PTH113
    )


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
    store = 0
    while True:
        orders, fds = _receive(channel)
        if store:  # of the attempt before; the launcher has ended it
            os.waitpid(store, 0)
            store = 0
        if orders is None:
            os._exit(0)
        ranks = [(orders, fds[2:] if orders["listening"] else fds)]
        ranks += [_receive(channel) for _ in range(orders["others"])]  # all, before anything can fail
        if any(order is None for order, _ in ranks):
            os._exit(1)  # the launcher has gone, or could not tell us everything
        try:
            if orders["listening"]:
                listening, life, *_ = fds
                store = _serve_store(
                    listening, life, [channel.fileno(), *(fd for _, own in ranks for fd in own)]
                )
            rank, answer = _fork_ranks(ranks, [channel.fileno()])
        except OSError as error:
            rank, answer = None, {"pids": [], "errno": error.errno}
        if rank is not None:
            return rank
        for _, own in ranks:
            for fd in own:
                os.close(fd)
        _send(channel, {**answer, "store": store})


def _fork_ranks(
    ranks: list[tuple[Any, list[int]]], private: list[int]
) -> tuple[_Rank | None, dict[str, Any]]:
    """Fork a process that forks the ranks and ends.

    Returns:
        In a rank, what it needs; here None, and the answer to the launcher: `pids` in the order of the ranks, and
        `errno`, which is not 0 if there are not all of them.
    """
    pids_read, pids_write = os.pipe()
    _flush()
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
    numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
    if numpy is not None:
        numpy.random.seed()  # a fresh process would have numbers of its own; Python's `random` sees to itself
    if torch is not None and hasattr(torch, "default_generator"):
        torch.default_generator.seed()
    # It ends in a moment. Its pipes close before its children are handed on, so its id is what tells.
    while os.getppid() == between:
        time.sleep(_MOMENT_S)
    return _Rank(life, record, order["launcher"])


def _serve_store(listening: int, life: int, others: list[int]) -> int:
    """Fork a process that serves the ranks' store until the launcher ends it, or has ended; return its id.

    Args:
        listening: The socket on which it listens.
        life: A pipe whose other end the launcher holds.
        others: Descriptors that it has no business with.
    """
    pid = -1
    try:
        pid = os.fork()
    finally:
        if pid:  # not in the child: here they are needed no more, also if there is none
            os.close(listening)
            os.close(life)
    if pid:
        return pid
    try:
        for fd in others:
            os.close(fd)
        server = importlib.import_module(_STORE).serve(listening)
        os.read(life, 1)
        del server
    except BaseException as error:  # noqa: BLE001 (it goes no further)
        print(f"distrib: the ranks' store cannot be served: {error}", file=sys.stderr, flush=True)  # noqa: T201
    finally:
        os._exit(0)


def _reopen_streams() -> None:
    """Give Python streams that fit what now lies behind descriptors 0, 1 and 2."""
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        before, mode = getattr(sys, name), "w" if fd else "r"
        if before is None:
            continue
        raw = io.FileIO(fd, mode, closefd=False)
        raw.name = f"<{name}>"
        unbuffered = bool(os.environ.get("PYTHONUNBUFFERED")) and mode == "w"
        buffered = raw if unbuffered else io.BufferedWriter(raw) if mode == "w" else io.BufferedReader(raw)
        stream = io.TextIOWrapper(
            buffered, before.encoding, before.errors, line_buffering=mode == "w", write_through=unbuffered
        )
        stream.mode = mode  # type: ignore[misc]  # as Python does it
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _flush() -> None:
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
