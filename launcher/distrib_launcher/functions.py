"""A function instead of a script: `distrib.launch` and `distrib.notebook_launcher`."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from distrib.config import RunConfig, load_config, with_code
from distrib.errors import LaunchError, NotBuiltError
from distrib_launcher.backends.local import Launch
from distrib_launcher.describing import start_up_lines
from distrib_launcher.plan import Program
from distrib_launcher.planning import make_plan
from distrib_launcher.redaction import Redactor
from distrib_launcher.worker import RESULT


def launch(
    fn: Callable[..., Any],
    args: Sequence[Any] = (),
    *,
    nproc: int | None = None,
    config: RunConfig | str | Path | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> list[Any]:
    """Call `fn(*args, **kwargs)` in the ranks of a job on this machine; the supervision of `distrib launch`.

    The ranks are processes of their own, started as `distrib launch` starts them: nothing that this process has
    loaded or initialised, CUDA included, disturbs them. Function and arguments travel by cloudpickle, so that they may
    be defined in a notebook or a script's `__main__`. Signals are handled as by the command while the call lasts.

    Args:
        fn: What every rank calls.
        args: Its arguments, equal on all ranks.
        nproc: Number of ranks; by default `launch.nproc_per_node` of `config`, else one for each accelerator.
        config: Settings, or a file with them; by default what `DISTRIB_*` variables say. `./distrib.yaml` is not read.
        kwargs: Its keyword arguments.

    Returns:
        What each rank returned, in rank order; `Accelerator` and models do not travel well, numbers and tensors do.

    Raises:
        LaunchError: if a rank failed (D0315), after the report has been printed; or if this is a rank itself, or not
            the main thread (D0316).
        ConfigError: if a setting is wrong, or `nproc` contradicts `config`.
        KeyboardInterrupt: after Ctrl-C, when the ranks have ended.
        SystemExit: likewise after SIGTERM or SIGHUP.
    """
    frame = sys._getframe(1)
    where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
    values = {} if nproc is None else {"launch.nproc_per_node": nproc}
    return _launch(fn, args, kwargs or {}, _read(config, values, where), where)


def notebook_launcher(
    function: Callable[..., Any],
    args: Sequence[Any] = (),
    num_processes: int | None = None,
    mixed_precision: str | None = None,
    use_port: int | str | None = None,
    num_nodes: int = 1,
    max_restarts: int = 0,
) -> None:
    """Train from a notebook: call `function(*args)` in the ranks of a job. The names are Accelerate's.

    It may stand in any cell: the ranks are no forks of the notebook's process, so an accelerator that has been
    touched there does not matter, and what the ranks change of the notebook's variables stays with them.

    Args:
        function: What every rank calls.
        args: Its arguments.
        num_processes: Number of ranks; by default one for each accelerator.
        mixed_precision: "no", "fp16" or "bf16"; by default what the function's own Accelerator says.
        use_port: Port at which the ranks meet; by default a free one.
        num_nodes: Number of machines; 1 for now.
        max_restarts: How often failed ranks are started again.

    Raises:
        LaunchError, ConfigError, KeyboardInterrupt: as `launch`.
    """
    if num_nodes != 1:
        raise NotBuiltError(f"notebook_launcher(num_nodes={num_nodes})")
    frame = sys._getframe(1)
    where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
    given = {
        "launch.nproc_per_node": num_processes,
        "mixed_precision": mixed_precision,
        "launch.master_port": int(use_port)
        if isinstance(use_port, str) and use_port.isdecimal()
        else use_port,
        "launch.max_restarts": max_restarts or None,
    }
    values = {key: value for key, value in given.items() if value is not None}
    _launch(function, args, {}, _read(None, values, where), where)


def _read(config: RunConfig | str | Path | None, values: Mapping[str, object], where: str) -> RunConfig:
    if not isinstance(config, RunConfig):
        config = load_config(file=config, env=os.environ, read_cwd=False)
    return with_code(config, values, where)


def _launch(
    fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], config: RunConfig, where: str
) -> list[Any]:
    env = dict(os.environ)
    _check_place(env, where)
    with tempfile.TemporaryDirectory(prefix="distrib-") as folder:
        call = Path(folder) / "call"
        _write_call(call, fn, args, kwargs, where)
        name = getattr(fn, "__qualname__", repr(fn))
        plan, reasons = make_plan(
            Program("function", str(call), title=f"{name}()"), config, env, stays_alone=True
        )
        job = Launch(plan, env, embedded=True)
        code = job.run("\n".join(start_up_lines(plan, reasons, config, Redactor(env))))
        if job.interrupted == signal.SIGINT:
            raise KeyboardInterrupt
        if job.interrupted:
            raise SystemExit(code)
        if code:
            raise LaunchError(
                "D0315",
                job.headline.removeprefix("distrib: ") or f"the launch has ended with exit code {code}",
                where=where,
                fix="the report above has the rank's own traceback, and what the others did",
            )
        return [_result(call, rank, where) for rank in range(plan.num_processes)]


def _check_place(env: Mapping[str, str], where: str) -> None:
    inside = "DISTRIB_CONFIG" in env and "RANK" in env
    if inside or threading.current_thread() is not threading.main_thread():
        raise LaunchError(
            "D0316",
            f"this is rank {env['RANK']} of a job already" if inside else "this is not the main thread",
            where=where,
            fix='put the call under `if __name__ == "__main__":`, or start the script without a launcher'
            if inside
            else "call it from the main thread: it has to handle Ctrl-C",
        )


def _write_call(
    call: Path, fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], where: str
) -> None:
    import cloudpickle  # noqa: PLC0415 (only who launches functions needs it)

    if isinstance(args, str) or not isinstance(args, Sequence):
        raise LaunchError(
            "D0324",
            f"args is {args!r}; expected a tuple of the function's arguments",
            where=where,
            fix="write (x,) for a single argument x",
        )
    try:
        what = cloudpickle.dumps((fn, tuple(args), dict(kwargs)))
    except (TypeError, AttributeError, ValueError, RuntimeError, pickle.PicklingError) as error:
        raise LaunchError(
            "D0317",
            f"the function or an argument cannot be sent to the ranks: {error}",
            where=where,
            fix="make what cannot travel inside the function: files, locks, processes, an Accelerator",
        ) from error
    with call.open("wb") as file:
        pickle.dump((sys.path, sys.argv), file)
        file.write(what)


def _result(call: Path, rank: int, where: str) -> Any:
    try:
        data = call.with_name(f"{RESULT}{rank}").read_bytes()
    except FileNotFoundError:
        raise LaunchError(
            "D0315",
            f"rank {rank} has ended without a result, by sys.exit or os._exit",
            where=where,
            fix="let the function return",
        ) from None
    return pickle.loads(data)  # noqa: S301 (from our own child)
