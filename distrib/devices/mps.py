"""The GPU of an Apple machine: one device, one rank. It has not run on the hardware yet."""

from __future__ import annotations

from typing import ClassVar

import torch

from distrib.devices.base import Copier, DeviceBackend, Memory, check_local_rank
from distrib.devices.copying import PlainCopier

_FIRST_BF16_MACOS = (14, 0)  # Metal knows bfloat16 from macOS 14 on


class MpsDevice(DeviceBackend):
    """Metal Performance Shaders. torch.distributed cannot talk from it, so more ranks need the CPU."""

    name: ClassVar[str] = "mps"
    comm_backend: ClassVar[str | None] = None

    def available(self) -> tuple[bool, str]:
        if torch.backends.mps.is_available():
            return True, "1 visible"
        if torch.backends.mps.is_built():
            return False, "no Metal GPU is visible (it needs macOS 12.3 and an Apple or AMD GPU)"
        return False, f"torch {torch.__version__} is built without MPS"

    def count(self) -> int:
        return torch.mps.device_count()

    def bind(self, local_rank: int) -> torch.device:
        check_local_rank(self, local_rank)
        return torch.device("mps", local_rank)

    def supports(self, dtype: torch.dtype) -> tuple[bool, str]:
        if dtype in (torch.float32, torch.float16):
            return True, f"MPS computes in {dtype}"
        if dtype is torch.bfloat16:
            return torch.backends.mps.is_macos_or_newer(*_FIRST_BF16_MACOS), "bfloat16 needs macOS 14"
        return False, f"MPS does not compute in {dtype}"

    def seed(self, seed: int) -> None:
        torch.mps.manual_seed(seed)

    def rng_state(self) -> torch.Tensor | None:
        return torch.mps.get_rng_state()

    def set_rng_state(self, state: torch.Tensor) -> None:
        torch.mps.set_rng_state(state)

    def synchronize(self) -> None:
        torch.mps.synchronize()

    def memory(self) -> Memory:
        """Return what the driver has given this process, and what Metal recommends to stay below."""
        return Memory(torch.mps.driver_allocated_memory(), torch.mps.recommended_max_memory())

    def empty_cache(self) -> None:
        torch.mps.empty_cache()

    def copier(self, device: torch.device) -> Copier | None:
        return PlainCopier(device)
