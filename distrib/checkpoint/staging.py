"""Host memory for the copies that a save writes while training goes on."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

_ALIGN = 64  # bytes; what any dtype and a wide copy want


class Arena:
    """One block of host memory, kept from save to save: fresh memory costs more than the copy itself.

    Pinned if something comes from an accelerator, so that the copies overlap.
    """

    def __init__(self) -> None:
        self.release()

    def release(self) -> None:
        """Let the memory go; copies that are still in use keep it until they are not."""
        self._memory = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._pinned = False
        self._kinds: list[tuple[torch.Size, torch.dtype]] = []
        self._places: list[torch.Tensor] = []

    def copies(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return contiguous copies, valid until the next call.

        Args:
            tensors: Of any shape, dtype and device.
        """
        tensors = [x.resolve_conj().resolve_neg() for x in tensors]
        self._make_room([(x.shape, x.dtype) for x in tensors], pinned=any(not x.is_cpu for x in tensors))
        for place, tensor in zip(self._places, tensors, strict=True):
            place.copy_(tensor, non_blocking=True)  # without effect on the CPU
        for device in {x.device for x in tensors if not x.is_cpu}:
            torch.accelerator.synchronize(device)
        return self._places

    def _make_room(self, kinds: list[tuple[torch.Size, torch.dtype]], *, pinned: bool) -> None:
        if kinds == self._kinds and (self._pinned or not pinned):
            return
        sizes = [shape.numel() * dtype.itemsize for shape, dtype in kinds]
        starts = [0, *itertools.accumulate(-(-size // _ALIGN) * _ALIGN for size in sizes)]
        self._kinds, self._places = [], []  # views keep the memory
        if starts[-1] > self._memory.numel() or (pinned and not self._pinned):
            self._memory = torch.empty(0, dtype=torch.uint8, device="cpu")  # give the old block back first
            self._memory = torch.empty(starts[-1], dtype=torch.uint8, device="cpu", pin_memory=pinned)
            self._pinned = pinned
        self._kinds = kinds
        self._places = [
            self._memory[start : start + size].view(dtype).view(shape)
            for start, size, (shape, dtype) in zip(starts, sizes, kinds, strict=False)
        ]
