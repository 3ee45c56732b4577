"""NVIDIA GPUs through CUDA, and AMD GPUs through ROCm, which torch shows under the same name."""

from __future__ import annotations

from typing import ClassVar

import torch

from distrib.devices.base import Copier, DeviceBackend, Memory, check_local_rank
from distrib.devices.copying import StreamCopier

_FIRST_BF16_CAPABILITY = (8, 0)  # Ampere; older GPUs only emulate it, slowly
_FIRST_FP8_CAPABILITY = (8, 9)  # Ada and Hopper


class CudaDevice(DeviceBackend):
    """One GPU per local rank."""

    name: ClassVar[str] = "cuda"
    comm_backend: ClassVar[str | None] = "nccl"
    has_ring_attention: ClassVar[bool] = True

    def available(self) -> tuple[bool, str]:
        if not (torch.version.cuda or torch.version.hip):
            return False, f"torch {torch.__version__} is built without CUDA"
        if self.count() == 0:
            return False, "no GPU is visible (driver missing, or CUDA_VISIBLE_DEVICES is empty)"
        if not torch.cuda.is_available():
            return False, f"the GPU driver does not work with torch {torch.__version__}"
        return True, f"{self.count()} visible"

    def count(self) -> int:
        return torch.cuda.device_count()

    def bind(self, local_rank: int) -> torch.device:
        check_local_rank(self, local_rank)
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)

    def supports(self, dtype: torch.dtype) -> tuple[bool, str]:
        if dtype in (torch.float64, torch.float32, torch.float16):
            return True, f"every GPU computes in {dtype}"
        if dtype not in (torch.bfloat16, torch.float8_e4m3fn):
            return False, f"{dtype} is no format to train a whole model in"
        name = str(dtype).removeprefix("torch.")
        if torch.version.hip:
            return (
                dtype is torch.bfloat16,
                f"ROCm {'computes' if dtype is torch.bfloat16 else 'was not tried'} in {name}",
            )
        first = _FIRST_BF16_CAPABILITY if dtype is torch.bfloat16 else _FIRST_FP8_CAPABILITY
        found = torch.cuda.get_device_capability()
        return (
            found >= first,
            f"compute capability {found[0]}.{found[1]}, and {name} needs {first[0]}.{first[1]}",
        )

    def seed(self, seed: int) -> None:
        torch.cuda.manual_seed(seed)

    def rng_state(self) -> torch.Tensor | None:
        return torch.cuda.get_rng_state()

    def set_rng_state(self, state: torch.Tensor) -> None:
        torch.cuda.set_rng_state(state)

    def initialized(self) -> bool:
        return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def memory(self) -> Memory:
        """Return what torch holds of the bound GPU, its cache included, and the GPU's memory."""
        return Memory(torch.cuda.memory_reserved(), torch.cuda.mem_get_info()[1])

    def empty_cache(self) -> None:
        torch.cuda.empty_cache()

    def copier(self, device: torch.device) -> Copier | None:
        return StreamCopier(device)
