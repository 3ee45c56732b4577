"""All that one run consists of, and how it goes into a checkpoint and comes back."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from distrib.checkpoint import Contents, Location, Reader, Saving, begin, open_checkpoint, rng
from distrib.checkpoint.adopt import adopt, is_conversion
from distrib.checkpoint.agreement import Call, check_same_call, collect, together
from distrib.checkpoint.hooks import (
    Hooks,
    Taken,
    run_load_hooks,
    run_save_hooks,
    without_models,
)
from distrib.checkpoint.pickled import packed, unpacked
from distrib.checkpoint.planner import Planner
from distrib.checkpoint.retention import METRICS
from distrib.checkpoint.staging import Arena
from distrib.collectives.base import Collectives
from distrib.data import PreparedDataLoader
from distrib.errors import CheckpointError, DataError
from distrib.logging import notice
from distrib.precision import LossScaler
from distrib.seeding import derive, part_noise_streams
from distrib.state import Runtime, TensorSpec, TrainState
from distrib.strategies import Strategy
from distrib.strategies.slices import module_prefix
from distrib.training import PreparedOptimizer, PreparedScheduler


@dataclass
class RunState:
    """What has been prepared or registered, in that order."""

    models: list[nn.Module] = field(default_factory=list)
    optimizers: list[PreparedOptimizer] = field(default_factory=list)
    schedulers: list[PreparedScheduler] = field(default_factory=list)
    loaders: list[PreparedDataLoader] = field(default_factory=list)
    custom: list[Any] = field(default_factory=list)
    scaler: LossScaler | None = None
    known: dict[int, tuple[Any, Any]] = field(
        default_factory=dict
    )  # id -> (what was given or prepared, prepared)

    def remember(self, given: Any, prepared: Any) -> None:
        """Let `prepare` of either return `prepared` from now on."""
        self.known[id(given)], self.known[id(prepared)] = (given, prepared), (prepared, prepared)

    def is_prepared(self, x: Any) -> bool:
        """Whether `prepare` has nothing more to do for `x`."""
        return id(x) in self.known

    def is_compiled_since(self, x: Any) -> bool:
        """Whether `x` is what `torch.compile` made of a prepared model."""
        inner = getattr(x, "_orig_mod", None)
        return inner is not None and self.prepared(inner) is inner and self.is_prepared(inner)

    def prepared(self, x: Any) -> Any:
        """Return what `x` was prepared to; itself, if it is prepared already."""
        return self.known[id(x)][1] if id(x) in self.known else x

    @property
    def step(self) -> int:
        """Optimizer steps taken since the run began, over restarts."""
        return max((optimizer.num_steps for optimizer in self.optimizers), default=0)

    def for_strategy(self) -> TrainState:
        """Return models and the users' own optimizers."""
        return TrainState(tuple(self.models), tuple(optimizer.optimizer for optimizer in self.optimizers))


def begin_save(
    directory: Location,
    run: RunState,
    strategy: Strategy,
    runtime: Runtime,
    info: Mapping[str, Any],
    *,
    metrics: Mapping[str, Any],
    best_metric: str | None,
    hooks: Hooks,
    durable: bool,
    allow_pickle: bool,
    arena: Arena | None,
    planner: Planner,
) -> Saving:
    """Plan a checkpoint of the run as it is now, at exactly `directory`; copied, with an `arena`. Collective."""
    state, ranks = strategy.sharded_state(run.for_strategy()), runtime.collectives
    call, taken = _call(directory, run, hooks), Taken()
    if hooks:  # which may change what is registered
        check_same_call([x for x, _ in collect(ranks, "preparing the hooks", lambda: (call, None))])
        taken = run_save_hooks(hooks, run.models, state, directory.name, ranks)

    def contents() -> Contents:
        numbers = {}
        if runtime.topology.is_main:  # whose ones are stored
            numbers = {name: float(value) for name, value in metrics.items()}
            _check_metrics(best_metric, numbers)
        custom, pickles = packed(run.custom, allow_pickle=allow_pickle, stores=runtime.topology.is_main)
        ours = without_models(state, taken.models)
        return Contents(
            state=replace(ours, tensors={**ours.tensors, **pickles}),
            loaders=[loader.position for loader in run.loaders],
            schedulers=[
                {
                    "kind": type(x.scheduler).__name__,
                    "state": x.scheduler.state_dict(),
                    "steps_seen": x.steps_seen,
                }
                for x in run.schedulers
            ],
            scaler=run.scaler.state_dict() if run.scaler else None,
            rng=rng.capture(runtime.device_backend),
            custom=custom,
            counters={
                "step": run.step,
                "readers": runtime.readers.world_size,
                "optimizer_steps": [x.num_steps for x in run.optimizers],
                METRICS: numbers,
            },
            info=dict(info),
            files=taken.files,
            file_sizes=taken.sizes,
        )

    return begin(directory, contents, ranks, call=call, durable=durable, arena=arena, planner=planner)


def _call(directory: Location, run: RunState, hooks: Hooks) -> Call:
    return Call(str(directory), len(hooks), len(run.custom))


def _check_metrics(wanted: str | None, given: Mapping[str, float]) -> None:
    """Refuse a save that does not say how good it is although the best are to be kept."""
    if wanted is not None and wanted not in given:
        raise CheckpointError(
            "D0751",
            f"the best checkpoints by {wanted!r} are to be kept, but save_state was given {sorted(given) or 'no metrics'}",
            where="checkpoint.best_metric",
            fix=f"call save_state(metrics={{{wanted!r}: value}}), or set checkpoint.keep_best: null",
        )


def load_run(
    directory: Location,
    run: RunState,
    strategy: Strategy,
    runtime: Runtime,
    *,
    hooks: Hooks,
    verify: bool,
    strict: bool = True,
    ignore: Collection[str] = (),
    allow_pickle: bool = False,
) -> dict[str, Any]:
    """Bring the run to where the checkpoint in `directory` stood. Collective.

    Args:
        directory: The checkpoint.
        run: What has been prepared.
        strategy: How it lies over the ranks.
        runtime: The ranks.
        hooks: Called before anything of the run is changed; a model that they take is left to them.
        verify: Compare checksums, not only sizes.
        strict: Whether everything has to be in both, the checkpoint and the run. A wrong shape is refused in any case.
        ignore: Shell patterns of parameters, "model/head.*", that stay as they are, with what optimizers know of them.
        allow_pickle: Whether to open the pickles of registered objects.

    Returns:
        What the checkpoint says of the run that wrote it.

    Raises:
        CheckpointError: if it is damaged or does not fit what has been prepared; nothing is changed then.
    """
    ranks = runtime.collectives
    check_same_call(ranks.gather_object(_call(directory, run, hooks)))
    with open_checkpoint(directory, ranks, verify=verify) as opened:
        names = strategy.parameter_names(run.models)
        reader = adopt(
            opened, [x.optimizer for x in run.optimizers], names, [x.scheduler for x in run.schedulers]
        )

        def prepare() -> tuple[list[Any], dict[str, Any]]:
            if strict:
                _check_parts(directory, reader, run)
            _check_positions(reader, run)
            return _custom_states(directory, run, reader, allow_pickle=allow_pickle), _generators(
                reader, runtime
            )

        custom, generators = together(ranks, "comparing the run with the checkpoint", prepare)
        theirs = run_load_hooks(hooks, run.models, reader, ranks) if hooks else ()
        prefixes = tuple(map(module_prefix, theirs))
        objects = {name: x for name, x in reader.objects.items() if not name.startswith(prefixes)}
        patterns = [*ignore, *(f"optimizer*/*.{x.partition('/')[2]}" for x in ignore if "/" in x)]
        patterns += [f"{prefix}*" for prefix in prefixes]
        with (
            strategy.loading(
                run.for_strategy(), _taken(reader.specs(), ignore), objects, strict=strict
            ) as state,
            _loaded(run, reader, custom, ranks),
        ):
            fits = reader.check(state, strict=strict, ignore=patterns, must_match=ignore)
            reader.fill(state, only=fits)
        for loader, position in zip(run.loaders, reader.loaders, strict=False):
            loader.position = position
        for scheduler, saved in zip(run.schedulers, reader.schedulers, strict=False):
            scheduler.steps_seen = saved["steps_seen"]
        for optimizer, steps in zip(run.optimizers, reader.counters["optimizer_steps"], strict=False):
            optimizer.num_steps = steps
        if run.scaler is not None and reader.scaler is not None:
            run.scaler.load_state_dict(reader.scaler)
        if generators:
            _restore_generators(generators, reader, runtime)
        return reader.info


def _custom_states(directory: Location, run: RunState, reader: Reader, *, allow_pickle: bool) -> list[Any]:
    wanted = list(reader.custom)[: len(run.custom)]
    return unpacked(wanted, reader.manifest, allow_pickle=allow_pickle, where=str(directory))


def _taken(stored: Mapping[str, TensorSpec], ignore: Collection[str]) -> dict[str, TensorSpec]:
    """Leave out the optimizer state of parameters that are ignored."""
    inner = [pattern.partition("/")[2] for pattern in ignore if "/" in pattern]
    return {
        name: spec
        for name, spec in stored.items()
        if not (
            name.startswith("optimizer")
            and any(fnmatch.fnmatchcase(name, f"optimizer*/*.{pattern}") for pattern in inner)
        )
    }


@contextmanager
def _loaded(run: RunState, reader: Reader, custom: Sequence[Any], ranks: Collectives) -> Iterator[None]:
    """Load schedulers and registered objects; if they fail on any rank, or the body does, they are as they were."""
    here = [[x.scheduler for x in run.schedulers], run.custom]
    there = [[x["state"] for x in reader.schedulers], list(custom)]
    pairs = [
        pair for parts, saved in zip(here, there, strict=True) for pair in zip(parts, saved, strict=False)
    ]
    parts, saved = [part for part, _ in pairs], [state for _, state in pairs]
    before: list[Any] = []

    def load() -> None:
        before.extend([copy.deepcopy(part.state_dict()) for part in parts])
        for part, state in zip(parts, saved, strict=True):
            part.load_state_dict(state)

    try:
        together(ranks, "loading schedulers and registered objects", load)
        yield
    except BaseException:
        for part, state in zip(parts, before, strict=False):
            part.load_state_dict(state)
        raise


def _check_positions(reader: Reader, run: RunState) -> None:
    for loader, position in zip(run.loaders, reader.loaders, strict=False):
        try:
            loader.check(position)
        except DataError as error:
            raise CheckpointError(error.code, error.problem, where=str(reader.path), fix=error.fix) from error


def _check_parts(directory: Location, reader: Reader, run: RunState) -> None:
    pairs = {
        "optimizers": (len(run.optimizers), len(reader.counters["optimizer_steps"])),
        "data loaders": (len(run.loaders), len(reader.loaders)),
        "schedulers": (len(run.schedulers), len(reader.schedulers)),
        "registered objects": (len(run.custom), len(reader.custom)),
    }
    if is_conversion(reader.manifest):
        del pairs["data loaders"]  # other programs' positions are not taken over: the loaders begin anew
    for what, (here, there) in pairs.items():
        if here != there:
            raise CheckpointError(
                "D0792",
                f"the checkpoint has {there} {what}, this run has prepared {here}",
                where=str(directory),
                fix="prepare and register the same objects, in the same order, before load_state",
            )
    for scheduler, saved in zip(run.schedulers, reader.schedulers, strict=True):
        if type(scheduler.scheduler).__name__ != saved["kind"]:
            raise CheckpointError(
                "D0793",
                f"a scheduler is of class {type(scheduler.scheduler).__name__}, the checkpoint has the state of a "
                f"{saved['kind']}",
                where=str(directory),
                fix="build the scheduler of the saved run",
            )


def _generators(reader: Reader, runtime: Runtime) -> dict[str, Any]:
    """Return the stored generators for this rank: its own, or rank 0's at another world size; none of a conversion."""
    if is_conversion(reader.manifest):
        return {}
    return reader.rng(runtime.topology.rank if _is_same_world(reader, runtime) else 0)


def _is_same_world(reader: Reader, runtime: Runtime) -> bool:
    readers = reader.counters.get("readers", reader.world_size)
    return (reader.world_size, readers) == (runtime.topology.world_size, runtime.readers.world_size)


def _restore_generators(stored: Mapping[str, Any], reader: Reader, runtime: Runtime) -> None:
    """Restore each rank's generators; at another world size noise gets streams of its own, by a stated rule.

    Python's and numpy's generators, which are equal on all ranks, come from rank 0. torch's are seeded with
    (rank 0's saved seed, "noise", step, rank), so that the same resume draws the same numbers again.
    """
    rng.restore(stored, runtime.device_backend)
    part_noise_streams(runtime.readers.rank, None)
    if _is_same_world(reader, runtime):
        return
    torch.manual_seed(derive(torch.initial_seed(), "noise", reader.counters["step"], runtime.readers.rank))
    if runtime.topology.is_main:
        notice(
            f"saved at world size {reader.world_size}, resumed at {runtime.topology.world_size}: the data go on "
            "unchanged, dropout draws from new streams derived from the seed and the step"
        )
