"""All that one run consists of, and how it goes into a checkpoint and comes back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distrib.checkpoint import Contents, Reader, open_checkpoint, rng, save
from distrib.data import PreparedDataLoader
from distrib.errors import CheckpointError
from distrib.logging import notice
from distrib.seeding import derive, part_noise_streams
from distrib.state import Runtime, TrainState
from distrib.strategies import Strategy
from distrib.training import PreparedOptimizer, PreparedScheduler


@dataclass
class RunState:
    """What has been prepared or registered, in that order."""

    models: list[nn.Module] = field(default_factory=list)
    optimizers: list[PreparedOptimizer] = field(default_factory=list)
    schedulers: list[PreparedScheduler] = field(default_factory=list)
    loaders: list[PreparedDataLoader] = field(default_factory=list)
    custom: list[Any] = field(default_factory=list)

    @property
    def step(self) -> int:
        """Optimizer steps taken since the run began, over restarts."""
        return max((optimizer.num_steps for optimizer in self.optimizers), default=0)

    def for_strategy(self) -> TrainState:
        """Return models and the users' own optimizers."""
        return TrainState(tuple(self.models), tuple(optimizer.optimizer for optimizer in self.optimizers))


def save_run(
    directory: Path,
    run: RunState,
    strategy: Strategy,
    runtime: Runtime,
    info: Mapping[str, Any],
    *,
    durable: bool,
) -> Path:
    """Write a checkpoint of the run to exactly `directory`. Collective."""
    contents = Contents(
        state=strategy.sharded_state(run.for_strategy()),
        loaders=[loader.position for loader in run.loaders],
        schedulers=[{"state": x.scheduler.state_dict(), "steps_seen": x.steps_seen} for x in run.schedulers],
        scaler=None,
        rng=rng.capture(runtime.device_backend),
        custom=[item.state_dict() for item in run.custom],
        counters={"step": run.step, "optimizer_steps": [x.num_steps for x in run.optimizers]},
        info=dict(info),
    )
    return save(directory, contents, runtime.collectives, durable=durable)


def load_run(directory: Path, run: RunState, strategy: Strategy, runtime: Runtime, *, verify: bool) -> None:
    """Bring the run to where the checkpoint in `directory` stood. Collective.

    Raises:
        CheckpointError: if it is damaged or does not fit what has been prepared; nothing is changed then.
    """
    reader = open_checkpoint(directory, runtime.collectives, verify=verify)
    _check_numbers(directory, reader, run)
    with strategy.loading(run.for_strategy(), reader.specs(), reader.objects) as state:
        reader.check(state)
        reader.fill(state)
    for loader, position in zip(run.loaders, reader.loaders, strict=True):
        loader.position = position
    for scheduler, saved in zip(run.schedulers, reader.schedulers, strict=True):
        scheduler.scheduler.load_state_dict(saved["state"])
        scheduler.steps_seen = saved["steps_seen"]
    for item, saved in zip(run.custom, reader.custom, strict=True):
        item.load_state_dict(saved)
    for optimizer, steps in zip(run.optimizers, reader.counters["optimizer_steps"], strict=True):
        optimizer.num_steps = steps
    _restore_generators(reader, runtime)


def _check_numbers(directory: Path, reader: Reader, run: RunState) -> None:
    pairs = {
        "optimizers": (len(run.optimizers), len(reader.counters["optimizer_steps"])),
        "data loaders": (len(run.loaders), len(reader.loaders)),
        "schedulers": (len(run.schedulers), len(reader.schedulers)),
        "registered objects": (len(run.custom), len(reader.custom)),
    }
    for what, (here, there) in pairs.items():
        if here != there:
            raise CheckpointError(
                "D0792",
                f"the checkpoint has {there} {what}, this run has prepared {here}",
                where=str(directory),
                fix="prepare and register the same objects, in the same order, before load_state",
            )


def _restore_generators(reader: Reader, runtime: Runtime) -> None:
    """Restore each rank's generators; at another world size noise gets streams of its own, by a stated rule.

    Python's and numpy's generators, which are equal on all ranks, come from rank 0. torch's are seeded with
    (rank 0's saved seed, "noise", step, rank), so that the same resume draws the same numbers again.
    """
    topology = runtime.topology
    if reader.world_size == topology.world_size:
        rng.restore(reader.rng(topology.rank), runtime.device_backend)
        part_noise_streams(topology.rank, None)
        return
    rng.restore(reader.rng(0), runtime.device_backend)
    part_noise_streams(topology.rank, None)
    torch.manual_seed(derive(torch.initial_seed(), "noise", reader.counters["step"], topology.rank))
    if topology.is_main:
        notice(
            f"saved at world size {reader.world_size}, resumed at {topology.world_size}: the data go on unchanged, "
            "dropout draws from new streams derived from the seed and the step"
        )
