"""Iterable data: every reader goes through the same stream, and keeps what is its own rank's.

Position p of the stream is a sample like position p of a map-style data set's order, so the same samples meet in a
step at every world size and number of workers. That costs reading the stream once per reader; `data.dispatch`, or a
stream that the user has divided over the ranks (`split_dataset_by_node`), reads each sample once.

A reader knows where the stream ends because it looks one sample ahead. The ranks compare what they found in one small
exchange per micro-step, so that streams which differ are an error, never a hang.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.utils.data._utils.worker as torch_worker
import xxhash
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from distrib.collectives.packing import flat_bytes
from distrib.collectives.trees import constants, tensors
from distrib.data.indexed import as_is
from distrib.data.keyed import Generators, seed_generators
from distrib.data.options import DataOptions, Round
from distrib.data.sharding import Layout, MicroStep, Share, share_of
from distrib.data.workers import iterator_of, naming_dead_workers, worker_init
from distrib.errors import ConfigError, DataError
from distrib.seeding import derive

_END = object()


class _Block(NamedTuple):
    """What a reader found of one micro-step.

    Attributes:
        sizes: Samples of each rank that is read for.
        batches: Batch of each of these ranks; padded, or a stand-in, where there are too few samples.
        ends: Whether the stream ends here.
        digest: Hash of the loop's first sample; 0 in later blocks.
        state: (position, what the data set's `state_dict` returned there), where it has one.
    """

    sizes: tuple[int, ...]
    batches: list[Any]
    ends: bool
    digest: int
    state: Any


class _Found(NamedTuple):
    """A micro-step as all ranks found it: this rank's block, the samples of each rank, whether all streams end."""

    block: _Block | None
    sizes: list[int]
    ended: bool


class Stream:
    """Batches of the user's iterable data set, micro-step by micro-step.

    Args:
        loader: The user's.
        options: What the run says.
        ranks: The ranks that are read for: this one, or all of them where one reader serves all.
    """

    counts_batches = False

    def __init__(self, loader: DataLoader[Any], options: DataOptions, ranks: Sequence[int]) -> None:
        self._options, self._user = options, loader
        self.micro_batch = int(loader.batch_size or 1)
        self.is_own = _is_own(loader.dataset, options)
        if self.is_own and len(ranks) > 1:
            raise DataError(
                "D0517",
                "data.dispatch lets rank 0 read for all ranks, but this data set has been divided over the ranks already",
                fix="set data.dispatch: false, or give prepare the whole stream",
            )
        self._talks = options.world_size > 1 and len(ranks) == 1
        self._reader = _Reader(
            loader,
            ranks=(0,) if self.is_own else tuple(ranks),
            world_size=1 if self.is_own else options.world_size,
            pads=options.tail == "pad",
        )
        self._generator = torch.Generator()
        self._loader = self._new_loader()
        self._spare: tuple[list[Any], int] | None = (
            None  # batches and their rows, for when an own stream has ended
        )

    def layout(self, global_batch_size: int) -> Layout | None:
        """Return how an epoch is cut by the length that the data set claims; None if it claims none."""
        options = self._options
        try:
            samples = len(self._user.dataset)  # type: ignore[arg-type]
        except TypeError:
            return None
        samples *= options.world_size if self.is_own else 1
        return Layout(samples, global_batch_size, self.micro_batch, options.world_size, options.tail)

    def rounds(
        self, epoch: int, seed: int, start: int, global_batch_size: int, state: Any = None
    ) -> Iterator[Round]:
        """Yield the micro-steps of an epoch from position `start` on. Collective.

        Args:
            epoch: Index of the epoch.
            seed: Of the data set's own random numbers.
            start: Position, a window's boundary.
            global_batch_size: Samples of a window.
            state: What the last `Round.state` before `start` was, in this run or an earlier one, to be quick.
        """
        options = self._options
        layout = Layout(0, global_batch_size, self.micro_batch, options.world_size, options.tail)
        self._begin(epoch, seed, start, layout, state)
        read_so_far = 0
        blocks = _blocks_of(self._loader)
        found = self._next(blocks, is_first=True)
        for step in _planned(layout, start):
            size = sum(found.sizes)
            if not size or (options.tail == "drop" and size < step.size):
                return
            ahead = _Found(None, [0], ended=True) if found.ended else self._next(blocks)
            read_so_far = size + (0 if step.opens else read_so_far)
            last = not any(ahead.sizes)
            yield self._round(self._filled(found), step, size, read_so_far, last=last)
            if last:
                return
            found = ahead

    def _begin(self, epoch: int, seed: int, start: int, layout: Layout, state: Any) -> None:
        options, dataset = self._options, self._user.dataset
        if self.is_own and layout.global_batch_size % layout.stride:
            raise ConfigError(
                "D0120",
                f"streams that the ranks have divided already need full micro-batches, but the global batch of "
                f"{layout.global_batch_size} is no multiple of {layout.world_size} ranks x {layout.micro_batch_size} "
                f"samples = {layout.stride}",
                where="global_batch_size",
                fix="use a multiple, or give every rank the whole stream",
            )
        parts = options.world_size if self.is_own else 1
        key = derive(seed, "stream", epoch, options.rank if self.is_own else 0)
        self._generator.manual_seed(derive(seed, "workers", epoch, options.rank))
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(epoch)
        local = Layout(
            0,
            layout.global_batch_size // parts,
            layout.micro_batch_size,
            layout.world_size // parts,
            layout.tail,
        )
        self._reader.begin(key, start // parts, local, state)
        if self._user.persistent_workers:
            self._loader = self._new_loader()  # workers that live on would not hear of it

    def _next(self, blocks: Iterator[_Block], *, is_first: bool = False) -> _Found:
        """Read one micro-step and compare with the other ranks. Collective."""
        block = next(blocks, None)
        if not self._talks:
            return _Found(block, list(block.sizes) if block else [0], ended=block is None or block.ends)
        mine = (sum(block.sizes), block.ends, block.digest) if block is not None else (0, True, 0)
        everyone = self._options.collectives.exchange([int(x) for x in mine])
        if not self.is_own:
            _check_equal(everyone)
        found = _Found(block, [size for size, *_ in everyone], all(ends for _, ends, _ in everyone))
        if is_first and self.is_own and 0 < sum(map(bool, found.sizes)) < len(found.sizes):
            self._lend_spare(found)
        return found

    def _lend_spare(self, found: _Found) -> None:
        """Give ranks whose own streams are empty a batch of another rank. Collective."""
        source = next(rank for rank, size in enumerate(found.sizes) if size)
        batches = found.block.batches if found.block is not None else None
        self._spare = self._options.collectives.broadcast_object((batches, found.sizes[source]), source)

    def _filled(self, found: _Found) -> tuple[_Block, int]:
        """Return this rank's block and the rows of its batch, with a stand-in where its own stream has ended."""
        block = found.block
        if block is not None:
            rows = self.micro_batch if self._options.tail == "pad" else max(block.sizes[0], 1)
            self._spare = (block.batches, rows) if self.is_own else None
            return block, rows
        assert self._spare is not None, "a stream that is not the rank's own ends on all ranks at once"
        return _Block((0,), self._spare[0], True, 0, None), self._spare[1]

    def _round(
        self, filled: tuple[_Block, int], step: MicroStep, size: int, read_so_far: int, *, last: bool
    ) -> Round:
        block, own_rows = filled
        pads, world_size = self._options.tail == "pad", self._options.world_size
        closes = step.closes or last
        padded_so_far = step.start + step.size - (step.window_stop - step.window_size)
        shares = tuple(
            Share(
                step.start,
                n,
                own_rows if len(block.sizes) == 1 else (self.micro_batch if pads else max(n, 1)),
            )
            for n in block.sizes
        )
        weights = tuple(
            (share.rows if pads else share.size) * world_size / step.window_size for share in shares
        )
        found = MicroStep(
            start=step.start,
            size=size,
            window_size=read_so_far,
            window_stop=step.start + size if last else step.window_stop,
            closes=closes,
            padded_size=step.size if pads else size,
            padded_window=step.window_size,
            opens=step.opens,
        )
        correction = step.window_size / (padded_so_far if pads else read_so_far) if closes else 1.0
        return Round(found, shares, weights, block.batches, correction, block.state, last)

    def _new_loader(self) -> DataLoader[Any]:
        loader = self._user
        return DataLoader(
            self._reader,
            batch_size=None,
            collate_fn=as_is,
            num_workers=loader.num_workers,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=worker_init(loader),
            multiprocessing_context=loader.multiprocessing_context,
            generator=self._generator,
            prefetch_factor=loader.prefetch_factor,
            persistent_workers=loader.persistent_workers,
            pin_memory_device=loader.pin_memory_device,
        )


class _Reader(IterableDataset[Any]):
    """Goes through the user's data set in one process, and yields the blocks that this process is to make."""

    def __init__(
        self, loader: DataLoader[Any], *, ranks: tuple[int, ...], world_size: int, pads: bool
    ) -> None:
        self.dataset: Any = loader.dataset
        self._collate = loader.collate_fn
        self._single = loader.batch_size is None
        self._ranks, self._world_size, self._pads = ranks, world_size, pads
        self._key, self._start, self._layout = 0, 0, Layout(0, 1, 1, 1)
        self._state: Any = None
        self._fresh: tuple[Any] | None = None  # the data set's state before another one was loaded into it

    def begin(self, key: int, start: int, layout: Layout, state: Any) -> None:
        """Let the next iteration begin at position `start`."""
        self._key, self._start, self._layout, self._state = key, start, layout, state

    def __iter__(self) -> Iterator[_Block]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        generators: AbstractContextManager[None] = (
            nullcontext() if info is not None else Generators(self._key)
        )
        blocks = self._blocks(worker, workers)
        while True:
            with generators, _alone():
                block = next(blocks, None)
            if block is None:
                return
            yield block

    def _blocks(self, worker: int, workers: int) -> Iterator[_Block]:
        position = self._load_state()
        samples = self._samples(position)
        while position < self._start and next(samples, _END) is not _END:
            position += 1
        ahead = next(samples, _END)
        for number, step in enumerate(_planned(self._layout, self._start)):
            if ahead is _END:
                return
            mine = number % workers == worker
            shares = [share_of(step, rank, self._world_size) for rank in self._ranks] if mine else []
            kept: list[list[Any]] = [[] for _ in shares]
            first, state = ahead, None
            digest = _digest(first) if number == 0 and mine else 0
            while position < step.start + step.size and ahead is not _END:
                for share, own in zip(shares, kept, strict=True):
                    if share.start <= position < share.start + share.size:
                        own.append(ahead)
                position += 1
                if mine and step.closes and position == step.window_stop:
                    state = self._state_at(position)
                ahead = next(samples, _END)
            if mine:
                batches = [self._batch(own, first, x.size) for own, x in zip(kept, shares, strict=True)]
                yield _Block(tuple(map(len, kept)), batches, ahead is _END, digest, state)

    def _samples(self, position: int) -> Iterator[Any]:
        """Yield the stream; what it draws at a position depends on the position alone."""
        seed_generators(self._key, "start")
        samples = iter(self.dataset)
        for number in count(position):
            seed_generators(self._key, number)
            sample = next(samples, _END)
            if sample is _END:
                return
            yield sample

    def _batch(self, samples: list[Any], first: Any, planned: int) -> Any:
        chosen = samples or [first]
        if self._pads:
            chosen = [chosen[i % len(chosen)] for i in range(planned)]
        return self._collate(chosen[0] if self._single else chosen)

    def _load_state(self) -> int:
        """Bring the data set to where it stood, if its state is known; return its position."""
        if not _has_state(self.dataset):
            return 0
        if self._state is not None:
            if self._fresh is None:
                self._fresh = (_fresh_state(self.dataset),)
            position, state = self._state
            self.dataset.load_state_dict(state)
            return int(position)
        if self._fresh is not None:
            self.dataset.load_state_dict(*self._fresh)
        return 0

    def _state_at(self, position: int) -> Any:
        return (position, self.dataset.state_dict()) if _has_state(self.dataset) else None


def _blocks_of(loader: DataLoader[Any]) -> Iterator[_Block]:
    iterator = iterator_of(loader)
    with naming_dead_workers(iterator):
        yield from iterator


def _planned(layout: Layout, start: int) -> Iterator[MicroStep]:
    """Yield the micro-steps of an endless epoch."""
    for at in count(start, layout.global_batch_size):
        yield from layout.window(at, layout.global_batch_size)


@contextmanager
def _alone() -> Iterator[None]:
    """Let the data set believe that one process reads it: which part is whose is settled here, once."""
    info, torch_worker._worker_info = torch_worker._worker_info, None
    try:
        yield
    finally:
        torch_worker._worker_info = info


def _has_state(dataset: Any) -> bool:
    """Whether the data set can tell where it stands, wholly."""
    return (
        hasattr(dataset, "state_dict")
        and hasattr(dataset, "load_state_dict")
        and not _shuffles_in_a_buffer(dataset)
    )


def _shuffles_in_a_buffer(dataset: Any) -> bool:
    """Whether Hugging Face's `shuffle(buffer_size=)` is part of it: its state leaves out the samples in the buffer."""
    parts: list[Any] = [getattr(dataset, "_ex_iterable", None)]
    while parts:
        part = parts.pop()
        if type(part).__name__ == "BufferShuffledExamplesIterable":
            return True
        parts += getattr(part, "ex_iterables", ())  # of interleaved and concatenated streams
        if hasattr(part, "ex_iterable"):
            parts.append(part.ex_iterable)
    return getattr(dataset, "_shuffling", None) is not None


def _fresh_state(dataset: Any) -> Any:
    """Return what `load_state_dict` takes for the data set's next loop to begin as it would now.

    Hugging Face's `state_dict` stays where an earlier loop, even one look at a sample, was left, but its next loop
    begins where the last `load_state_dict` says, and at the beginning after None.
    """
    if hasattr(dataset, "_starting_state_dict"):
        return dataset._starting_state_dict
    return dataset.state_dict()


def _is_own(dataset: Any, options: DataOptions) -> bool:
    """Whether each rank's stream is a part of its own: the user says so, or Hugging Face's data set does."""
    if options.is_distributed is not None:
        return options.is_distributed
    return getattr(dataset, "_distributed", None) is not None


def _digest(sample: Any) -> int:
    """Return a hash of a sample's tensors, arrays, numbers and texts; other objects cannot be compared."""
    digest = xxhash.xxh3_64()
    for x in tensors(sample):
        digest.update(flat_bytes(x.cpu()).numpy().tobytes())
    for value in constants(sample):
        if isinstance(value, np.ndarray) and not value.dtype.hasobject:
            digest.update(value.tobytes())
        elif isinstance(value, (str, bytes, int, float, complex)):
            digest.update(repr(value).encode())
    return digest.intdigest() >> 1


def _check_equal(everyone: list[list[int]]) -> None:
    """Refuse streams that are not the same on all ranks: one is empty, ends elsewhere, or begins differently."""
    differs = "ends" if len({ends for _, ends, _ in everyone}) > 1 else ""
    if len({digest for *_, digest in everyone}) > 1:
        differs = "begins"
    if differs:
        raise DataError(
            "D0514",
            f"the stream is not the same on every rank: it {differs} differently; expected every rank to read the whole "
            "stream, of which distrib takes the rank's part",
            fix="do not divide the data set over the ranks yourself, and draw from torch's, numpy's or Python's global "
            "generator; or say that each rank has its own part: prepare_data_loader(loader, is_distributed=True)",
        )
