"""How units are dealt to stages, and what each rank of a pipeline does in which order. Pure arithmetic, no torch.

Stage s lies on rank s % ranks. A batch goes through the stages in parts, its *microbatches*. All orders are made of one
list of forwards and one of backwards: a rank runs some forwards ahead, then one backward after each forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import Literal, NamedTuple

Schedule = Literal["gpipe", "1f1b", "interleaved_1f1b", "forward"]
Operation = Literal["forward", "backward", "send", "receive", "send_back", "receive_back"]


class Action(NamedTuple):
    """One thing that a rank does; `stage` is always one of its own."""

    operation: Operation
    stage: int
    part: int


Orders = tuple[tuple[Action, ...], ...]  # one for each rank


def deal(sizes: Sequence[int], stages: int) -> list[range]:
    """Cut units into consecutive stages, none empty, so that the largest stage is as small as it can be.

    Args:
        sizes: Bytes of each unit, in order; at least as many as `stages`.
        stages: How many there are.

    Returns:
        For each stage the indices of its units.
    """
    low, high = max(sizes), sum(sizes)
    while low < high:  # the least bound that no more than `stages` stages keep
        middle = (low + high) // 2
        if _needed(sizes, middle) <= stages:
            high = middle
        else:
            low = middle + 1
    found, start = [], 0
    for left in reversed(range(stages)):  # stages after this one, each of which needs a unit
        stop, load = start + 1, sizes[start]
        while stop < len(sizes) - left and load + sizes[stop] <= low:
            load, stop = load + sizes[stop], stop + 1
        found.append(range(start, stop))
        start = stop
    return found


def _needed(sizes: Sequence[int], bound: int) -> int:
    stages, load = 1, 0
    for size in sizes:
        if load + size > bound:
            stages, load = stages + 1, 0
        load += size
    return stages


def parts_of(rows: int, wanted: int) -> list[range]:
    """Cut the rows of a batch into `wanted` microbatches, sizes as equal as can be; fewer if there are fewer rows."""
    count = min(rows, wanted)
    ends = list(accumulate(rows // count + (i < rows % count) for i in range(count)))
    return [range(start, stop) for start, stop in zip([0, *ends], ends, strict=False)]


@cache
def actions(schedule: Schedule, ranks: int, stages_per_rank: int, parts: int) -> Orders:
    """Return what each rank computes, sends and receives, in order.

    The orders are those of one list in which a transfer is one entry for both its ranks. So the rank with the first
    entry that is not done yet can always go on, even if every send waits for its receive: no deadlock.

    Args:
        schedule: "gpipe" runs all forwards first; "1f1b" runs as few ahead as keep all ranks busy (PipeDream-flush);
            "interleaved_1f1b" does so with several stages on each rank (Narayanan et al. 2021, arXiv:2104.04473);
            "forward" runs no backward.
        ranks: At least 2.
        stages_per_rank: How many stages lie on each rank.
        parts: Number of microbatches.
    """
    computing = [_computing(schedule, rank, ranks, stages_per_rank, parts) for rank in range(ranks)]
    last = ranks * stages_per_rank - 1
    found: list[list[Action]] = [[] for _ in range(ranks)]
    done: set[Action] = set()
    waiting = [list(reversed(order)) for order in computing]
    while any(waiting):
        before = len(done)
        for rank, order in enumerate(waiting):
            if order and all(x in done for x in _needs(order[-1], last)):
                action = order.pop()
                done.add(action)
                found[rank].append(action)
                _add_transfer(action, found, last)
        assert len(done) > before, f"no rank can go on: {schedule}, {ranks} ranks, {parts} microbatches"
    return tuple(map(tuple, found))


def _needs(action: Action, last: int) -> list[Action]:
    operation, stage, part = action
    if operation == "forward":
        return [Action("forward", stage - 1, part)] if stage else []
    after = [Action("backward", stage + 1, part)] if stage < last else []
    return [Action("forward", stage, part), *after]


def _add_transfer(action: Action, found: list[list[Action]], last: int) -> None:
    operation, stage, part = action
    ranks = len(found)
    if operation == "forward" and stage < last:
        found[stage % ranks].append(Action("send", stage, part))
        found[(stage + 1) % ranks].append(Action("receive", stage + 1, part))
    if operation == "backward" and stage:
        found[stage % ranks].append(Action("send_back", stage, part))
        found[(stage - 1) % ranks].append(Action("receive_back", stage - 1, part))


def _computing(schedule: Schedule, rank: int, ranks: int, stages_per_rank: int, parts: int) -> list[Action]:
    own = range(rank, ranks * stages_per_rank, ranks)
    num_rounds = max(1, parts // ranks) if schedule == "interleaved_1f1b" else 1
    rounds = parts_of(parts, num_rounds)
    forwards = [Action("forward", stage, part) for each in rounds for stage in own for part in each]
    backwards = [
        Action("backward", stage, part) for each in rounds for stage in reversed(own) for part in each
    ]
    if schedule == "forward":
        return forwards
    ahead = {
        "gpipe": len(forwards),
        "1f1b": ranks - 1 - rank,
        "interleaved_1f1b": (stages_per_rank - 1) * len(rounds[0]) + 2 * (ranks - 1 - rank),
    }[schedule]
    return _alternating(forwards, backwards, min(ahead, len(forwards)))


def _alternating(forwards: list[Action], backwards: list[Action], ahead: int) -> list[Action]:
    order = forwards[:ahead]
    for forward, backward in zip(forwards[ahead:], backwards, strict=False):
        order += [forward, backward]
    return order + backwards[len(forwards) - ahead :]
