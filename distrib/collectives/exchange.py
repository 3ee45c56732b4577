"""The exchange on the CPU with which every checked operation begins.

Each rank gives one frame of fixed size: a hash of what it is about to do, and a note. All frames have the same size
whatever the operation, so that ranks which do different things still meet here and can tell. A note that fits travels
in the frame itself; a longer one costs one more operation, of the longest note's size.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

_HEADER = struct.Struct("<qqqq")  # key, flags, extra, bytes of the note
_FRAME_BYTES = 2048  # costs as much as 8 bytes over loopback or Ethernet
ROOM = _FRAME_BYTES - _HEADER.size  # bytes of a note that travels in the frame
EMPTY = torch.empty(0, dtype=torch.uint8, device="cpu")

# torch 2.13 has renamed it, and the old name warns there
all_gather_single: Callable[[torch.Tensor, torch.Tensor, dist.ProcessGroup | None], object] = (
    getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
)


@dataclass(frozen=True)
class Heard:
    """What the ranks have given, in rank order.

    Attributes:
        keys: Hash of each rank's operation.
        flags: Its flags.
        extras: Its extra number.
        notes: Its note, (n,) uint8; a view that is valid until the next exchange.
    """

    keys: list[int]
    flags: list[int]
    extras: list[int]
    notes: list[torch.Tensor]


class Exchange:
    """Frames in buffers that are used again.

    Args:
        world_size: Number of ranks.
        group: A process group for tensors on the CPU; None for torch's default group.
    """

    def __init__(self, world_size: int, group: dist.ProcessGroup | None = None) -> None:
        self._world_size, self._group = world_size, group
        self._mine = torch.zeros(_FRAME_BYTES, dtype=torch.uint8, device="cpu")
        self._everyone = torch.zeros(world_size, _FRAME_BYTES, dtype=torch.uint8, device="cpu")
        self._write = self._mine.numpy().data
        self._read = self._everyone.view(-1).numpy().data

    def __call__(self, key: int, note: torch.Tensor = EMPTY, *, flags: int = 0, extra: int = 0) -> Heard:
        """Give this rank's key and note, and return everybody's. Collective.

        Args:
            key: Signed 64-bit hash of the operation.
            note: (n,) uint8 on the CPU, of any n, which may differ between ranks.
            flags: A small number.
            extra: Another number of up to 63 bits.

        Returns:
            Everybody's; where keys differ, only `keys` mean something.
        """
        size = note.numel()
        _HEADER.pack_into(self._write, 0, key, flags, extra, size)
        if 0 < size <= ROOM:
            self._mine[_HEADER.size : _HEADER.size + size] = note
        all_gather_single(self._everyone.view(-1), self._mine, self._group)
        heads = [_HEADER.unpack_from(self._read, r * _FRAME_BYTES) for r in range(self._world_size)]
        keys, flag_list, extras, sizes = (list(column) for column in zip(*heads, strict=True))
        if keys.count(key) < len(keys) or not any(
            sizes
        ):  # what the notes of different operations mean is not known
            return Heard(keys, flag_list, extras, [EMPTY] * len(keys))
        longest = max(sizes)
        rows = self._long(note, _aligned(longest)) if longest > ROOM else self._everyone[:, _HEADER.size :]
        return Heard(keys, flag_list, extras, [row[:n] for row, n in zip(rows, sizes, strict=True)])

    def _long(self, note: torch.Tensor, width: int) -> torch.Tensor:
        """Exchange notes of up to `width` bytes."""
        mine = note
        if note.numel() < width:
            mine = torch.empty(width, dtype=torch.uint8, device="cpu")
            mine[: note.numel()] = note
        everyone = torch.empty(self._world_size, width, dtype=torch.uint8, device="cpu")
        all_gather_single(everyone.view(-1), mine, self._group)
        return everyone


def _aligned(size: int) -> int:
    """Round up, so that each rank's row begins where any dtype may begin."""
    return -(-size // 16) * 16
