"""Work on files by several threads: the calls that move and check bytes let go of the interpreter's lock."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")

_MOST_THREADS = 8
_AHEAD = 8  # items per thread whose results may wait for their turn


def num_threads() -> int:
    """Return this rank's share of the machine, which the launcher has given to torch; a few are enough for a disk."""
    return min(torch.get_num_threads(), _MOST_THREADS)


def each(function: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[R]:
    """Yield `function(item)` for every item, in order, computed by up to `threads` threads a little ahead.

    Args:
        function: Must be safe to call from several threads at once.
        items: What to call it with.
        threads: With 1 everything happens in the calling thread.
    """
    if threads == 1:
        yield from map(function, items)
        return
    rest = iter(items)
    with ThreadPoolExecutor(threads, thread_name_prefix="checkpoint-files") as pool:
        while window := list(islice(rest, _AHEAD * threads)):
            yield from pool.map(function, window)
