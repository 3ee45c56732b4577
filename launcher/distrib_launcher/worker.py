"""What a worker runs before and after the user's program: `python worker.py LIFE RECORD LAUNCHER KIND TARGET [args]`.

LIFE is the read end of a pipe whose write end only the launcher (process id LAUNCHER) holds; RECORD is the write end
of a pipe on which the launcher hears how the program ended; KIND is "script", "module", "function" or "command". The
program then runs as the true `__main__`, as if `python` had started it. Standard library only: this runs before the
user's code.
"""

from __future__ import annotations

import builtins
import contextlib
import faulthandler
import importlib.machinery
import importlib.util
import io
import json
import os
import select
import signal
import sys
import threading
import time
import traceback
import types
from pathlib import Path
from types import CodeType, FrameType, TracebackType
from typing import Any

_MAX_LINES = 200  # of an exception's message that travel to the launcher, from both of its ends
_MAX_WIDTH = 3000  # characters of each
_LONG_WORD = 300  # characters, more than a secret has
_MAX_PARTS = 20  # of an exception group
_MAX_FRAMES = 50  # of each of them, and of a cause; the innermost
_MOMENT_S = 0.001
_PR_SET_PDEATHSIG = 1
RESULT = "result-"  # and the rank: the file with what a function has returned
BINDING = "_DISTRIB_BINDING"  # environment variable: the rank's `numa.Binding` as JSON
HELD_SIGNALS = (
    signal.SIGINT,
    signal.SIGTERM,
)  # the launcher starts us with these blocked, until we can handle them


def main() -> None:
    """Tie this process to its launcher and become the user's program."""
    life, record, launcher, kind, target, *args = sys.argv[1:]
    tie_to_launcher(int(life), int(launcher))
    if kind == "command":
        _bind_to_cores()
        os.set_inheritable(int(life), True)  # an open pipe is what ties the command to the launcher
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_SIGNALS)
        for ignored_by_python in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(ignored_by_python, signal.SIG_DFL)
        os.execvp(target, [target, *args])  # noqa: S606 (the user's own command, no shell)
    become(kind, target, args, int(record))


def become(kind: str, target: str, args: list[str], record: int) -> None:
    """Run the program in this process, as if `python` had started it, and tell on `record` how it ended."""
    _bind_to_cores()
    sys.argv = [target, *args]
    sys.orig_argv = [sys.executable, *(["-m"] if kind == "module" else []), target, *args]
    os.set_inheritable(record, False)
    recorder = Recorder(record)
    recorder.watch_signals()
    recorder.leave_errors_to_the_report()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)  # a pipe would be buffered in blocks, and lost at SIGKILL
    recorder.run(kind, target)


def _bind_to_cores() -> None:
    """Bind this process as the launcher has decided, before anything starts a thread; see `numa.py`."""
    binding = os.environ.pop(BINDING, "")
    if not binding:
        return
    numa = load_neighbour("numa")
    refused = numa.bind_self(numa.Binding(*json.loads(binding)))
    if refused:
        print(f"distrib: warning: not bound to {refused}", file=sys.stderr)  # noqa: T201 (the rank's own output)


def load_neighbour(name: str) -> types.ModuleType:
    """Import a file beside this one, wherever the package is installed, under a name that nobody else has."""
    private = f"_distrib_{name}"
    spec = importlib.util.spec_from_file_location(private, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[private] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tie_to_launcher(life: int, launcher: int) -> None:
    """See to it that this process group is killed when the launcher ends, however it ends.

    On Linux the kernel does it, even for a process that is stopped or stuck in native code: SIGKILL to the group when
    the pipe's other end closes. Elsewhere a thread watches the pipe.
    """
    os.set_inheritable(life, False)
    if sys.platform != "linux":
        threading.Thread(target=_end_with_pipe, args=(life,), daemon=True).start()
    elif not _killed_with_pipe(life):
        import ctypes  # noqa: PLC0415 (needed only here)

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != launcher:  # it ended before we were tied
        os.kill(os.getpid(), signal.SIGKILL)


def _killed_with_pipe(life: int) -> bool:
    """Let the kernel kill our group when the pipe's other end closes; False where it cannot.

    The parent-death signal is only the substitute: it kills this process alone, and as soon as the launcher's main
    thread is gone. Then nobody would hold the pipe any more when the launcher's last thread closes it, and what this
    process has started would live on.
    """
    import fcntl  # noqa: PLC0415 (not on every platform)

    try:
        fcntl.fcntl(life, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(life, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(life, fcntl.F_SETFL, fcntl.fcntl(life, fcntl.F_GETFL) | os.O_ASYNC)
    except OSError:
        return False
    return True


def _end_with_pipe(life: int) -> None:
    os.read(life, 1)
    os.killpg(os.getpgrp(), signal.SIGKILL)


class Recorder:
    """Runs the program and tells the launcher, as one JSON object a line, how it ended.

    Args:
        record: File descriptor to write to. A crash in native code writes its Python stack there as plain text.
    """

    def __init__(self, record: int) -> None:
        self._record, self._pid, self._signal = record, os.getpid(), 0
        self._masks: dict[int, set[signal.Signals | int]] = {}  # of threads that are forking
        self._told = self._over = False
        self._letting_go = self._late = 0

    def watch_signals(self) -> None:
        """Let SIGTERM end the program through `atexit`; a handler of the user's own replaces this one."""
        signal.signal(signal.SIGTERM, self._terminate)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has it ignored
        for asked_to_end in (signal.SIGTERM, signal.SIGINT):  # tells where we stand, even in native code
            faulthandler.register(asked_to_end, file=self._record, all_threads=False, chain=True)
        os.register_at_fork(
            before=self._hold, after_in_parent=self._let_go, after_in_child=self._forget_launcher
        )
        if not faulthandler.is_enabled():
            faulthandler.enable(file=self._record, all_threads=False)

    def leave_errors_to_the_report(self) -> None:
        """Print no traceback that the launcher will show; torch.distributed's hook wraps this one, and stays silent."""
        sys.excepthook = self._show

    def _show(self, kind: type[BaseException], error: BaseException, found: TracebackType | None) -> None:
        if not self._told or os.getpid() != self._pid:
            sys.__excepthook__(kind, error, found)

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        if self._over:  # it is ending by itself
            return
        if self._letting_go:  # an exception would get no further than the callback
            self._late = number
            return
        self._signal = number
        raise SystemExit(128 + number)

    def _hold(self) -> None:
        """Keep a SIGTERM back while this thread forks: the child must get it after it has forgotten our handler."""
        held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        self._masks[threading.get_ident()] = held

    def _let_go(self) -> None:
        self._letting_go += 1
        signal.pthread_sigmask(signal.SIG_SETMASK, self._masks.pop(threading.get_ident()))
        self._letting_go -= 1
        if self._late and not self._letting_go:
            number, self._late = self._late, 0
            threading.Thread(target=_send_soon, args=(number,), daemon=True).start()

    def _forget_launcher(self) -> None:
        """In a forked child: a signal has its default effect, and a crash is told on stderr, not as the rank's."""
        if signal.getsignal(signal.SIGTERM) == self._terminate:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self._let_go()
        if os.getppid() == self._pid:
            with contextlib.suppress(OSError):  # stderr is closed
                os.dup2(2, self._record, inheritable=False)

    def run(self, kind: str, target: str) -> None:
        """Run the program; never returns normally unless it did."""
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_SIGNALS)
            {"module": run_module, "script": run_script, "function": run_function}[kind](target)
            self._over = True
            if sys.__stdout__ is not None and not sys.__stdout__.closed:
                sys.__stdout__.flush()  # an error that comes later, Python only mentions
        except BaseException as error:
            if os.getpid() != self._pid:  # a child that the program forked
                raise
            self._over = True
            signal.signal(
                signal.SIGCHLD, signal.SIG_DFL
            )  # torch's handler raises, which would hide this error
            sys.exit(self._ended(error))

    def _ended(self, error: BaseException) -> int:
        if self._signal and isinstance(error, SystemExit):
            return self._say({"kind": "signal", "signal": self._signal, "exit_code": 128 + self._signal})
        if isinstance(error, KeyboardInterrupt):
            return self._say(
                {"kind": "signal", "signal": int(signal.SIGINT), "exit_code": 128 + signal.SIGINT}
            )
        if isinstance(error, SystemExit):
            return self._exited(error.code, str(traceback.TracebackException.from_exception(error)))
        if isinstance(error, BrokenPipeError) and silence_unread_streams():
            return self._say(
                {"kind": "signal", "signal": int(signal.SIGPIPE), "exit_code": 128 + signal.SIGPIPE}
            )
        user_traceback = without_own_frames(error.__traceback__)
        code = self._say({"kind": "exception", **describe(error, user_traceback)})
        self._told = True
        sys.excepthook(type(error), error, user_traceback)  # the program may have set its own
        return code

    def _exited(self, status: object, text: str) -> int:
        if status is None or isinstance(status, int):
            return self._say({"kind": "exit", "exit_code": (status or 0) & 0xFF})
        return self._say({"kind": "exit", **_message(text), "exit_code": 1})

    def _say(self, event: dict[str, Any]) -> int:
        """Send the event; return the exit code that it names."""
        line = json.dumps({"time": time.monotonic(), **event}) + "\n"
        with os.fdopen(os.dup(self._record), "w", encoding="utf-8") as pipe:
            pipe.write(line)
        return int(event["exit_code"])


def _send_soon(number: int) -> None:
    """Send this process a signal when a callback that runs now is over; until then it is only put off again."""
    time.sleep(_MOMENT_S)
    os.kill(os.getpid(), number)


def silence_unread_streams() -> bool:
    """If nobody reads our stdout or stderr any more, write to /dev/null instead; return whether that was so."""
    streams = select.poll()
    for stream in (1, 2):
        streams.register(stream, 0)
    unread = [stream for stream, state in streams.poll(0) if state & (select.POLLERR | select.POLLHUP)]
    for stream in unread:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream)
        os.close(nowhere)
    return bool(unread)


def describe(error: BaseException, user_traceback: TracebackType | None) -> dict[str, Any]:
    """Return what the report needs of an exception.

    Returns:
        type, bases, lines and left_out (its message), frames, exit_code; and parts, those of an exception group, as
        (depth, text, frames), and causes, as (text, frames).
    """
    told = traceback.TracebackException(type(error), error, user_traceback, compact=True)
    return {
        "type": type(error).__qualname__,
        "bases": [base.__qualname__ for base in type(error).__mro__],
        **_message("".join(told.format_exception_only())),
        "frames": _frames(told),
        "parts": _parts(told)[:_MAX_PARTS],
        "causes": _causes(told),
        "exit_code": _exit_code(error),
    }


def _message(text: str) -> dict[str, Any]:
    lines, left_out = text.splitlines(), 0
    if len(lines) > _MAX_LINES:
        half = _MAX_LINES // 2
        lines, left_out = [*lines[:half], *lines[-half:]], len(lines) - 2 * half
    return {"lines": [_trimmed(line) for line in lines], "left_out": left_out}


def _trimmed(line: str) -> str:
    """Keep both ends of a very long line, cut between words, so that no half of a secret is left to be recognized."""
    if len(line) <= _MAX_WIDTH:
        return line
    head, tail = line[: _MAX_WIDTH * 2 // 3], line[-_MAX_WIDTH // 3 :]
    end, begin = head.rfind(" ", len(head) - _LONG_WORD), tail.find(" ", 0, _LONG_WORD)
    head = head[: end if end >= 0 else -_LONG_WORD]
    return f"{head} ... {tail[begin + 1 if begin >= 0 else _LONG_WORD :]}"


def narrowed(line: str, most: int) -> str:
    """Keep both ends of a long line: a message begins with what went wrong and may end with why."""
    if len(line) <= most:
        return line
    end = most // 3
    return f"{line[: most - end - 5]} ... {line[-end:]}"


def _frames(told: traceback.TracebackException) -> list[list[object]]:
    return [[frame.filename, frame.lineno, frame.name, frame.line or ""] for frame in told.stack]


def _brief(told: traceback.TracebackException) -> list[object]:
    text = " ".join("".join(told.format_exception_only()).split())
    return [_trimmed(text), _frames(told)[-_MAX_FRAMES:]]


def _parts(told: traceback.TracebackException, depth: int = 1) -> list[list[object]]:
    parts: list[list[object]] = []
    for inner in getattr(told, "exceptions", None) or ():  # Python 3.11 and newer
        parts += [[depth, *_brief(inner)], *_parts(inner, depth + 1)]
    return parts


def _causes(told: traceback.TracebackException) -> list[list[object]]:
    causes: list[list[object]] = []
    shown = told
    while len(causes) < 3:
        inner = shown.__cause__ or (None if shown.__suppress_context__ else shown.__context__)
        if inner is None:
            break
        causes.append(_brief(inner))
        shown = inner
    return causes


def _exit_code(error: BaseException) -> int:
    """An exception ends a program with 1; distrib's own errors say which code is theirs."""
    errors = sys.modules.get("distrib.errors")
    return int(getattr(error, "exit_code", 1)) if errors and isinstance(error, errors.DistribError) else 1


def without_own_frames(found: TracebackType | None) -> TracebackType | None:
    """Drop the frames of this file and of the import machinery from the top of a traceback."""
    while found is not None and (
        found.tb_frame.f_code.co_filename == __file__ or "<frozen " in found.tb_frame.f_code.co_filename
    ):
        found = found.tb_next
    return found


def run_script(script: str) -> None:
    """Run a file, or a directory or zip archive that holds a `__main__.py`, as `python SCRIPT` does.

    Raises whatever the program raises.
    """
    if Path(script).is_dir() or script.endswith((".zip", ".pyz")):
        script = os.path.abspath(script)  # noqa: PTH100 (a plain string, as Python's own)
        _replace_path_entry(script)
        spec = importlib.machinery.PathFinder.find_spec("__main__", [script])
        if spec is None:
            raise SystemExit(f"can't find '__main__' module in {script!r}")
        _run_spec(spec)
        return
    _replace_path_entry(os.path.dirname(os.path.realpath(script)))  # noqa: PTH120 (a plain string, as Python's own)
    path = os.path.join(os.getcwd(), script)  # noqa: PTH109, PTH118 (Python keeps "./" and ".." here, pathlib drops it)
    with io.open_code(path) as file:
        code = compile(file.read(), path, "exec", dont_inherit=True)
    loader = importlib.machinery.SourceFileLoader("__main__", path)
    _run_code(code, __file__=path, __loader__=loader, __spec__=None, __package__=None, __cached__=None)


def run_module(name: str) -> None:
    """Run a module, or a package's `__main__`, as `python -m NAME` does. Raises whatever the program raises."""
    _replace_path_entry(os.getcwd())  # noqa: PTH109 (a plain string, as Python's own)
    spec = importlib.util.find_spec(name)
    if spec is not None and spec.submodule_search_locations is not None:
        spec = importlib.util.find_spec(f"{name}.__main__")
    if spec is None:
        raise SystemExit(f"no module named {name!r} that can be run with -m")
    sys.argv[0] = spec.origin or name
    _run_spec(spec)


def run_function(call: str) -> None:
    """Call the function that `distrib.launch` has written to a file; write what it returns beside that.

    Raises whatever the function raises.
    """
    import pickle  # noqa: PLC0415 (a script may not need it)

    _be_main(types.ModuleType("__main__"))
    with open(call, "rb") as file:  # noqa: PTH123 (as everywhere in this file)
        sys.path[:], sys.argv = pickle.load(file)  # noqa: S301 (from the process that started us)
        fn, args, kwargs = pickle.load(file)  # noqa: S301
    value = fn(*args, **kwargs)
    import cloudpickle  # noqa: PLC0415 (the function came by it)

    result = Path(call).with_name(f"{RESULT}{os.environ['RANK']}")
    result.write_bytes(cloudpickle.dumps(value))


def _run_spec(spec: importlib.machinery.ModuleSpec) -> None:
    code = getattr(spec.loader, "get_code")(spec.name)  # noqa: B009 (the loader protocol does not declare it)
    if code is None:
        raise SystemExit(f"no code object available for {spec.name}")
    _run_code(
        code,
        __file__=spec.origin,
        __loader__=spec.loader,
        __spec__=spec,
        __package__=spec.parent,
        __cached__=spec.cached,
    )


def _run_code(code: CodeType, **names: object) -> None:
    """Execute in a fresh `__main__`, so that pickling and multiprocessing find there what plain Python has there."""
    module = types.ModuleType("__main__")
    module.__dict__.update(names, __builtins__=builtins)
    _be_main(module)
    exec(code, module.__dict__)  # noqa: S102 (the user's program)


def _be_main(module: types.ModuleType) -> None:
    """Make a module the program's, for pickling and for `multiprocessing`, which has noted it under its own name."""
    sys.modules["__main__"] = module
    if "__mp_main__" in sys.modules:
        sys.modules["__mp_main__"] = module


def _replace_path_entry(entry: str) -> None:
    """Put the program's place where Python put this file's directory; with -P neither is wanted."""
    if not getattr(sys.flags, "safe_path", False):  # Python 3.11 and newer
        sys.path[0] = entry


if __name__ == "__main__":
    main()
