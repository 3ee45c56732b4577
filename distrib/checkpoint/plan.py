"""Which rank writes what, and which stored bytes a rank needs: geometry without files or communication.

A slice is a box of a tensor, or an interval of the tensor flattened in row-major order. An interval is the
concatenation of at most 2 x dims - 1 boxes, so that all overlaps are overlaps of boxes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from distrib.errors import CheckpointError
from distrib.state import Box, Interval

Where = Box | Interval
Shape = tuple[int, ...]


class Piece(NamedTuple):
    """A box whose elements lie one after the other, row-major, from element `offset` of a slice on."""

    box: Box
    offset: int


class Overlap(NamedTuple):
    """A box of the tensor that lies in piece `source` of one slice and in piece `target` of another."""

    source: Piece
    target: Piece
    box: Box


class Held(NamedTuple):
    """One slice as a rank announces it; `dtype` is a code of `distrib.checkpoint.format.DTYPES`."""

    name: str
    shape: Shape
    dtype: str
    where: Where


@dataclass(frozen=True)
class Share:
    """The slices that each of `ranks` holds."""

    ranks: tuple[int, ...]
    held: tuple[Held, ...]


@dataclass(frozen=True)
class WritePlan:
    """Slices to write by rank; together they are every tensor exactly once."""

    owned: tuple[tuple[Held, ...], ...]


def numel(shape: Shape) -> int:
    """Return how many elements a tensor of `shape` has; 1 for a 0-d tensor."""
    return math.prod(shape)


def strides(shape: Shape) -> Shape:
    """Return the row-major strides of `shape`, in elements."""
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def size_of(where: Where) -> int:
    """Return how many elements a slice has."""
    return where.stop - where.start if isinstance(where, Interval) else numel(where.size)


def whole_box(shape: Shape) -> Box:
    """Return the box that is the whole tensor."""
    return Box((0,) * len(shape), shape)


def pieces(where: Where, shape: Shape) -> tuple[Piece, ...]:
    """Cut a slice into boxes that are each contiguous in it."""
    if isinstance(where, Box):
        return (Piece(where, 0),) if numel(where.size) else ()
    found, offset = [], 0
    for start, size in _boxes(where.start, where.stop, shape):
        found.append(Piece(Box(start, size), offset))
        offset += numel(size)
    return tuple(found)


def _boxes(start: int, stop: int, shape: Shape) -> Iterator[tuple[Shape, Shape]]:
    """Yield (start, size) of the boxes whose concatenation is [start, stop) of a flattened tensor."""
    if start >= stop:
        return
    if not shape:
        yield (), ()
        return
    row = numel(shape[1:])
    (first, head), (last, tail) = divmod(start, row), divmod(stop, row)
    if first == last:
        yield from _in_row(first, _boxes(head, tail, shape[1:]))
        return
    if head:
        yield from _in_row(first, _boxes(head, row, shape[1:]))
        first += 1
    if first < last:
        yield (first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:])
    if tail:
        yield from _in_row(last, _boxes(0, tail, shape[1:]))


def _in_row(index: int, boxes: Iterable[tuple[Shape, Shape]]) -> Iterator[tuple[Shape, Shape]]:
    for start, size in boxes:
        yield (index, *start), (1, *size)


def canonical(where: Where, shape: Shape) -> Where:
    """Return the box that an interval is, if it is one: equal regions then compare equal and keep their shape."""
    if isinstance(where, Interval):
        if where.start == 0 and where.stop == numel(shape):
            return whole_box(shape)
        parts = pieces(where, shape)
        return parts[0].box if len(parts) == 1 else where
    return where


def fits(where: Where, shape: Shape) -> bool:
    """Whether a slice lies within a tensor of `shape`."""
    if isinstance(where, Interval):
        return 0 <= where.start <= where.stop <= numel(shape)
    return len(where.start) == len(where.size) == len(shape) and all(
        start >= 0 and size >= 0 and start + size <= dim
        for start, size, dim in zip(where.start, where.size, shape, strict=True)
    )


def intersect(a: Box, b: Box) -> Box | None:
    """Return the common part of two boxes, or None."""
    start = tuple(map(max, a.start, b.start))
    stop = tuple(min(p + n, q + m) for p, n, q, m in zip(a.start, a.size, b.start, b.size, strict=True))
    size = tuple(map(int.__sub__, stop, start))
    return Box(start, size) if all(n > 0 for n in size) else None


def overlaps(source: Where, target: Where, shape: Shape) -> Iterator[Overlap]:
    """Yield the boxes that two slices of one tensor have in common; together they are all of it, each once."""
    wanted = pieces(target, shape)
    for have in pieces(source, shape):
        for want in wanted:
            box = intersect(have.box, want.box)
            if box is not None:
                yield Overlap(have, want, box)


def coverage_problem(shape: Shape, slices: Sequence[Where]) -> str | None:
    """Say how `slices` fail to be every element of a tensor exactly once; None if they do not fail."""
    outside = next((where for where in slices if not fits(where, shape)), None)
    if outside is not None:
        return f"{describe(outside)} does not lie within shape {shape}"
    found, expected = sum(map(size_of, slices)), numel(shape)
    twice = _first_overlap(shape, slices) if len(slices) > 1 else None
    if twice is not None:
        return f"{describe(twice[0])} and {describe(twice[1])} overlap"
    return None if found == expected else f"{found} of {expected} elements are held"


def _first_overlap(shape: Shape, slices: Sequence[Where]) -> tuple[Where, Where] | None:
    """Find two overlapping slices by a sweep over their flat extents, so that row shards cost no pair tests."""
    extents = sorted((_extent(where, shape), index) for index, where in enumerate(slices) if size_of(where))
    active: list[tuple[int, int]] = []
    for (low, high), index in extents:
        active = [(stop, other) for stop, other in active if stop > low]
        for _, other in active:
            if next(overlaps(slices[other], slices[index], shape), None):
                return slices[other], slices[index]
        active.append((high, index))
    return None


def _extent(where: Where, shape: Shape) -> tuple[int, int]:
    """Return the flat index of the first element of a non-empty slice, and that after the last."""
    if isinstance(where, Interval):
        return where.start, where.stop
    steps = strides(shape)
    first = sum(map(int.__mul__, where.start, steps))
    return first, first + sum((n - 1) * step for n, step in zip(where.size, steps, strict=True)) + 1


def describe(where: Where) -> str:
    """Return a slice as text: "[0:4, 0:8]", or "[12:20] of the flattened tensor"."""
    if isinstance(where, Interval):
        return f"[{where.start}:{where.stop}] of the flattened tensor"
    return f"[{', '.join(f'{a}:{a + n}' for a, n in zip(where.start, where.size, strict=True))}]"


def plan_writes(shares: Sequence[Share], itemsize: Mapping[str, int]) -> WritePlan:
    """Divide the slices of all ranks: each region once, by a rank that holds it, bytes balanced.

    Largest first to the least loaded holder (Graham 1969, LPT: at most 4/3 of the best balance where all ranks
    hold everything). A whole tensor is never cut, so that replicated models stay readable as they are.

    Args:
        shares: What the ranks hold; every rank is in exactly one.
        itemsize: dtype code -> bytes per element.

    Raises:
        CheckpointError: if ranks disagree on shape or dtype, or the slices are not each tensor exactly once.
    """
    load = [0] * sum(len(share.ranks) for share in shares)
    owned: list[list[Held]] = [[] for _ in load]
    shared: list[tuple[int, Held, list[int]]] = []  # bytes, slice, its holders
    for item, found in holders_of(shares).items():
        ranks = [rank for i in found for rank in shares[i].ranks]
        num_bytes = size_of(item.where) * itemsize[item.dtype]
        if len(ranks) > 1:
            shared.append((num_bytes, item, ranks))
        else:  # no choice: such slices go first, so that the others even out what they leave
            load[ranks[0]] += num_bytes
            owned[ranks[0]].append(item)
    shared.sort(key=lambda entry: -entry[0])
    for num_bytes, item, ranks in shared:
        rank = min(ranks, key=lambda r: (load[r], r))
        load[rank] += num_bytes
        owned[rank].append(item)
    return WritePlan(tuple(map(tuple, owned)))


def holders_of(shares: Sequence[Share]) -> dict[Held, list[int]]:
    """Map each distinct region to the indices of the shares that have it; empty slices only stand for empty tensors.

    Raises:
        CheckpointError: if ranks disagree on shape or dtype, or the regions are not each tensor exactly once.
    """
    holders: dict[Held, list[int]] = {}
    for index, share in enumerate(shares):
        for item in dict.fromkeys(map(_canonical_held, share.held)):
            if size_of(item.where) or not numel(item.shape):
                holders.setdefault(item, []).append(index)
    _check_tensors(dict.fromkeys(item.name for share in shares for item in share.held), holders)
    return holders


def _canonical_held(item: Held) -> Held:
    where = canonical(item.where, item.shape) if numel(item.shape) else whole_box(item.shape)
    return item if where is item.where else item._replace(where=where)


def _check_tensors(names: Iterable[str], holders: Iterable[Held]) -> None:
    tensors: dict[str, list[Held]] = {name: [] for name in names}
    for item in holders:
        tensors[item.name].append(item)
    for name, items in tensors.items():
        if not items:
            raise _not_exactly_once(name, "all slices of it are empty")
        first = items[0]
        other = next((x for x in items if (x.shape, x.dtype) != (first.shape, first.dtype)), None)
        if other is not None:
            raise CheckpointError(
                "D0710",
                f"ranks disagree on tensor {name!r}: {first.dtype} {first.shape} and {other.dtype} {other.shape}",
                fix="build the same model with the same dtypes on every rank",
            )
        problem = coverage_problem(first.shape, [item.where for item in items])
        if problem is not None:
            raise _not_exactly_once(name, problem)


def _not_exactly_once(name: str, problem: str) -> CheckpointError:
    return CheckpointError(
        "D0710",
        f"the ranks together do not hold tensor {name!r} exactly once: {problem}",
        fix="this is a fault of the strategy's sharded_state; report it",
    )
