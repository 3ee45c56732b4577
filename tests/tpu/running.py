"""Functions in fresh processes with XLA's CPU client: how many devices a process sees is settled when it begins."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

from distrib.testing import run_ranks

ONE = {"strategy": "xla"}
SPMD = {"strategy": "xla", "xla": {"spmd": True}}
SHARDED = {**SPMD, "mesh": {"replicate": 1, "shard": -1}}
MIXED = {**SPMD, "mesh": {"replicate": 2, "shard": 2}}
_COMPILE_QUICKLY = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
LAYOUTS = {"one device": (ONE, 1), "4 devices": (SPMD, 4), "4 shards": (SHARDED, 4), "2 x 2": (MIXED, 4)}


def on_xla(
    function: Callable[..., Any],
    *args: Any,
    ranks: int = 1,
    devices: int = 1,
    timeout_s: float = 100,
    **more: Any,
) -> list[Any]:
    """Call a function of a test's module in `ranks` processes that see `devices` devices each; return its results."""
    return run_ranks(
        _in_rank, ranks, function.__module__, _file_of(function), function.__name__, devices, args, more,
        timeout_s=timeout_s,
    )  # fmt: skip


def _in_rank(module, file, name, devices, args, more):
    from distrib.testing.rank import FunctionAddress, _find

    settings = {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": str(devices), "XLA_FLAGS": _COMPILE_QUICKLY}
    os.environ.update(settings, TF_CPP_MIN_LOG_LEVEL="2")
    return _find(FunctionAddress(module, file, name))(*args, **more)


def _file_of(function: Callable[..., Any]) -> str:
    return function.__code__.co_filename


@contextmanager
def graphs():
    """Count what is compiled and run inside: yields a dict that has `compiled` and `runs` afterwards."""
    import torch_xla.core.xla_model as xm

    found: dict[str, int] = {}
    xm.wait_device_ops()
    before = _counts()
    yield found
    xm.wait_device_ops()
    found.update({key: value - before[key] for key, value in _counts().items()})


def _counts() -> dict[str, int]:
    import torch_xla.debug.metrics as metrics

    def samples(name: str) -> int:
        data = metrics.metric_data(name)
        return data[0] if data else 0

    return {
        "compiled": samples("CompileTime"),
        "runs": samples("ExecuteTime") + samples("ExecuteReplicatedTime"),
    }
