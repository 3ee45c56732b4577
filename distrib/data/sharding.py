"""Which samples meet in a step and which rank computes them: pure arithmetic over positions of the epoch's order.

A *window* is one global batch: the positions whose gradients make one optimizer step. It is cut into *micro-steps*
of consecutive positions, and each micro-step is cut contiguously over the ranks. World size, micro-batch size and
accumulation change the cuts inside a window, never the windows.

What is counted is a *unit*: a sample, or a whole batch where the user's own batch sampler makes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from distrib.errors import ConfigError

Tail = Literal["exact", "pad", "drop"]


class MicroStep(NamedTuple):
    """One forward and backward pass over all ranks.

    Attributes:
        start: First position.
        size: Number of true units over all ranks.
        window_size: True units of the window it belongs to.
        window_stop: First position after that window.
        closes: Whether it is the last of its window.
        padded_size: Rows over all ranks after padding; equals `size` unless the tail is padded.
        padded_window: Rows of the whole window after padding.
        opens: Whether it is the first of its window.
    """

    start: int
    size: int
    window_size: int
    window_stop: int
    closes: bool
    padded_size: int
    padded_window: int
    opens: bool


class Share(NamedTuple):
    """One rank's part of a micro-step.

    Attributes:
        start: First position.
        size: True units, 0 for a rank that is left with nothing.
        rows: Rows of the batch the model sees: `size`, more with padding, 1 for a stand-in.
    """

    start: int
    size: int
    rows: int


def share_of(step: MicroStep, rank: int, world_size: int) -> Share:
    """Cut a micro-step contiguously: sizes differ by at most one, larger first."""
    base, extra = divmod(step.size, world_size)
    if not extra and base and step.padded_size == step.size:
        return Share(step.start + rank * base, base, base)
    size = base + (rank < extra)
    start = step.start + rank * base + min(rank, extra)
    if step.padded_size != step.size:
        return Share(start, size, step.padded_size // world_size)
    return Share(start if size else step.start, size, max(size, 1))


@dataclass(frozen=True)
class Layout:
    """How an epoch of `samples` units is cut.

    Attributes:
        samples: Units of the data set.
        global_batch_size: Units of a window (G).
        micro_batch_size: Units of a full batch on one rank.
        world_size: Ranks that read different units.
        tail: What happens to the last, shorter window and micro-step.

    Raises:
        ConfigError: for tail "pad", if G is no multiple of world size x micro-batch.
    """

    samples: int
    global_batch_size: int
    micro_batch_size: int
    world_size: int
    tail: Tail = "exact"

    def __post_init__(self) -> None:
        if self.tail == "pad" and self.global_batch_size % self.stride:
            below = max(self.global_batch_size // self.stride, 1) * self.stride
            raise ConfigError(
                "D0120",
                f"data.tail: pad needs full micro-batches, but the global batch of {self.global_batch_size} is no "
                f"multiple of {self.world_size} ranks x {self.micro_batch_size} samples = {self.stride}",
                where="global_batch_size",
                fix=f"use {below} or {below + self.stride}, or data.tail: exact",
            )

    @property
    def stride(self) -> int:
        """Units of a full micro-step over all ranks."""
        return self.world_size * self.micro_batch_size

    @property
    def stop(self) -> int:
        """First position that the epoch does not reach."""
        if self.tail == "drop":
            return self.samples - self.samples % self.global_batch_size
        return self.samples

    def windows_from(self, start: int) -> tuple[int, int]:
        """Return how many full windows follow position `start`, a window's boundary, and the units of a short last one."""
        full, left = divmod(max(self.samples - start, 0), self.global_batch_size)
        return full, 0 if self.tail == "drop" else left

    def count(self, start: int = 0) -> int:
        """Return the number of micro-steps from position `start`: batches that every rank gets."""
        full, left = self.windows_from(start)
        return full * -(-self.global_batch_size // self.stride) + -(-left // self.stride)

    def window_of(self, micro_step: int) -> tuple[int, int]:
        """Return where the window of the epoch's micro-step of this index starts, and how many of it come before that one.

        The epoch's end and 0, if the epoch has fewer.
        """
        window, inside = divmod(micro_step, -(-self.global_batch_size // self.stride))
        start = window * self.global_batch_size
        is_there = start + inside * self.stride < self.stop
        return (start, inside) if is_there else (self.stop, 0)

    def window(self, start: int, size: int) -> list[MicroStep]:
        """Return the micro-steps of one window of `size` units."""
        stride, stop, padded = self.stride, start + size, size
        if size <= stride and self.tail != "pad":
            return [MicroStep(start, size, size, stop, True, size, size, True)]
        if self.tail == "pad":
            padded = -(-size // stride) * stride
        steps = []
        for at in range(start, stop, stride):
            left = min(stride, stop - at)
            rows = stride if self.tail == "pad" else left
            steps.append(MicroStep(at, left, size, stop, at + left == stop, rows, padded, at == start))
        return steps
