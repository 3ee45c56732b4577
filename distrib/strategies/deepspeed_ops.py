"""DeepSpeed's import, its place in the process group, and the C++ operations that it compiles when they are first used.

DeepSpeed takes its surroundings from the process's environment and from nowhere else, so it is written here.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import hashlib
import importlib
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import psutil
import torch
import torch.distributed as dist

from distrib.errors import StrategyError
from distrib.logging import notice
from distrib.state import Runtime

_REPORT_S: Final = 30.0
_REASON: Final = re.compile(r"\b(fatal )?error: |: cannot find |undefined (symbol|reference)|No space left")
_SHORT: Final = 300
_RENAMED: Final = r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated"
_KNOWN: Final = (
    "untested optimizer",
    "torch.autocast is enabled outside DeepSpeed",
    "Offloading to NVMe can generate heavy write traffic",
)
_GUARDED: Final = "_distrib_guarded"
BUILD_AHEAD: Final = {"cpu": ("CPUAdamBuilder",), "cuda": ("CPUAdamBuilder", "FusedAdamBuilder")}


def load_deepspeed(env: MutableMapping[str, str], device_type: str, local_rank: int = 0) -> Any:
    """Import DeepSpeed for one kind of device and return it.

    Args:
        env: The process's environment, from which DeepSpeed and torch's builds take where they are.
        device_type: torch's name of the run's device: "cpu", "cuda".
        local_rank: This rank's number on its node.

    Raises:
        StrategyError: D0870 if it is not installed; D0955 if its import fails; D0871 if it has settled on another kind of
            device already.
    """
    if find_spec("deepspeed") is None:
        raise StrategyError(
            "D0870",
            "strategy deepspeed needs the package deepspeed, which is not installed",
            fix="pip install 'distrib[deepspeed]', or choose strategy: fsdp, which needs no other package",
        )
    env.setdefault("DS_ACCELERATOR", device_type)
    env.setdefault("LOCAL_RANK", str(local_rank))
    env.setdefault("TORCH_EXTENSIONS_DIR", str(extensions_folder(env)))
    _find_ninja(env)
    deepspeed = _imported()
    found = importlib.import_module("deepspeed.accelerator").get_accelerator().device_name()
    if found != device_type:
        raise StrategyError(
            "D0871",
            f"DeepSpeed works on {found} in this process, but the run's device is {device_type}",
            where="DS_ACCELERATOR",
            fix=f"unset DS_ACCELERATOR, or set it to {device_type}, before anything imports deepspeed",
        )
    _guard_builds(env)
    # DeepSpeed 0.19 calls by their old names what torch 2.13 has renamed, several times in each step
    warnings.filterwarnings("ignore", _RENAMED, FutureWarning)
    log = importlib.import_module("deepspeed.utils").logger
    if _is_worth_telling not in log.filters:
        log.addFilter(_is_worth_telling)
    return deepspeed


def _imported() -> Any:
    try:
        return importlib.import_module("deepspeed")
    except (AttributeError, ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise StrategyError(
            "D0955",
            f"DeepSpeed cannot be imported: {type(error).__name__}: {error}",
            fix="correct what it names; or install the version that is tested, pip install 'distrib[deepspeed]'",
        ) from error


def has_float16() -> bool:
    """Whether DeepSpeed keeps parameters in float16 on this device, as not on every processor."""
    accelerator = importlib.import_module("deepspeed.accelerator").get_accelerator()
    return bool(accelerator.is_fp16_supported())


def _is_worth_telling(record: logging.LogRecord) -> bool:
    """Drop what DeepSpeed warns of for choices that were made here on purpose, at every start on every rank."""
    return not any(text in str(record.msg) for text in _KNOWN)


def join_process_group(deepspeed: Any, runtime: Runtime) -> None:
    """Let DeepSpeed talk over the run's process group; a world of one rank gets a group of its own."""
    if not dist.is_initialized():
        backend = runtime.device_backend.comm_backend or "gloo"
        dist.init_process_group(backend, store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
        atexit.register(_leave_process_group)
    adopt_process_group(deepspeed)


def adopt_process_group(deepspeed: Any) -> None:
    """Let DeepSpeed talk over torch's default process group, once.

    Its shared-memory collectives, which only inference uses, are not compiled for it.
    """
    comm, ops = importlib.import_module("deepspeed.comm.comm"), importlib.import_module("deepspeed.ops")
    if comm.cdb is not None:
        return
    before = vars(ops).get("__compatible_ops__")
    vars(ops)["__compatible_ops__"] = {}  # what it knows to be compatible; made when it is first asked for
    try:
        deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    finally:
        del vars(ops)["__compatible_ops__"]
        if before is not None:
            vars(ops)["__compatible_ops__"] = before


def _leave_process_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def extensions_folder(env: Mapping[str, str]) -> Path:
    """Return where compiled operations are kept: a folder of the user for these packages and this processor."""
    cache = Path(env.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    key = f"{python}-torch{torch.__version__}-deepspeed{version('deepspeed')}-{_origin()}"
    return cache / "distrib" / "deepspeed" / key


def _origin() -> str:
    """Return a name for what `-march=native` compiles for, and for where the headers lie: others are compiled anew."""
    text = platform.machine() + str(Path(torch.__file__).parent) + sysconfig.get_path("purelib")
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        text += "".join(sorted({x for x in lines if x.startswith(("model name", "flags", "Features"))}))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _find_ninja(env: MutableMapping[str, str]) -> None:
    """Put the folder of this Python's programs, where pip installs ninja, at the end of PATH if it is missing there."""
    scripts = sysconfig.get_path("scripts")
    path = env.get("PATH", os.defpath)
    if shutil.which("ninja", path=path) is None and shutil.which("ninja", path=scripts) is not None:
        env["PATH"] = f"{path}{os.pathsep}{scripts}"


def _guard_builds(env: Mapping[str, str]) -> None:
    """Let every compilation in this process go through `building`, whoever asks for it."""
    builder = importlib.import_module("deepspeed.ops.op_builder.builder").OpBuilder
    plain = builder.jit_load
    if hasattr(plain, _GUARDED):
        return

    @functools.wraps(plain)
    def jit_load(self: Any, *_: Any, **__: Any) -> Any:
        folder = Path(env["TORCH_EXTENSIONS_DIR"])
        with building(self.name, folder), telling_why(self.name, folder):
            return plain(self, verbose=False)

    setattr(jit_load, _GUARDED, True)
    builder.jit_load = jit_load


@contextmanager
def building(name: str, root: Path, say: Callable[[str], None] = notice) -> Iterator[None]:
    """Hold the right to compile an operation, and say how long it takes; other processes of this node wait for it.

    The right ends with the process that has it. A lock that torch's build left behind, because its process was killed, is
    removed: processes would wait for it for ever.

    Args:
        name: Of the operation, "cpu_adam"; what is compiled lies in the folder of that name.
        root: TORCH_EXTENSIONS_DIR.
        say: Tells the user.

    Raises:
        StrategyError: D0872, if it is not compiled yet and there is no compiler or no ninja.
    """
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    with (root / f"{name}.building").open("a") as right:
        with _reporting(lambda s: say(f"deepspeed: waited {s:.0f} s for another process to compile {name}")):
            fcntl.flock(right, fcntl.LOCK_EX)
        break_dead_lock(folder, say)
        if any(folder.glob("*.so")):
            yield
            return
        _check_tools(name)
        say(f"deepspeed: compiling {name} into {folder}, once; this takes a minute or so")
        start = time.monotonic()
        with _reporting(lambda s: say(f"deepspeed: still compiling {name}, {s:.0f} s so far")):
            yield
        say(f"deepspeed: compiled {name} in {time.monotonic() - start:.0f} s")


@contextmanager
def telling_why(name: str, root: Path) -> Iterator[None]:
    """Say which line of a compiler's output tells why a build has failed, of the hundreds that torch raises.

    Raises:
        StrategyError: D0954.
    """
    try:
        yield
    except (ImportError, OSError, RuntimeError, subprocess.CalledProcessError) as error:
        lines = [x.strip() for x in str(error).splitlines() if x.strip()] or [type(error).__name__]
        reason = next((x for x in lines if _REASON.search(x)), lines[-1])
        raise StrategyError(
            "D0954",
            f"DeepSpeed's operation {name} cannot be compiled: {reason[:_SHORT]}",
            where=f"{root / name}",
            fix="install what is missing there, or set CXX to another compiler; or use torch's own optimizers, for which "
            "nothing is compiled",
        ) from error


def break_dead_lock(folder: Path, say: Callable[[str], None] = notice) -> bool:
    """Remove the lock of torch's build in `folder` if no process has it open; say whether it did."""
    lock = folder / "lock"
    if not lock.exists() or _is_open(lock):
        return False
    lock.unlink(missing_ok=True)
    say(f"deepspeed: removed {lock}, whose process has died")
    return True


def _is_open(path: Path) -> bool:
    """Whether any process that we may look into has this file open, as torch's build has its lock."""
    wanted = str(path.resolve())
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(file.path == wanted for file in process.open_files()):
                return True
    return False


@contextmanager
def _reporting(report: Callable[[float], None]) -> Iterator[None]:
    """Call `report` with the seconds so far, again and again while the body runs."""
    done, start = threading.Event(), time.monotonic()

    def run() -> None:
        while not done.wait(_REPORT_S):
            report(time.monotonic() - start)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _check_tools(name: str) -> None:
    cpp_extension = importlib.import_module("torch.utils.cpp_extension")
    compiler = cpp_extension.get_cxx_compiler()
    missing = [x for x in (compiler, "ninja") if shutil.which(x) is None]
    if missing:
        raise StrategyError(
            "D0872",
            f"DeepSpeed has to compile its operation {name}, but {' and '.join(missing)} cannot be found",
            where="PATH",
            fix="install g++ and `pip install ninja`; or use torch's own optimizers, for which nothing is compiled",
        )


def build_ops(env: MutableMapping[str, str], device_type: str, builders: tuple[str, ...]) -> None:
    """Compile operations ahead of a run; what is compiled already is only loaded.

    Args:
        env: The process's environment.
        device_type: "cpu" or "cuda".
        builders: Names of DeepSpeed's builders; empty for the optimizers that it has for such a device.

    Raises:
        StrategyError: D0872, without a compiler; D0873, if DeepSpeed has no such operation.
    """
    load_deepspeed(env, device_type)
    accelerator = importlib.import_module("deepspeed.accelerator").get_accelerator()
    for name in builders or BUILD_AHEAD[device_type]:
        builder = accelerator.create_op_builder(name)
        if builder is None or builder.NAME == "deepspeed_not_implemented":
            raise StrategyError(
                "D0873",
                f"DeepSpeed has no operation builder {name!r} for {device_type}",
                fix=f"name builders such as {', '.join(BUILD_AHEAD[device_type])}",
            )
        builder.load()
