"""Map-style data: every rank knows by arithmetic which samples meet in a step, and reads its own."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, SequentialSampler

from distrib.data.keyed import Fetch, Generators
from distrib.data.options import DataOptions, Round
from distrib.data.order import Order, Permutation, Sequential
from distrib.data.sharding import Layout, MicroStep, Share, share_of
from distrib.data.workers import iterator_of, naming_dead_workers, worker_init
from distrib.errors import DataError
from distrib.seeding import derive

_INDEX_BLOCK = 2048  # samples whose indices are computed at once: numpy's cost per call is then spread thin

Stub = tuple[MicroStep, tuple[Share, ...], tuple[float, ...]]  # a Round without its batches
Job = tuple[int, list[list[Any]]]
_new = tuple.__new__  # makes a named tuple without the Python call of its own constructor


class Indexed:
    """Batches of the user's map-style data set, micro-step by micro-step.

    Args:
        loader: The user's.
        options: What the run says.
        ranks: The ranks that are read for: this one, or all of them where one reader serves all.
    """

    def __init__(self, loader: DataLoader[Any], options: DataOptions, ranks: Sequence[int]) -> None:
        _length(loader)
        self._options, self._ranks = options, tuple(ranks)
        self._sampler = _whole(_own_sampler(loader))
        self.counts_batches = loader.batch_sampler is not None and loader.batch_size is None
        self._shuffled = isinstance(loader.sampler, RandomSampler)
        self.micro_batch = 1 if self.counts_batches else int(loader.batch_size or 1)
        self._dataset: Any = loader.dataset
        self._epoch, self._start, self._seed, self._size = 0, 0, options.seed, 0
        self._layout: Layout | None = None
        self._stubs: deque[Stub] = deque()
        self._generator = torch.Generator()
        single = loader.batch_size is None and loader.batch_sampler is None
        self._fetch = Fetch(loader.dataset, loader.collate_fn, single=single)
        self._loader = _with_jobs(loader, self._fetch, _Jobs(self._jobs), self._generator)
        # Without workers, pinning and a time limit, torch's loop does nothing that ours needs; it costs 7 us a batch.
        self._reads_here = not (loader.num_workers or loader.pin_memory or loader.timeout)

    def layout(self, global_batch_size: int) -> Layout | None:
        """Return how the current epoch is cut; None while its length is not known."""
        options, samples = self._options, self._units_ahead()
        if samples is None:
            return None
        return Layout(samples, global_batch_size, self.micro_batch, options.world_size, options.tail)

    def _units_ahead(self) -> int | None:
        if self._sampler is None:
            return len(self._dataset)
        try:
            return len(self._sampler)
        except TypeError:
            return None

    def rounds(self, epoch: int, seed: int, start: int, global_batch_size: int) -> Iterator[Round]:
        """Yield the micro-steps of an epoch from position `start` on. Collective with a sampler of the user's own."""
        self._epoch, self._start, self._seed, self._size = epoch, start, seed, global_batch_size
        self._stubs.clear()
        # torch's loader would draw from the global generator here, and dropout would shift after a resume.
        self._generator.manual_seed(derive(seed, "workers", epoch, self._options.rank))
        iterator = (
            map(self._fetch.__getitems__, self._jobs()) if self._reads_here else iterator_of(self._loader)
        )
        with naming_dead_workers(iterator):
            for batches in iterator:
                step, shares, weights = self._stubs.popleft()
                yield _new(Round, (step, shares, weights, batches, 1.0, None, False))

    def _jobs(self) -> Iterator[Job]:
        """Yield what is to be fetched, and note beside it which micro-step that is."""
        key = derive(self._seed, "augmentation", self._epoch)
        if self._sampler is None:
            return self._arithmetic(key)
        return self._noted(key, self._drawn(self._sampler))

    def _noted(self, key: int, found: Iterator[tuple[Stub, list[list[Any]]]]) -> Iterator[Job]:
        for stub, shares in found:
            self._stubs.append(stub)
            yield key, shares

    def _arithmetic(self, key: int) -> Iterator[Job]:
        """Cut the epoch by arithmetic; only what is asked for is computed, and full windows are cut once."""
        layout = self.layout(self._size)
        assert layout is not None, "a map-style data set has a length"
        order: Order = Sequential()
        if self._shuffled:
            order = Permutation(layout.samples, derive(self._seed, "order", self._epoch))
        for cut, starts in self._blocks(layout):
            positions = (starts[:, None] + cut.positions).reshape(-1)
            windows = order(positions).reshape(len(starts), -1).tolist()
            for at, picked in zip(starts.tolist(), windows, strict=True):
                for (begin, n, window_size, stop, *rest), shares, weights, ends in cut.steps:
                    step = _new(MicroStep, (at + begin, n, window_size, at + stop, *rest))
                    moved, samples = [], []
                    for (start, true, rows), (first, end) in zip(shares, ends, strict=True):
                        moved.append(_new(Share, (at + start, true, rows)))
                        samples.append(picked[first:end])
                    self._stubs.append((step, tuple(moved), weights))
                    yield key, samples

    def _blocks(self, layout: Layout) -> Iterator[tuple[_Cut, np.ndarray[Any, np.dtype[np.int64]]]]:
        """Yield windows of one kind and where they begin, as many as are worth computing at once."""
        size, at = self._size, self._start
        num_full, left = layout.windows_from(at)
        if num_full:
            full = self._cut(layout, size)
            at_once = max(_INDEX_BLOCK // len(full.positions), 1)
            for first in range(0, num_full, at_once):
                yield full, at + size * np.arange(first, min(first + at_once, num_full), dtype=np.int64)
        if left:
            yield self._cut(layout, left), np.array([at + size * num_full])

    def _cut(self, layout: Layout, size: int) -> _Cut:
        """Cut a window of `size` units that begins at position 0."""
        world_size = self._options.world_size
        steps, parts, at = [], [np.empty(0, dtype=np.int64)], 0
        for step in layout.window(0, size):
            shares = tuple([share_of(step, rank, world_size) for rank in self._ranks])
            ends = []
            for share in shares:
                parts.append(_positions(share, step))
                ends.append((at, at + len(parts[-1])))
                at += len(parts[-1])
            steps.append((step, shares, _weights(step, shares, world_size), ends))
        return _Cut(steps, np.concatenate(parts))

    def _drawn(self, sampler: Any) -> Iterator[tuple[Stub, list[list[Any]]]]:
        """Cut what the user's sampler, or batch sampler, draws; a window is known when it has been drawn."""
        options, start = self._options, self._start
        layout = Layout(0, self._size, self.micro_batch, options.world_size, options.tail)
        for units in self._windows(sampler):
            steps = layout.window(start, len(units))
            if len(units) < self._size and options.tail == "drop":
                return
            for step in steps:
                yield self._picked(step, units, start)
            start += len(units)

    def _windows(self, sampler: Any) -> Iterator[list[Any]]:
        """Draw the epoch under a generator of its own, equal on all ranks, and compare it with the other ranks'."""
        generators = Generators(derive(self._seed, "sampler", self._epoch))
        _set_epoch(sampler, self._epoch, derive(self._seed, "sampler", self._epoch))
        sized = self._units_ahead() is not None
        with generators:
            drawn = iter(list(sampler)) if sized else iter(sampler)
            first = list(drawn) if sized else list(islice(drawn, self._start + self._size))
        self._compare(first)
        at = self._start
        while at < len(first):
            yield first[at : at + self._size]
            at += self._size
        while not sized:
            with generators:
                units = list(islice(drawn, self._size))
            if not units:
                return
            yield units

    def _compare(self, units: list[Any]) -> None:
        collectives = self._options.collectives
        if collectives.world_size == 1 or len(self._ranks) != 1:
            return
        mine = len(units), xxhash.xxh3_64_hexdigest(repr(units).encode())
        everyone = collectives.gather_object(mine)
        other = next((rank for rank, found in enumerate(everyone) if found != everyone[0]), None)
        if other is not None:
            raise DataError(
                "D0513",
                f"{type(self._sampler).__name__} gives each rank another order: rank 0 drew {everyone[0][0]} entries, "
                f"rank {other} {everyone[other][0]}"
                + (", others" if everyone[0][0] == everyone[other][0] else ""),
                fix="draw from torch's, numpy's or Python's global generator, which are equal on all ranks here, and "
                "leave the division over the ranks to distrib",
            )

    def _picked(self, step: MicroStep, units: list[Any], start: int) -> tuple[Stub, list[list[Any]]]:
        world_size = self._options.world_size
        if not self.counts_batches:
            shares = tuple([share_of(step, rank, world_size) for rank in self._ranks])
            picked = [[units[p - start] for p in _positions(share, step).tolist()] for share in shares]
            return (step, shares, _weights(step, shares, world_size)), picked
        dealt = [self._batch_of(step, units, start, rank) for rank in self._ranks]
        total = self._rows_of_window(step, units)
        is_padded = step.padded_size != step.size
        weights = tuple((x.rows if is_padded else x.size) * world_size / total for x, _ in dealt)
        return (step, tuple(share for share, _ in dealt), weights), [batch for _, batch in dealt]

    def _rows_of_window(self, step: MicroStep, units: list[Any]) -> int:
        """Return the rows that all ranks see in the window of `step`, whose batches are `units`."""
        repeated = range(len(units), step.padded_window)
        return sum(map(len, units)) + sum(len(units[at % len(units)]) for at in repeated)

    def _batch_of(self, step: MicroStep, units: list[Any], start: int, rank: int) -> tuple[Share, list[Any]]:
        share = share_of(step, rank, self._options.world_size)
        if share.size:
            batch = list(units[share.start - start])
            return Share(share.start, len(batch), len(batch)), batch
        if step.padded_size != step.size:
            batch = list(units[(step.start - start + rank) % len(units)])
            return Share(share.start, 0, len(batch)), batch
        return Share(step.start, 0, 1), list(units[step.start - start])[:1]


class _Cut(NamedTuple):
    """A window that begins at position 0.

    Attributes:
        steps: Its micro-steps, with the shares and weights of the ranks that are read for, and where each share lies
            in `positions`.
        positions: (n,) int64, those of all these shares, one after the other.
    """

    steps: list[tuple[MicroStep, tuple[Share, ...], tuple[float, ...], list[tuple[int, int]]]]
    positions: np.ndarray[Any, np.dtype[np.int64]]


class _Jobs:
    """The batch sampler of the underlying loader: asks the source anew at every `iter`."""

    def __init__(self, jobs: Callable[[], Iterator[Job]]) -> None:
        self._jobs = jobs

    def __iter__(self) -> Iterator[Job]:
        return self._jobs()


def _own_sampler(loader: DataLoader[Any]) -> Any:
    """Return the user's sampler or batch sampler; None for torch's own two, whose order is ours."""
    if loader.batch_sampler is not None and loader.batch_size is None:
        return loader.batch_sampler
    sampler: Any = loader.sampler
    if type(sampler) is SequentialSampler:
        return None
    plain = type(sampler) is RandomSampler and not sampler.replacement
    return None if plain and sampler.num_samples == _length(loader) else sampler


def _length(loader: DataLoader[Any]) -> int:
    dataset: Any = loader.dataset
    if not hasattr(loader.dataset, "__len__"):
        raise DataError(
            "D0501",
            f"the data set {type(loader.dataset).__name__} has no length, so it cannot be divided over the ranks",
            fix="give it a __len__, or make it an IterableDataset",
        )
    return len(dataset)


def _whole(sampler: Any) -> Any:
    """Return a sampler that is divided over the ranks already as the one order that it divides."""
    if isinstance(sampler, DistributedSampler):
        whole = copy.copy(sampler)
        whole.num_replicas, whole.rank = 1, 0
        whole.num_samples = whole.total_size = len(sampler.dataset)  # type: ignore[arg-type]
        return whole
    inner = getattr(sampler, "sampler", None)
    if isinstance(inner, DistributedSampler):
        sampler = copy.copy(sampler)
        sampler.sampler = _whole(inner)
    return sampler


def _set_epoch(sampler: Any, epoch: int, seed: int) -> None:
    parts: tuple[Any, ...] = (sampler, getattr(sampler, "sampler", None))
    for part in parts:
        if hasattr(part, "set_epoch"):
            part.set_epoch(epoch)
        if isinstance(getattr(part, "generator", None), torch.Generator):
            part.generator.manual_seed(seed)


def _weights(step: MicroStep, shares: tuple[Share, ...], world_size: int) -> tuple[float, ...]:
    if step.padded_size != step.size:
        return tuple([share.rows * world_size / step.padded_window for share in shares])
    return tuple([share.size * world_size / step.padded_window for share in shares])


def _positions(share: Share, step: MicroStep) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the positions of a share, filled up cyclically with the micro-step's own samples where it is padded."""
    if share.rows == share.size or step.padded_size == step.size:
        return np.arange(share.start, share.start + share.rows, dtype=np.int64)
    fill = step.start + np.arange(share.rows - share.size, dtype=np.int64) % step.size
    return np.concatenate([np.arange(share.start, share.start + share.size, dtype=np.int64), fill])


def _with_jobs(
    loader: DataLoader[Any], fetch: Fetch, jobs: _Jobs, generator: torch.Generator
) -> DataLoader[Any]:
    """Return a loader like the user's, over jobs; in order, whatever the user's says, since the order is the run's."""
    return DataLoader(
        fetch,  # type: ignore[arg-type]
        batch_sampler=jobs,  # type: ignore[arg-type]
        num_workers=loader.num_workers,
        collate_fn=as_is,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=worker_init(loader),
        multiprocessing_context=loader.multiprocessing_context,
        generator=generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
        pin_memory_device=loader.pin_memory_device,
    )


def check_kind(loader: DataLoader[Any]) -> None:
    """Refuse a loader whose class iterates in a way of its own: its batches are made anew from its parts.

    Raises:
        DataError: D0516.
    """
    kind = type(loader)
    iterates = next(base for base in kind.__mro__ if "__iter__" in vars(base))
    if iterates is not DataLoader and not iterates.__module__.startswith("torchdata."):
        raise DataError(
            "D0516",
            f"{kind.__name__} has an __iter__ of its own, which distrib would bypass",
            fix="prepare a torch.utils.data.DataLoader, with the special part in its data set, sampler or collate_fn",
        )


def as_is(value: Any) -> Any:
    """Return `value`: what a source makes is collated already."""
    return value
