"""Host memory for the copies that a save writes while training goes on."""

from __future__ import annotations

from collections.abc import Sequence

import torch

_ALIGN = 64  # bytes; what any dtype and a wide copy want


class Arena:
    """One block of host memory, kept from save to save: fresh memory costs more than the copy itself.

    Pinned if something comes from an accelerator, so that the copies overlap.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._pinned = False

    def copies(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return contiguous copies, valid until the next call.

        Args:
            tensors: Of any shape, dtype and device.
        """
        tensors = [x.resolve_conj().resolve_neg() for x in tensors]
        starts, end = [], 0
        for tensor in tensors:
            starts.append(end)
            end += -(-tensor.numel() * tensor.element_size() // _ALIGN) * _ALIGN
        self._make_room(end, pinned=any(not x.is_cpu for x in tensors))
        copied = [self._copy(x, start) for x, start in zip(tensors, starts, strict=True)]
        for device in {x.device for x in tensors if not x.is_cpu}:
            torch.accelerator.synchronize(device)
        return copied

    def _copy(self, tensor: torch.Tensor, start: int) -> torch.Tensor:
        size = tensor.numel() * tensor.element_size()
        place = self._memory[start : start + size].view(tensor.dtype).view(tensor.shape)
        return place.copy_(tensor, non_blocking=not tensor.is_cpu)

    def _make_room(self, size: int, *, pinned: bool) -> None:
        if size <= self._memory.numel() and (self._pinned or not pinned):
            return
        self._memory = torch.empty(0, dtype=torch.uint8, device="cpu")  # give the old block back first
        self._memory = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=pinned)
        self._pinned = pinned
