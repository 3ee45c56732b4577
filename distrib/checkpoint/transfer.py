"""Bytes of a stored box into a box of a tensor: straight into its memory where both are contiguous."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch

from distrib.checkpoint.plan import Shape, numel, strides
from distrib.state import Box

_STAGING = 16 * 2**20  # bytes read at a time for a tensor that cannot be read into directly
_SPARSE = 256 * 2**10  # bytes; a range below it is read whole, however little of it is wanted


class ReadInto(Protocol):
    """Fills a view of host memory with the file's bytes from offset `at` on."""

    def __call__(self, view: memoryview, at: int) -> None: ...


def relative(box: Box, within: Box) -> Box:
    """Return `box` in coordinates that begin at the start of `within`."""
    return Box(tuple(map(int.__sub__, box.start, within.start)), box.size)


def sub_tensor(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    """Return the view of `tensor` that is `box`."""
    for dim, (start, size) in enumerate(zip(box.start, box.size, strict=True)):
        tensor = tensor.narrow(dim, start, size)
    return tensor


def read_box(
    read: ReadInto,
    offset: int,
    shape: Shape,
    box: Box,
    target: torch.Tensor,
    *,
    staging: int = _STAGING,
    sparse: int = _SPARSE,
) -> None:
    """Copy a box of a stored row-major array into `target`.

    Args:
        read: Reads from the file.
        offset: Byte offset of the array's first element.
        shape: The array's shape.
        box: The wanted part of it, not empty.
        target: A tensor of the box's size and the array's dtype, on any device.
        staging: Bytes to read at a time where `target` cannot be read into directly.
        sparse: The same where less than a quarter of what would be read is wanted.
    """
    steps, itemsize = strides(shape), target.element_size()
    first = sum(map(int.__mul__, box.start, steps))
    span = 1 + sum((n - 1) * step for n, step in zip(box.size, steps, strict=True))
    at = offset + first * itemsize
    dense = span == numel(box.size)
    if dense and target.is_contiguous() and target.device.type == "cpu":
        read(_memory(target), at)
        return
    limit = staging if 4 * numel(box.size) >= span else sparse
    if span == 1 or span * itemsize <= limit:
        buffer = torch.empty(span, dtype=target.dtype)
        read(_memory(buffer), at)
        target.copy_(buffer.as_strided(box.size, steps))
        return
    for half, part in _halves(box, target):
        read_box(read, offset, shape, half, part, staging=staging, sparse=sparse)


def _halves(box: Box, target: torch.Tensor) -> Iterator[tuple[Box, torch.Tensor]]:
    """Cut a box along its first dim that can be cut, so that what is read at a time fits and is wanted."""
    dim = next(i for i, n in enumerate(box.size) if n > 1)
    half = box.size[dim] // 2
    for begin, count in ((0, half), (half, box.size[dim] - half)):
        start = (*box.start[:dim], box.start[dim] + begin, *box.start[dim + 1 :])
        size = (*box.size[:dim], count, *box.size[dim + 1 :])
        yield Box(start, size), target.narrow(dim, begin, count)


def _memory(tensor: torch.Tensor) -> memoryview:
    """Return a contiguous tensor's own memory, never a copy: it is read into."""
    # One element counts as contiguous whatever its stride is, but a view of another dtype wants a stride of 1.
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy().data
