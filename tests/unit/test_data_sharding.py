"""How an epoch is cut into windows, micro-steps and shares: the contract, checked against plain enumeration."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from itertools import product
from math import ceil
from typing import get_args

import pytest
from hypothesis import assume, given, settings, strategies as st
from torch.utils.data import DataLoader, Dataset

from distrib import Accelerator, ConfigError, RunConfig
from distrib.data.sharding import Layout, MicroStep, Share, Tail, share_of
from distrib.testing import run_ranks

LENGTHS = (0, 1, 2, 7, 64, 1000)
WORLDS = range(1, 6)
MICROS = range(1, 6)
ACCUMULATIONS = (1, 2, 3, 4)
SHAPES = list(product(WORLDS, MICROS))

lengths = st.integers(0, 1000)
sizes = st.integers(1, 60)
worlds = st.integers(1, 5)
micros = st.integers(1, 5)


def micro_steps(layout: Layout, start: int = 0) -> list[MicroStep]:
    """Return the micro-steps of an epoch from a window's boundary on."""
    full, left = layout.windows_from(start)
    sizes = [layout.global_batch_size] * full + [left] * bool(left)
    starts = range(start, start + len(sizes) * layout.global_batch_size, layout.global_batch_size)
    return [step for at, size in zip(starts, sizes, strict=True) for step in layout.window(at, size)]


def shares(step: MicroStep, world_size: int) -> list[Share]:
    return [share_of(step, rank, world_size) for rank in range(world_size)]


def true_positions(share: Share) -> range:
    return range(share.start, share.start + share.size)


def positions(layout: Layout) -> list[int]:
    """Return the positions of all true samples: micro-step after micro-step, rank after rank."""
    return [
        position
        for step in micro_steps(layout)
        for share in shares(step, layout.world_size)
        for position in true_positions(share)
    ]


def windows(layout: Layout) -> list[list[int]]:
    """Return the positions that meet in each optimizer step."""
    found: list[list[int]] = [[]]
    for step in micro_steps(layout):
        for share in shares(step, layout.world_size):
            found[-1] += true_positions(share)
        if step.closes:
            found.append([])
    assert found[-1] == [], "the last micro-step closes its window"
    return found[:-1]


def global_batches(n: int, size: int) -> list[list[int]]:
    return [list(range(start, min(start + size, n))) for start in range(0, n, size)]


def dividing(n: int, *, tail: str) -> Iterator[Layout]:
    """Yield layouts of every world size, micro-batch and accumulation, where G is what they multiply to."""
    for (world, micro), accumulation in product(SHAPES, ACCUMULATIONS):
        yield Layout(n, world * micro * accumulation, micro, world, tail)  # type: ignore[arg-type]


# Exact


@pytest.mark.parametrize("n", LENGTHS)
def test_exact_gives_every_sample_once_in_order(n: int):
    for layout in dividing(n, tail="exact"):
        assert positions(layout) == list(range(n)), layout


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("size", [1, 2, 5, 12, 60])
def test_the_windows_are_the_global_batches_at_every_world_size_and_micro_batch(n: int, size: int):
    expected = global_batches(n, size)
    for world, micro in SHAPES:
        assert windows(Layout(n, size, micro, world)) == expected, (world, micro)


@given(n=lengths, size=sizes, world=worlds, micro=micros)
@settings(deadline=None)
def test_a_window_takes_the_fewest_micro_steps_and_only_its_last_is_short(
    n: int, size: int, world: int, micro: int
):
    steps = list(micro_steps(Layout(n, size, micro, world)))
    for batch in global_batches(n, size):
        own = [step for step in steps if step.window_stop == batch[-1] + 1]
        assert len(own) == ceil(len(batch) / (world * micro))
        assert [step.size for step in own[:-1]] == [world * micro] * (len(own) - 1)
        assert [step.window_size for step in own] == [len(batch)] * len(own)
        assert [step.opens for step in own] == [True] + [False] * (len(own) - 1)
        assert [step.closes for step in own] == [False] * (len(own) - 1) + [True]


@given(n=lengths, size=sizes, world=worlds, micro=micros)
@settings(deadline=None)
def test_shares_differ_by_at_most_one_larger_first_and_none_exceeds_the_micro_batch(
    n: int, size: int, world: int, micro: int
):
    for step in micro_steps(Layout(n, size, micro, world)):
        found = [share.size for share in shares(step, world)]
        assert found == sorted(found, reverse=True)
        assert found[0] - found[-1] <= 1
        assert found[0] <= micro


@given(n=lengths, size=sizes, world=worlds, micro=micros)
@settings(deadline=None)
def test_a_rank_that_is_left_with_nothing_gets_the_micro_steps_first_sample_as_a_stand_in(
    n: int, size: int, world: int, micro: int
):
    for step in micro_steps(Layout(n, size, micro, world)):
        for share in shares(step, world):
            if share.size == 0:
                assert (share.start, share.rows) == (step.start, 1)
            else:
                assert share.rows == share.size


# Drop


@pytest.mark.parametrize("n", LENGTHS)
def test_drop_keeps_whole_windows_only(n: int):
    for layout in dividing(n, tail="drop"):
        size = layout.global_batch_size
        assert positions(layout) == list(range(n - n % size)), layout
        assert layout.stop == n - n % size


@given(n=lengths, size=sizes, world=worlds, micro=micros)
@settings(deadline=None)
def test_drop_never_gives_a_rank_nothing_where_full_micro_batches_fit(
    n: int, size: int, world: int, micro: int
):
    assume(size % (world * micro) == 0)
    for step in micro_steps(Layout(n, size, micro, world, "drop")):
        assert {(share.size, share.rows) for share in shares(step, world)} == {(micro, micro)}


# Pad


@pytest.mark.parametrize("n", LENGTHS)
def test_pad_gives_every_rank_full_micro_batches_and_every_sample_once(n: int):
    for layout in dividing(n, tail="pad"):
        for step in micro_steps(layout):
            assert {share.rows for share in shares(step, layout.world_size)} == {layout.micro_batch_size}
            assert step.padded_size == layout.world_size * layout.micro_batch_size
        assert positions(layout) == list(range(n)), layout


@given(n=lengths, steps=st.integers(1, 4), world=worlds, micro=micros)
@settings(deadline=None)
def test_pad_says_how_many_rows_the_window_has(n: int, steps: int, world: int, micro: int):
    layout = Layout(n, world * micro * steps, micro, world, "pad")
    rows: dict[int, int] = {}
    for step in micro_steps(layout):
        rows[step.window_stop] = rows.get(step.window_stop, 0) + step.padded_size
    for step in micro_steps(layout):
        assert step.padded_window == rows[step.window_stop]


@given(n=lengths, size=sizes, world=worlds, micro=micros)
def test_pad_refuses_a_global_batch_that_does_not_divide_and_names_two_that_do(
    n: int, size: int, world: int, micro: int
):
    assume(size % (world * micro))
    with pytest.raises(ConfigError) as refused:
        Layout(n, size, micro, world, "pad")
    assert refused.value.code == "D0120"
    assert refused.value.fix is not None
    numbers = [int(word.strip(",")) for word in refused.value.fix.split() if word.strip(",").isdigit()]
    assert len(numbers) == 2
    for fitting in numbers:
        assert Layout(n, fitting, micro, world, "pad").global_batch_size == fitting


# Counting and positions


@given(
    n=st.integers(0, 200),
    size=sizes,
    world=worlds,
    micro=micros,
    tail=st.sampled_from(["exact", "drop", "pad"]),
)
@settings(deadline=None)
def test_count_is_the_number_of_micro_steps_from_every_windows_start(
    n: int, size: int, world: int, micro: int, tail: str
):
    size = size if tail != "pad" else ceil(size / (world * micro)) * world * micro
    layout = Layout(n, size, micro, world, tail)  # type: ignore[arg-type]
    for start in {*range(0, n, size), layout.stop}:
        assert layout.count(start) == len(list(micro_steps(layout, start)))


@given(n=st.integers(0, 200), size=sizes, world=worlds, micro=micros, tail=st.sampled_from(["exact", "drop"]))
@settings(deadline=None)
def test_the_rest_of_an_epoch_is_the_end_of_the_whole_epoch(
    n: int, size: int, world: int, micro: int, tail: str
):
    layout = Layout(n, size, micro, world, tail)  # type: ignore[arg-type]
    whole = list(micro_steps(layout))
    for start in range(0, layout.stop, size):
        rest = list(micro_steps(layout, start))
        assert rest == whole[len(whole) - len(rest) :]


@given(n=lengths, size=sizes, world=worlds, micro=micros, tail=st.sampled_from(["exact", "drop"]))
@settings(deadline=None)
def test_window_of_names_a_micro_steps_window_and_the_end_beyond_the_last(
    n: int, size: int, world: int, micro: int, tail: str
):
    layout = Layout(n, size, micro, world, tail)  # type: ignore[arg-type]
    expected, inside = [], 0
    for step in micro_steps(layout):
        inside = 0 if step.opens else inside + 1
        expected.append((step.window_stop - step.window_size, inside))
    assert [layout.window_of(index) for index in range(len(expected))] == expected
    assert layout.window_of(len(expected)) == layout.window_of(len(expected) + 7) == (layout.stop, 0)


def test_a_layout_is_a_value():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Layout(1, 1, 1, 1).samples = 2  # type: ignore[misc]


# What the loaders of all ranks read together


class Ids(Dataset):
    def __init__(self, n: int):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        if not 0 <= i < self.n:
            raise IndexError(f"sample {i} of {self.n}")
        return i


@dataclasses.dataclass(frozen=True)
class Case:
    """One way to read a data set; `size` is G where it is set."""

    n: int
    micro: int
    accumulation: int = 1
    tail: str = "exact"
    size: int | None = None
    shuffle: bool = False
    workers: int = 0
    epochs: int = 1


@dataclasses.dataclass(frozen=True)
class Read:
    """What one rank read: (rows, true samples) of each batch, and what its loader said."""

    batches: list[tuple[list[int], int]]
    length: int
    epoch: int
    error: str = ""


CUT = [Case(n, micro, accumulation, tail)
    for n in (0, 1, 2, 7, 64) for micro in (1, 2, 3, 5) for accumulation in (1, 3) for tail in get_args(Tail)]  # fmt: skip
SHUFFLED = [
    Case(50, micro, size=12, shuffle=True, workers=workers, epochs=2)
    for micro, workers in [(1, 0), (3, 0), (5, 0), (3, 2)]
]


def read(case: Case) -> Read:
    options = (
        {"global_batch_size": case.size} if case.size else {"gradient_accumulation_steps": case.accumulation}
    )
    accelerator = Accelerator(RunConfig(data={"tail": case.tail}, device="cpu", seed=17, **options))
    plain = DataLoader(Ids(case.n), batch_size=case.micro, shuffle=case.shuffle, num_workers=case.workers)
    loader = accelerator.prepare(plain)
    found: list[tuple[list[int], int]] = []
    try:
        for _ in range(case.epochs):
            found += [(batch.tolist(), accelerator.batch_size) for batch in loader]
    except IndexError as error:
        return Read(found, len(loader), loader.epoch, str(error))
    return Read(found, len(loader), loader.epoch)


def read_all() -> list[Read]:
    return [read(case) for case in [*CUT, *SHUFFLED]]


@functools.cache
def reads(world_size: int) -> dict[Case, list[Read]]:
    """Return what every rank of a job of this size read, for every case."""
    of_ranks = run_ranks(read_all, world_size)
    return dict(zip([*CUT, *SHUFFLED], map(list, zip(*of_ranks, strict=True)), strict=True))


def read_together(of_ranks: list[Read]) -> list[int]:
    steps = zip(*(rank.batches for rank in of_ranks), strict=True)
    return [x for step in steps for rows, size in step for x in rows[:size]]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("tail", ["exact", "drop"])
def test_all_ranks_read_as_many_batches_as_len_says_and_true_samples_once(world_size: int, tail: str):
    for case, of_ranks in reads(world_size).items():
        if case.tail == tail and not case.shuffle:
            left = case.n % (world_size * case.micro * case.accumulation) if tail == "drop" else 0
            assert [len(rank.batches) for rank in of_ranks] == [rank.length for rank in of_ranks], case
            assert read_together(of_ranks) == list(range(case.n - left)), case


@pytest.mark.parametrize("micro", [1, 2, 3, 5])
@pytest.mark.parametrize("world_size", [2, 3])
def test_padded_batches_are_full_and_filled_with_samples_of_their_window(world_size: int, micro: int):
    for case, of_ranks in reads(world_size).items():
        if (case.tail, case.micro) != ("pad", micro):
            continue
        assert [rank.error for rank in of_ranks] == [""] * world_size, case
        assert [len(rank.batches) for rank in of_ranks] == [rank.length for rank in of_ranks], case
        assert read_together(of_ranks) == list(range(case.n)), case
        stride = world_size * micro
        cut = global_batches(case.n, stride * case.accumulation)
        own = [window for window in cut for _ in range(ceil(len(window) / stride))]
        for rank in of_ranks:
            for window, (rows, size) in zip(own, rank.batches, strict=True):
                assert len(rows) == micro, case
                assert set(rows[size:]) <= set(window), case


@pytest.mark.parametrize("case", SHUFFLED, ids=lambda case: f"micro {case.micro}, {case.workers} workers")
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_shuffled_global_batches_are_the_same_at_every_world_size(world_size: int, case: Case):
    def batches_of(of_ranks: list[Read]) -> list[list[int]]:
        order = read_together(of_ranks)
        epochs = [order[:50], order[50:]]
        return [sorted(epoch[start : start + 12]) for epoch in epochs for start in range(0, 50, 12)]

    expected = batches_of(reads(1)[SHUFFLED[0]])
    assert batches_of(reads(world_size)[case]) == expected
    first, second = (sorted(x for batch in half for x in batch) for half in (expected[:5], expected[5:]))
    assert first == second == list(range(50))
    assert expected[:5] != expected[5:]
    assert reads(world_size)[case][0].epoch == 2
