"""Batches on their way to the device, ahead of the loop and beside its computation."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

from distrib.collectives.trees import replace_tensors, tensors
from distrib.data.options import DataOptions, Round
from distrib.devices.base import Copier


def placed(rounds: Iterator[Round], options: DataOptions) -> Iterator[Round]:
    """Return rounds whose batches lie on the device; `prefetch` of them are under way meanwhile."""
    copier = options.device_backend.copier(options.device)
    return rounds if copier is None else _copied(rounds, copier, options.prefetch)


def _copied(rounds: Iterator[Round], copier: Copier, ahead: int) -> Iterator[Round]:
    under_way: deque[tuple[Round, list[Any]]] = deque()
    for found in rounds:
        under_way.append((found, [copier.start(x) for x in tensors(found.batches)]))
        if len(under_way) > ahead:
            yield _arrived(*under_way.popleft(), copier)
            copier.next_batch()
    while under_way:
        yield _arrived(*under_way.popleft(), copier)
        copier.next_batch()


def _arrived(found: Round, started: list[Any], copier: Copier) -> Round:
    moved = iter([copier.finish(x) for x in started])
    return found._replace(batches=replace_tensors(found.batches, moved))
