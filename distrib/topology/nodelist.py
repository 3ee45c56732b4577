"""Slurm's compact notation for host names and for counts by node. Pure; see `man srun`."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable

from distrib.errors import TopologyError

_PIECE = re.compile(r"\[([^\[\]]*)\]|([^\[\],\s]+)")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?", re.ASCII)
_COUNT = re.compile(r"(\d+)(?:\(x(\d+)\))?", re.ASCII)


def expand_nodelist(text: str, *, where: str | None = None) -> tuple[str, ...]:
    """Return the host names of a node list, in its order: "node[01-02],gpu5" gives node01, node02, gpu5.

    Args:
        text: Names separated by commas; each may hold bracketed numbers, padded like the first of a range.
        where: The variable it came from, for the error.

    Raises:
        TopologyError: if it does not follow the notation (D0204).
    """
    hosts = [host for name in _split(text) for host in _expand(name, text, where)]
    return tuple(hosts)


def expand_counts(text: str, *, where: str | None = None) -> tuple[int, ...]:
    """Return one number for each node: "2(x3),1" gives 2, 2, 2, 1.

    Raises:
        TopologyError: if it does not follow the notation (D0204).
    """
    found = [_COUNT.fullmatch(part.strip()) for part in text.split(",")]
    return tuple(
        itertools.chain.from_iterable(
            [int(match[1])] * int(match[2] or 1) for match in _all_matched(found, text, where)
        )
    )


def _split(text: str) -> list[str]:
    """Split at the commas outside brackets."""
    return re.split(r",(?![^\[]*\])", text.strip())


def _expand(name: str, text: str, where: str | None) -> Iterable[str]:
    pieces = list(_PIECE.finditer(name))
    if "".join(piece[0] for piece in pieces) != name or not pieces:
        raise _unreadable(text, where)
    choices = [[piece[2]] if piece[2] else _numbers(piece[1], text, where) for piece in pieces]
    return ("".join(parts) for parts in itertools.product(*choices))


def _numbers(ranges: str, text: str, where: str | None) -> list[str]:
    numbers: list[str] = []
    for match in _all_matched([_RANGE.fullmatch(part.strip()) for part in ranges.split(",")], text, where):
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise _unreadable(text, where)
        numbers += [str(number).zfill(len(match[1])) for number in range(first, last + 1)]
    return numbers


def _all_matched(matches: list[re.Match[str] | None], text: str, where: str | None) -> list[re.Match[str]]:
    found = [match for match in matches if match is not None]
    if len(found) != len(matches):
        raise _unreadable(text, where)
    return found


def _unreadable(text: str, where: str | None) -> TopologyError:
    return TopologyError(
        "D0204",
        f"{text!r} is not in Slurm's notation; expected something like 'node[01-03,07],gpu5' or '2(x3),1'",
        where=where,
        fix="start the script with srun, and pass Slurm's variables on unchanged",
    )
