"""Intel GPUs. Written from torch's documentation; it has not run on the hardware yet."""

from __future__ import annotations

from typing import ClassVar

import torch

from distrib.devices.base import Copier, DeviceBackend, Memory, check_local_rank
from distrib.devices.copying import StreamCopier


class XpuDevice(DeviceBackend):
    """One GPU per local rank."""

    name: ClassVar[str] = "xpu"
    comm_backend: ClassVar[str | None] = "xccl"

    def available(self) -> tuple[bool, str]:
        if torch.xpu.is_available():
            return True, f"{self.count()} visible"
        return False, f"torch {torch.__version__} is built without XPU, or no Intel GPU is visible"

    def count(self) -> int:
        return torch.xpu.device_count()

    def bind(self, local_rank: int) -> torch.device:
        check_local_rank(self, local_rank)
        torch.xpu.set_device(local_rank)
        return torch.device("xpu", local_rank)

    def supports(self, dtype: torch.dtype) -> tuple[bool, str]:
        if dtype in (torch.float32, torch.float16):
            return True, f"every Intel GPU that torch supports computes in {dtype}"
        if dtype is torch.bfloat16:
            return torch.xpu.is_bf16_supported(including_emulation=False), "torch.xpu.is_bf16_supported"
        if dtype is torch.float64:
            return bool(torch.xpu.get_device_properties().has_fp64), "the device property has_fp64"
        return False, f"{dtype} is no format to train a whole model in"

    def seed(self, seed: int) -> None:
        torch.xpu.manual_seed(seed)

    def rng_state(self) -> torch.Tensor | None:
        return torch.xpu.get_rng_state()

    def set_rng_state(self, state: torch.Tensor) -> None:
        torch.xpu.set_rng_state(state)

    def initialized(self) -> bool:
        return bool(torch.xpu.is_initialized())  # type: ignore[no-untyped-call]

    def synchronize(self) -> None:
        torch.xpu.synchronize()

    def memory(self) -> Memory:
        """Return what torch holds of the bound GPU, its cache included, and the GPU's memory."""
        return Memory(torch.xpu.memory_reserved(), torch.xpu.get_device_properties().total_memory)

    def empty_cache(self) -> None:
        torch.xpu.empty_cache()

    def copier(self, device: torch.device) -> Copier | None:
        return StreamCopier(device)
