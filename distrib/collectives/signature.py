"""What a rank is about to do, as the other ranks compare it, and the first difference in words."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

from distrib import frames
from distrib.collectives.trees import described, structure

_MOST_RANKS = 8  # that a message lists
_LONGEST = 300  # characters of a structure that a message shows whole


@dataclass(frozen=True)
class Call:
    """One rank's call, complete enough to tell it from another's.

    Attributes:
        op: "gather", "reduce(sum)", ...
        text: The structure of its argument; "" if it has none that matters.
        leaves: The text of each leaf by its path.
        where: "file:line" of the script.
    """

    op: str
    text: str
    leaves: dict[str, str]
    where: str


class Signature:
    """An operation and the structure of its argument.

    Args:
        op: What is called.
        tree: Its argument; None if only the operation counts.
        ragged: Whether dim 0 may differ.
        sizes: Whether the other sizes count.
    """

    def __init__(self, op: str, tree: Any = None, *, ragged: bool = False, sizes: bool = True) -> None:
        self.op, self._tree, self._ragged, self._sizes = op, tree, ragged, sizes
        self._text = "" if tree is None else structure(tree, ragged=ragged, sizes=sizes)
        number = xxhash.xxh3_64_intdigest(f"{op} of {self._text}".encode())
        self.key = number - (1 << 63)  # as a signed integer of 64 bits

    def call(self, where: str) -> Call:
        """Return all that a message about a difference needs."""
        leaves = {} if self._tree is None else described(self._tree, ragged=self._ragged, sizes=self._sizes)
        return Call(self.op, self._text, leaves, where)


def disagreement(calls: Sequence[Call]) -> str:
    """Say who calls what: "rank 0 calls A at x.py:3, rank 1 calls B at x.py:9 (rank 2 too)"."""
    groups: dict[tuple[str, str, str], list[int]] = {}
    for rank, call in enumerate(calls):
        groups.setdefault((call.op, call.text, call.where), []).append(rank)
    first = calls[0]
    other = next((call for call in calls if (call.op, call.text) != (first.op, first.text)), calls[-1])
    return ", ".join(
        f"rank {rank} calls {_in_words(calls[rank], first if rank else other)}"
        + (f" ({named_ranks(alike)} too)" if alike else "")
        for rank, *alike in groups.values()
    )


def named_ranks(ranks: Sequence[int]) -> str:
    """Write "rank 3", "ranks 0, 1, 2" or "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 24 more"."""
    shown = ", ".join(map(str, ranks[:_MOST_RANKS]))
    more = f" and {len(ranks) - _MOST_RANKS} more" if len(ranks) > _MOST_RANKS else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{more}"


def _in_words(call: Call, other: Call) -> str:
    if not call.text:
        return f"{call.op} at {call.where}"
    if len(call.text) <= _LONGEST:
        return f"{call.op} of {call.text} at {call.where}"
    paths = dict.fromkeys([*call.leaves, *other.leaves])
    path = next((p for p in paths if call.leaves.get(p) != other.leaves.get(p)), next(iter(paths)))
    return f"{call.op} of {len(call.leaves)} values, where {path} is {call.leaves.get(path, 'missing')}, at {call.where}"


def call_site() -> str:
    """Return "file:line" of the innermost frame outside this package, and not of a context manager or logger."""
    return frames.call_site(contextlib.__file__, logging.__file__)
