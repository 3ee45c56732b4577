"""How far reading and writing of tensors has come, for whoever shows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from distrib.checkpoint.plan import size_of
from distrib.state import ShardedState, Slice

Progress = Callable[[int, int], None]  # called with the bytes that are done, and all of them


def no_progress(done: int, total: int) -> None:
    """Tell nobody."""


def watched(state: ShardedState, progress: Progress) -> ShardedState:
    """Return `state` with slices that report each `get` to `progress`."""
    total = sum(_nbytes(s) for parts in state.tensors.values() for s in parts)
    done = 0

    def watch(part: Slice) -> Slice:
        def get() -> torch.Tensor:
            nonlocal done
            tensor = part.get()
            done += _nbytes(part)
            progress(done, total)
            return tensor

        return replace(part, get=get)

    return replace(state, tensors={name: tuple(map(watch, parts)) for name, parts in state.tensors.items()})


def _nbytes(part: Slice) -> int:
    return size_of(part.where) * part.dtype.itemsize
