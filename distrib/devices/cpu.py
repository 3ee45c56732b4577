"""The CPU: always there, shared by all ranks of a node, talking over gloo."""

from __future__ import annotations

from typing import ClassVar

import psutil
import torch

from distrib.devices.base import DeviceBackend, Memory

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class CpuDevice(DeviceBackend):
    """The CPU. Its generator is torch's default one."""

    name: ClassVar[str] = "cpu"
    comm_backend: ClassVar[str | None] = "gloo"

    def available(self) -> tuple[bool, str]:
        return True, "every machine has a CPU"

    def count(self) -> int:
        return 0

    def bind(self, local_rank: int) -> torch.device:
        return torch.device("cpu")

    def supports(self, dtype: torch.dtype) -> tuple[bool, str]:
        works = dtype in _DTYPES
        return works, f"torch {'computes' if works else 'does not train'} in {dtype} on the CPU"

    def seed(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    def rng_state(self) -> torch.Tensor | None:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor) -> None:
        torch.set_rng_state(state)

    def synchronize(self) -> None:
        """Return at once: work on the CPU is done when the call returns."""

    def memory(self) -> Memory:
        """Return the resident memory, and the machine's memory whatever a container may use of it."""
        return Memory(psutil.Process().memory_info().rss, psutil.virtual_memory().total)

    def empty_cache(self) -> None:
        """Do nothing: torch keeps no cache of CPU memory."""
