"""A DataLoader whose batches are this rank's share of the design's global batches, and which knows its position."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, IterableDataset

from distrib.data.dispatch import dispatched
from distrib.data.indexed import Indexed, check_kind
from distrib.data.live import LiveLoaders
from distrib.data.options import DataOptions, Round
from distrib.data.placement import placed
from distrib.data.sharding import Layout, MicroStep, Share, Tail
from distrib.data.stream import Stream
from distrib.errors import ConfigError, DataError
from distrib.logging import notice
from distrib.state import LoaderPosition

_AT_END = -1


class _Start(NamedTuple):
    """Where a loop begins, and who has asked for it."""

    consumed: int
    stream: Any
    left_out: int
    restored: bool
    skipped: bool


class PreparedDataLoader:
    """The user's loader over this rank's share.

    Iterating yields the micro-steps of the current epoch; every rank gets the same number of batches. Attributes that
    are not listed here are those of the user's `torch.utils.data.DataLoader`.

    Attributes:
        epoch: Index of the current epoch; it counts itself.
        global_batch_size: Samples of one optimizer step over all ranks; batches, where the user's own batch sampler
            makes them.
        micro_step: The micro-step of the batch that was yielded last.
        share: This rank's part of it.
        weight_of_mean: Weight of this rank's mean loss in it.
        correction: Factor on the window's gradients when it closes; not 1 if a stream ended early.
        taken_up: The micro-step that the training loop took up last, and
        numbers: those that it gave to this micro-step and to its window.
    """

    def __init__(
        self, loader: DataLoader[Any], options: DataOptions, live: LiveLoaders, trains: Callable[[], bool]
    ) -> None:
        check_kind(loader)
        self._loader, self._live, self._trains = loader, live, trains
        self._options = options = replace(options, tail=_tail_of(loader, options))
        self._seed = options.seed
        self.epoch = 0
        self._consumed = 0  # the last settled position of this epoch
        self._settles_at: int | None = None  # where the position moves once the yielded window has been used
        self._stream: Any = None  # the data set's own state at the settled position
        self._stream_ahead: Any = None
        self._restored = self._skipped = self._was_stepped = False
        self._left_out = 0  # micro-steps of the first window that the next loop does not yield
        self._told = False  # that an epoch which was left begins anew
        self._loop: object = None  # stands for the iterator that was begun last
        self.micro_step: MicroStep | None = None
        self.taken_up: MicroStep | None = None
        self.numbers = 0, 0
        self.share: Share | None = None
        self.weight_of_mean, self.correction, self.has_samples = 1.0, 1.0, True
        everyone = range(options.world_size) if options.dispatch else (options.rank,)
        self._source = (Stream if isinstance(loader.dataset, IterableDataset) else Indexed)(
            loader, options, everyone
        )
        self._dispatches = options.dispatch and options.world_size > 1
        self.global_batch_size = self._own_global_batch_size()
        self._source.layout(self.global_batch_size)  # raises if the tail does not fit

    def _own_global_batch_size(self) -> int:
        options, source = self._options, self._source
        if source.counts_batches and options.global_batch_size is not None:
            raise ConfigError(
                "D0121",
                f"global_batch_size is {options.global_batch_size} samples, but this loader has a batch sampler of its "
                "own, whose batches are dealt out whole",
                where="global_batch_size",
                fix="set gradient_accumulation_steps instead",
            )
        return options.global_batch_size or source.micro_batch * options.world_size * options.accumulation

    @property
    def layout(self) -> Layout | None:
        """How the epoch is cut; None while its length is not known."""
        return self._source.layout(self.global_batch_size)

    @property
    def is_unbatched(self) -> bool:
        """Whether the user's loader makes no batches, so that nobody knows how many rows there are."""
        return self._loader.batch_size is None and self._loader.batch_sampler is None

    def __len__(self) -> int:
        layout = self.layout
        if layout is None:
            raise TypeError(f"{type(self._loader.dataset).__name__} has no length, so the loader has none")
        return layout.count()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_loader":
            raise AttributeError(name)
        if name in (
            "state_dict",
            "load_state_dict",
        ):  # a stateful loader's own, which never hears of our loop
            raise AttributeError(
                f"a prepared loader has no {name}: its position is part of the run's checkpoint; use save_state and "
                "load_state of the accelerator"
            )
        return getattr(self._loader, name)

    def __iter__(self) -> Iterator[Any]:
        began = _Start(self._consumed, self._stream, self._left_out, self._restored, self._skipped)
        rounds = self._begin()
        self._loop = loop = object()
        try:
            for found in rounds:
                if self._settles_at is not None:
                    self.settle()
                self.micro_step, self.share = found.step, found.shares[0]
                self.weight_of_mean, self.correction = found.weights[0], found.correction
                self.has_samples = self.share.size > 0
                if found.step.closes:
                    self._settles_at = _AT_END if found.last else found.step.window_stop
                    self._stream_ahead = found.state
                if self._live.current is not self:
                    self._live.yielded(self)
                yield found.batches[0]
            self._go_to(self.epoch + 1, 0)
        except BaseException:
            # an iterator that outlived its loop says nothing about the one that runs now
            if self._loop is loop and self._trains() and not self._was_stepped:
                self._go_back(began)
            raise
        finally:
            if self._loop is loop:
                self._live.ended(self)

    def _go_back(self, began: _Start) -> None:
        """Stand where the next loop begins, after one that trained nothing: an evaluation begins its epoch anew.

        A start that was asked for, and was left in its first window, is still to come.
        """
        is_to_come = (began.restored or began.skipped) and self._consumed == began.consumed
        self._go_to(self.epoch, 0)
        if is_to_come:
            self._consumed, self._stream, self._left_out, self._restored, self._skipped = began

    def _begin(self) -> Iterator[Round]:
        if not (self._restored or self._skipped):
            self._tell_of_repetition()
            self._go_to(self.epoch, 0)
        left_out, self._left_out = self._left_out, 0
        self._restored = self._skipped = self._was_stepped = False
        self._settles_at = None
        extra = {"state": self._stream} if isinstance(self._source, Stream) else {}
        rounds: Iterator[Round] | None = None
        if not self._dispatches or self._options.rank == 0:
            rounds = self._source.rounds(
                self.epoch, self._seed, self._consumed, self.global_batch_size, **extra
            )
        if self._dispatches or rounds is None:
            rounds = dispatched(rounds, self._options.collectives)
        return placed(_opened(islice(rounds, left_out, None)) if left_out else rounds, self._options)

    def _tell_of_repetition(self) -> None:
        """Say once that a loop which trained and was left begins its epoch anew: plain torch would shuffle again."""
        if not (self._was_stepped and self._consumed) or self._told or self._options.rank:
            return
        self._told = True
        notice(
            f"a training loop was left after {self._consumed} samples of epoch {self.epoch}, and the new one begins the "
            "same epoch anew, with the same samples; to go on to others, call loader.set_epoch(loader.epoch + 1) "
            "before it"
        )

    @property
    def position(self) -> LoaderPosition:
        """Where this loader stands; a window that is still open is not counted, since it will be replayed."""
        epoch, consumed, stream = self.epoch, self._consumed, self._stream
        if self._settles_at is not None and not self._trains():
            consumed, stream = self._settles_at, self._stream_ahead
        layout = self.layout
        if consumed == _AT_END or (layout is not None and consumed >= layout.stop and consumed > 0):
            epoch, consumed, stream = self.epoch + 1, 0, None
        samples = -1 if layout is None else layout.samples
        return LoaderPosition(
            epoch, self._seed, consumed, self.global_batch_size, samples, self._divided_by, stream
        )

    @position.setter
    def position(self, position: LoaderPosition) -> None:
        self._seed = position.seed
        self._go_to(position.epoch, position.consumed)
        self._stream, self._restored = position.stream, True
        if self._options.global_batch_size is None and self.global_batch_size != position.global_batch_size:
            if self._options.rank == 0:
                notice(
                    f"the global batch stays at {position.global_batch_size}, as at the run's first start; here batch "
                    f"size x ranks x accumulation would be {self.global_batch_size}; global_batch_size changes it"
                )
            self.global_batch_size = position.global_batch_size

    def check(self, position: LoaderPosition) -> None:
        """Refuse a position of other data, before anything is changed.

        Raises:
            DataError: D0502, if the data set has another length or is divided otherwise.
        """
        layout, where = self.layout, "the restored position"
        samples = position.samples if layout is None else layout.samples
        if position.samples not in (samples, -1):
            raise DataError(
                "D0502",
                f"{where} is sample {position.consumed} of a data set of {position.samples}, but this one has {samples}",
                fix="resume with the data set of the saved run, or leave the loader out and begin its epoch anew",
            )
        if position.divided_by != self._divided_by and position.consumed:
            raise DataError(
                "D0502",
                f"{where} is that of a stream divided over {position.divided_by} ranks, but this one is divided over "
                f"{self._divided_by}: which samples were used cannot be told",
                fix=f"resume on {position.divided_by} ranks, or give every rank the whole stream",
            )

    @property
    def _divided_by(self) -> int:
        return self._options.world_size if isinstance(self._source, Stream) and self._source.is_own else 1

    @property
    def has_restored_position(self) -> bool:
        """Whether the next loop goes on where a checkpoint stopped."""
        return self._restored

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of `epoch`; naming the current epoch keeps the position."""
        if epoch != self.epoch:
            self._go_to(epoch, 0)
            self._restored = self._skipped = False

    def skip(self, num_batches: int) -> None:
        """Let the next loop start at this epoch's batch `num_batches`; in a window, it goes on with the rest of that.

        Raises:
            DataError: D0506, unless it is a whole number of at least 0.
        """
        if not isinstance(num_batches, int) or num_batches < 0:
            raise DataError(
                "D0506", f"got {num_batches!r} batches to skip; expected a whole number of at least 0"
            )
        layout = self.layout or Layout(
            2**62,
            self.global_batch_size,
            self._source.micro_batch,
            self._options.world_size,
            self._options.tail,
        )
        start, left_out = layout.window_of(num_batches)
        self._go_to(self.epoch, start)
        self._skipped, self._left_out = True, left_out

    def settle(self) -> None:
        """Count the window whose last batch was yielded as used."""
        if self._settles_at is not None:
            self._consumed, self._settles_at, self._stream = self._settles_at, None, self._stream_ahead

    def stepped(self) -> None:
        """Note that an optimizer has stepped on what was yielded last."""
        self._was_stepped = True
        if self._settles_at is not None:
            self.settle()

    def _go_to(self, epoch: int, consumed: int) -> None:
        self.epoch, self._consumed, self._settles_at, self._left_out = epoch, consumed, None, 0
        self._stream = self._stream_ahead = None

    @property
    def has_stand_ins(self) -> bool:
        """Whether the last micro-step gave some rank rows that are no samples."""
        step = self.micro_step
        return step is not None and (step.padded_size != step.size or step.size < self._options.world_size)


def _opened(rounds: Iterator[Round]) -> Iterator[Round]:
    """Let the first round open its window, whose beginning has been left out."""
    for found in islice(rounds, 1):
        yield found._replace(step=found.step._replace(opens=True))
    yield from rounds


def _tail_of(loader: DataLoader[Any], options: DataOptions) -> Tail:
    stride = (loader.batch_size or 1) * options.world_size
    if loader.drop_last:
        return "drop"
    if options.tail_is_wish and options.tail == "pad" and (options.global_batch_size or stride) % stride:
        return "exact"
    return options.tail
