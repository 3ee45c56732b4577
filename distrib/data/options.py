"""What the run says about data, and what a source hands over for each micro-step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from distrib.collectives.base import Collectives
from distrib.data.sharding import MicroStep, Share, Tail
from distrib.devices.base import DeviceBackend


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
        collectives: How the ranks agree where arithmetic does not tell.
        device_backend: How batches get to the device.
        prefetch: Batches that are moved to the device ahead of time.
        dispatch: Whether rank 0 reads for all.
        tail_is_wish: Whether a tail of "pad" gives way to "exact" where the global batch does not divide.
        is_distributed: Whether the loader's stream is this rank's own already; None finds out.
    """

    rank: int
    world_size: int
    device: torch.device
    tail: Tail
    seed: int
    global_batch_size: int | None
    accumulation: int
    collectives: Collectives
    device_backend: DeviceBackend
    prefetch: int = 2
    dispatch: bool = False
    tail_is_wish: bool = False
    is_distributed: bool | None = None


class Round(NamedTuple):
    """One micro-step as a source hands it over.

    Attributes:
        step: The micro-step, in units of the source.
        shares: Part in samples of each rank that is read for.
        weights: Weight of each one's mean loss, so that the average over ranks, added up, is the window's mean.
        batches: Batch of each one.
        correction: Factor on the window's gradients if it turned out shorter than the weights assumed.
        state: What resumes a stream after the micro-step, if its data set has a `state_dict`.
        last: Whether the epoch is known to end here.
    """

    step: MicroStep
    shares: tuple[Share, ...]
    weights: tuple[float, ...]
    batches: list[Any]
    correction: float = 1.0
    state: Any = None
    last: bool = False
