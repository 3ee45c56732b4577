"""Tensors as bytes in one buffer, and back.

Leaves lie one after the other, those with wide elements first, so that each begins at a multiple of its own element
size as long as the buffer does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch


def flat_bytes(x: torch.Tensor) -> torch.Tensor:
    """Return the elements of any tensor in row-major order as (n,) uint8; shares memory where that is possible."""
    flat = x.detach().resolve_conj().resolve_neg().reshape(-1).contiguous()
    if flat.stride(0) != 1:  # one element of something larger counts as contiguous
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8)


def num_bytes(leaves: Iterable[torch.Tensor]) -> int:
    """Return the size of what `pack` makes."""
    return sum(x.numel() * x.element_size() for x in leaves)


def pack(
    leaves: Sequence[torch.Tensor],
    device: torch.device,
    *,
    width: int = 0,
    lead: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return one (n,) uint8 tensor on `device` with the bytes of all leaves.

    Args:
        leaves: Any tensors.
        device: Where to.
        width: At least this many bytes; what is behind the leaves is zero.
        lead: (m,) uint8 on `device` that stands before them.
    """
    parts = [flat_bytes(leaves[i]).to(device) for i in _order(leaves)]
    parts = parts if lead is None else [lead, *parts]
    missing = width - sum(part.numel() for part in parts)
    if missing > 0 or not parts:
        parts.append(torch.zeros(max(missing, 0), dtype=torch.uint8, device=device))
    return torch.cat(parts)


def unpack(buffer: torch.Tensor, leaves: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Take tensors of the shapes and dtypes of `leaves` out of what `pack` made, as views, on their own devices."""
    starts = _starts(leaves, [x.numel() for x in leaves])
    return [
        buffer[start : start + x.numel() * x.element_size()].view(x.dtype).view(x.shape).to(x.device)
        for x, start in zip(leaves, starts, strict=True)
    ]


def unpack_rows(
    buffers: Sequence[torch.Tensor], leaves: Sequence[torch.Tensor], rows: Sequence[Sequence[int]]
) -> list[torch.Tensor]:
    """Concatenate along dim 0 what several ranks packed; the results have memory of their own.

    Args:
        buffers: What each rank packed.
        leaves: This rank's leaves (n, *s): dtypes, s and devices of the results.
        rows: rows[r][i] is n of leaf i on rank r.
    """
    row_items = [math.prod(x.shape[1:]) for x in leaves]
    items = [[n * each for n, each in zip(of_rank, row_items, strict=True)] for of_rank in rows]
    starts = [_starts(leaves, of_rank) for of_rank in items]
    found = []
    for i, x in enumerate(leaves):
        size = x.element_size()
        parts = [
            buffer[start[i] : start[i] + count[i] * size]
            for buffer, start, count in zip(buffers, starts, items, strict=True)
        ]
        total = sum(of_rank[i] for of_rank in rows)
        found.append(torch.cat(parts).view(x.dtype).view(total, *x.shape[1:]).to(x.device))
    return found


def _order(leaves: Sequence[torch.Tensor]) -> list[int]:
    return sorted(range(len(leaves)), key=lambda i: -leaves[i].element_size())


def _starts(leaves: Sequence[torch.Tensor], items: Sequence[int]) -> list[int]:
    """Return where each leaf begins if leaf i has items[i] elements."""
    starts, at = [0] * len(leaves), 0
    for i in _order(leaves):
        starts[i] = at
        at += items[i] * leaves[i].element_size()
    return starts
