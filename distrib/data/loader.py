"""A DataLoader whose batches are this rank's share of the design's global batches, and which knows its position."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler

from distrib.collectives.trees import map_tensors
from distrib.data.live import LiveLoaders
from distrib.data.order import Order, Permutation, Sequential
from distrib.data.sharding import Layout, MicroStep, Share, Tail, share_of
from distrib.errors import DataError, NotBuiltError
from distrib.seeding import derive
from distrib.state import LoaderPosition

_INDEX_BLOCK = 2048  # samples whose indices are computed at once: numpy's cost per call is then spread thin


@dataclass(frozen=True)
class DataOptions:
    """What the run says about data.

    Attributes:
        rank: This rank among those that read different samples.
        world_size: How many ranks read different samples.
        device: Where batches are put.
        tail: What happens to the last, shorter window.
        seed: Seed of the sample order, equal on all ranks.
        global_batch_size: G if the user set it, else None.
        accumulation: Micro-steps per window when G is not set.
    """

    rank: int
    world_size: int
    device: torch.device
    tail: Tail
    seed: int
    global_batch_size: int | None
    accumulation: int


class PreparedDataLoader:
    """The user's loader over this rank's share.

    Iterating yields the micro-steps of the current epoch; every rank gets the same number of batches, `len(self)`.
    Attributes that are not listed here are those of the underlying `torch.utils.data.DataLoader`.

    Attributes:
        epoch: Index of the current epoch; it counts itself.
        global_batch_size: Samples of one optimizer step over all ranks.
    """

    def __init__(
        self, loader: DataLoader[Any], options: DataOptions, live: LiveLoaders, trains: Callable[[], bool]
    ) -> None:
        _refuse_what_is_not_built(loader)
        self._options, self._live, self._trains = options, live, trains
        self._shuffled = isinstance(loader.sampler, RandomSampler)
        self._tail: Tail = "drop" if loader.drop_last else options.tail
        self._micro_batch = int(loader.batch_size or 1)
        self._seed = options.seed
        self.epoch = 0
        self._consumed = 0  # the last settled position of this epoch
        self._settles_at: int | None = None  # where the position moves once the yielded window has been used
        self._restored = False
        self.micro_step: MicroStep | None = None
        self.share: Share | None = None
        accumulated = self._micro_batch * options.world_size * options.accumulation
        self._set_layout(options.global_batch_size or accumulated, _samples_of(loader))
        self._generator = torch.Generator()
        self._indices = _ShareSampler(self)
        self._loader = _with_batches(loader, self._indices, self._generator)

    def _set_layout(self, global_batch_size: int, samples: int) -> None:
        options = self._options
        self.layout = Layout(samples, global_batch_size, self._micro_batch, options.world_size, self._tail)
        self.global_batch_size = global_batch_size

    def __len__(self) -> int:
        return self.layout.count()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_loader":
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __iter__(self) -> Iterator[Any]:
        self._begin()
        try:
            steps = self.layout.micro_steps(self._consumed)
            for step, batch in zip(steps, self._loader, strict=True):
                self.settle()
                self.micro_step, self.share = (
                    step,
                    share_of(step, self._options.rank, self._options.world_size),
                )
                if step.closes:
                    self._settles_at = step.window_stop
                self._live.yielded(self)
                yield self._placed(batch)
            self.epoch, self._consumed, self._settles_at = self.epoch + 1, 0, None
        finally:
            self._live.ended(self)

    @property
    def order(self) -> Order:
        """The order of samples of the current epoch."""
        if not self._shuffled:
            return Sequential()
        return Permutation(self.layout.samples, derive(self._seed, "order", self.epoch))

    @property
    def position(self) -> LoaderPosition:
        """Where this loader stands; a window that is still open is not counted, since it will be replayed."""
        consumed = self._consumed
        if self._settles_at is not None and not self._trains():
            consumed = self._settles_at
        ended = consumed >= self.layout.stop and consumed > 0
        epoch, consumed = (self.epoch + 1, 0) if ended else (self.epoch, consumed)
        return LoaderPosition(epoch, self._seed, consumed, self.global_batch_size)

    @position.setter
    def position(self, position: LoaderPosition) -> None:
        if position.consumed > self.layout.samples:
            raise DataError(
                "D0502",
                f"the restored position is sample {position.consumed} of an epoch, but the data set has only "
                f"{self.layout.samples}",
                fix="resume with the data set of the saved run, or call set_epoch to start an epoch anew",
            )
        self.epoch, self._seed, self._consumed = position.epoch, position.seed, position.consumed
        self._settles_at, self._restored = None, True
        if self._options.global_batch_size is None:
            self._set_layout(position.global_batch_size, self.layout.samples)

    @property
    def has_restored_position(self) -> bool:
        """Whether the next loop goes on where a checkpoint stopped."""
        return self._restored

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of `epoch`; naming the current epoch keeps the position."""
        if epoch != self.epoch:
            self.epoch, self._consumed, self._settles_at, self._restored = epoch, 0, None, False

    def skip(self, num_batches: int) -> None:
        """Let the next loop start at this epoch's batch `num_batches`."""
        self._consumed, self._settles_at = self.layout.position_of(num_batches), None
        self._restored = True

    def settle(self) -> None:
        """Count the window whose last batch was yielded as used."""
        if self._settles_at is not None:
            self._consumed, self._settles_at = self._settles_at, None

    @property
    def has_stand_ins(self) -> bool:
        """Whether the last micro-step gave some rank rows that are no samples."""
        step = self.micro_step
        return step is not None and (step.padded_size != step.size or step.size < self._options.world_size)

    def _begin(self) -> None:
        if not self._restored:
            self._consumed = 0
        self._restored, self._settles_at = False, None
        options = self._options
        # torch's loader would draw from the global generator here, and dropout would shift after a resume.
        self._generator.manual_seed(derive(self._seed, "workers", self.epoch, options.rank))

    def _placed(self, batch: Any) -> Any:
        device = self._options.device
        if device.type == "cpu":
            return batch
        return map_tensors(lambda x: x.to(device, non_blocking=True), batch)

    def share_indices(self) -> Iterator[list[int]]:
        """Yield this rank's sample indices, one list per micro-step, from the position on."""
        order, block, rows = self.order, [], 0
        for step in self.layout.micro_steps(self._consumed):
            share = share_of(step, self._options.rank, self._options.world_size)
            block.append(_positions(share, step))
            rows += share.rows
            if rows >= _INDEX_BLOCK:
                yield from _split(order, block)
                block, rows = [], 0
        if block:
            yield from _split(order, block)


class _ShareSampler:
    """The batch sampler of the underlying loader: asks the prepared loader anew at every `iter`."""

    def __init__(self, loader: PreparedDataLoader) -> None:
        self._owner = loader

    def __iter__(self) -> Iterator[list[int]]:
        return self._owner.share_indices()

    def __len__(self) -> int:
        return len(self._owner)


def _positions(share: Share, step: MicroStep) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the positions of a share, filled up cyclically with the window's own samples where it is padded."""
    if share.rows == share.size or (not share.size and share.rows == 1):
        return np.arange(share.start, share.start + share.rows, dtype=np.int64)
    fill = step.start + np.arange(share.rows - share.size, dtype=np.int64) % step.size
    return np.concatenate([np.arange(share.start, share.start + share.size, dtype=np.int64), fill])


def _split(order: Order, block: list[np.ndarray[Any, np.dtype[np.int64]]]) -> Iterator[list[int]]:
    samples = order(np.concatenate(block)).tolist()
    start = 0
    for positions in block:
        yield samples[start : start + len(positions)]
        start += len(positions)


def _refuse_what_is_not_built(loader: DataLoader[Any]) -> None:
    if type(loader) is not DataLoader:
        raise NotBuiltError(
            f"preparing a {type(loader).__name__}", fix="prepare a torch.utils.data.DataLoader"
        )
    if isinstance(loader.dataset, IterableDataset):
        raise NotBuiltError("preparing a DataLoader over an IterableDataset", fix="use a map-style data set")
    if not hasattr(loader.dataset, "__len__"):
        raise DataError(
            "D0501",
            f"the data set {type(loader.dataset).__name__} has no length, so it cannot be divided over the ranks",
            fix="give it a __len__",
        )
    if loader.batch_size is None:
        raise NotBuiltError(
            "preparing a DataLoader with a batch_sampler of its own or batch_size=None",
            fix="give it a batch_size",
        )
    sampler = loader.sampler
    with_own_draw = isinstance(sampler, RandomSampler) and (
        sampler.replacement or sampler.num_samples != _samples_of(loader)
    )
    if with_own_draw or type(sampler) not in (RandomSampler, SequentialSampler):
        raise NotBuiltError(
            f"preparing a DataLoader with the sampler {type(sampler).__name__}",
            fix="use shuffle=True or False",
        )


def _samples_of(loader: DataLoader[Any]) -> int:
    return len(loader.dataset)  # type: ignore[arg-type]  # map-style, as checked


def _with_batches(
    loader: DataLoader[Any], batches: _ShareSampler, generator: torch.Generator
) -> DataLoader[Any]:
    """Return a loader like the user's, over other batches of indices."""
    return DataLoader(
        loader.dataset,
        batch_sampler=batches,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
        pin_memory_device=loader.pin_memory_device,
        in_order=loader.in_order,
    )
