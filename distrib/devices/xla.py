"""TPUs and other devices of PJRT, through torch-xla, which is imported when a run has chosen this device, not before."""

from __future__ import annotations

import contextlib
import importlib
import sys
from importlib import metadata
from importlib.util import find_spec
from typing import ClassVar, Final

import psutil
import torch

from distrib.devices.base import Copier, Memory, check_local_rank
from distrib.devices.xla_runtime import PjrtBackend, XlaCopier, num_chips, pjrt_device, xla_model
from distrib.errors import TopologyError

_UINT64: Final = 2**64


class XlaDevice(PjrtBackend):
    """One device of PJRT per local rank; under SPMD one virtual device that stands for all of them."""

    name: ClassVar[str] = "xla"
    comm_backend: ClassVar[str | None] = "gloo"  # for what is in host memory; collectives/xla.py has the rest

    def available(self) -> tuple[bool, str]:
        if find_spec("torch_xla") is None:
            return False, "torch_xla is not installed"
        kind = pjrt_device(self.env)
        if kind is None:
            return False, "no TPU is attached and PJRT_DEVICE is not set"
        self.check_installation()
        return True, f"PJRT device {kind}"

    def check_installation(self) -> None:
        if find_spec("torch_xla") is None:
            return
        ours, theirs = torch.__version__, metadata.version("torch_xla")
        if _minor(ours) == _minor(theirs):
            return
        made_for = ".".join(_minor(theirs))
        raise TopologyError(
            "D0890",
            f"torch_xla {theirs} is made for torch {made_for}, but torch is {ours}; it cannot be imported with another",
            where="device",
            fix=f"pip install 'torch=={made_for}.*', or set device: cpu",
        )

    def count(self) -> int:
        return num_chips() if pjrt_device(self.env) == "TPU" else 0

    def bind(self, local_rank: int) -> torch.device:
        if self.count():
            check_local_rank(self, local_rank)
        device: torch.device = importlib.import_module("torch_xla").device()
        self.graph.begin()
        return device

    def supports(self, dtype: torch.dtype) -> tuple[bool, str]:
        if dtype in (torch.float32, torch.bfloat16):
            return True, f"XLA computes in {dtype}"
        if dtype is torch.float64:
            on_cpu = pjrt_device(self.env) == "CPU"
            return on_cpu, "XLA's CPU client has float64" if on_cpu else "a TPU has no float64"
        if dtype is torch.float16:
            return (
                False,
                "a TPU's matrix units know bfloat16 and not float16, and torch_xla has no loss scaling",
            )
        return False, f"{dtype} is no format to train a whole model in"

    def seed(self, seed: int) -> None:
        xla_model().set_rng_state(seed % _UINT64)

    def rng_state(self) -> torch.Tensor | None:
        seed = int(xla_model().get_rng_state()) % _UINT64
        return torch.tensor(list(seed.to_bytes(8, "little")), dtype=torch.uint8, device="cpu")

    def set_rng_state(self, state: torch.Tensor) -> None:
        xla_model().set_rng_state(int.from_bytes(bytes(state.tolist()), "little"))

    def initialized(self) -> bool:
        loaded = sys.modules.get("torch_xla")
        return loaded is not None and bool(loaded._XLAC._xla_runtime_is_initialized())

    def synchronize(self) -> None:
        self.graph.cut()
        xla_model().wait_device_ops()

    def memory(self) -> Memory:
        """Return the device's memory; where its client does not tell, as that of the CPU, the process's own."""
        with contextlib.suppress(RuntimeError):
            found = xla_model().get_memory_info(importlib.import_module("torch_xla").device())
            return Memory(int(found["bytes_used"]), int(found["bytes_limit"]))
        return Memory(psutil.Process().memory_info().rss, psutil.virtual_memory().total)

    def empty_cache(self) -> None:
        """Do nothing: PJRT's allocator has no such call."""

    def copier(self, device: torch.device) -> Copier | None:
        return XlaCopier(device, self.lay_out, self.graph)


def _minor(version: str) -> tuple[str, ...]:
    return tuple(version.split(".")[:2])
