"""What runs inside one rank of `run_ranks`."""

from __future__ import annotations

import faulthandler
import importlib
import importlib.util
import inspect
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class FunctionAddress:
    """Where a function can be found again: its module's name and file, and its qualified name."""

    module: str
    file: str
    name: str


@dataclass(frozen=True)
class Failure:
    """Why a rank has no result. `consequence`: it only followed a peer that was lost; `at`: seconds since 1970."""

    text: str
    consequence: bool
    at: float


def address_of(fn: Callable[..., Any]) -> FunctionAddress:
    """Return where the ranks find `fn`.

    Raises:
        ValueError: for a lambda or a nested function.
    """
    if "<" in fn.__qualname__:
        raise ValueError(
            f"{fn.__qualname__} cannot be imported by the ranks; expected a function at module level"
        )
    code = inspect.unwrap(fn).__code__
    return FunctionAddress(fn.__module__, str(Path(code.co_filename).resolve()), fn.__qualname__)


def _end_with_caller() -> None:
    """Wait until the process that called `run_ranks` is gone, and end with all that was started here: nobody else will."""
    caller = multiprocessing.parent_process()
    assert caller is not None, "a rank has been started by its caller"
    wait([caller.sentinel])
    os.killpg(0, signal.SIGKILL)


def rank_main(
    env: Mapping[str, str], start_method: str, stacks: str, results: Connection, function: FunctionAddress,
    args: Sequence[Any], kwargs: Mapping[str, Any],
) -> None:  # fmt: skip
    """Run the function and send (True, result) or (False, Failure)."""
    os.setpgid(0, 0)  # what the function starts, such as data workers, is ended with it
    threading.Thread(target=_end_with_caller, daemon=True).start()
    multiprocessing.set_start_method(
        start_method, force=True
    )  # a child of the fork server would have its own
    os.environ.update(env)  # noqa: TID251 (this is the edge: the process is the rank)
    with Path(stacks).open("w") as dump:
        faulthandler.register(signal.SIGUSR1, file=dump, all_threads=True)
        try:
            _fresh_generators()
            value = _find(function)(*args, **kwargs)
            results.send_bytes(
                pickle.dumps((True, value))
            )  # not send(): tensors would need this process alive
        except BaseException as error:  # noqa: BLE001 (this is the supervisor's end in the rank)
            results.send_bytes(pickle.dumps((False, _failure(error))))
        faulthandler.unregister(signal.SIGUSR1)
    _leave_group()


def _fresh_generators() -> None:
    """Seed anew what the fork server's children would otherwise share."""
    import random  # noqa: PLC0415

    import numpy as np  # noqa: PLC0415
    import torch  # noqa: PLC0415

    random.seed()
    np.random.seed()
    torch.seed()


def _find(function: FunctionAddress) -> Callable[..., Any]:
    found: Any = _module(function)
    for part in function.name.split("."):
        found = getattr(found, part)
    wrapped: Callable[..., Any] = getattr(found, "in_rank", found)
    return wrapped


def _module(function: FunctionAddress) -> Any:
    if function.module in sys.modules:
        return sys.modules[function.module]
    spec = importlib.util.spec_from_file_location(function.module, function.file)
    if spec is None or spec.loader is None:
        return importlib.import_module(function.module)
    module = importlib.util.module_from_spec(spec)
    sys.modules[function.module] = module
    sys.path.insert(0, str(Path(function.file).parent))
    spec.loader.exec_module(module)
    return module


def _failure(error: BaseException) -> Failure:
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename == __file__:
        frames = frames.tb_next
    text = "".join(traceback.format_exception(type(error), error, frames))
    return Failure(text, _is_consequence(error), time.time())


def _is_consequence(error: BaseException) -> bool:
    """Whether the rank only noticed that a peer was gone."""
    from distrib.errors import CollectiveError  # noqa: PLC0415

    if isinstance(error, CollectiveError):
        return error.code == "D0402"
    return isinstance(error, RuntimeError) and "Connection" in str(error)


def _leave_group() -> None:
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
