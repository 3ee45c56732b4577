"""A model cut into stages that lie on different ranks (`mesh.pipeline`): which units are where, and what stays in memory.

The model stays the user's own object with all its names. What belongs to other ranks has no memory: its parameters and
buffers are on torch's meta device, so shapes, optimizers' groups and names are those of the whole model on every rank.
How a batch runs through the stages is in `pipeline_run`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property, partial
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from distrib.collectives.base import Collectives
from distrib.errors import NotBuiltError, StrategyError
from distrib.precision import apply_precision
from distrib.state import Runtime, ShardedState
from distrib.strategies.pipeline_plan import Schedule, deal
from distrib.strategies.slices import listed, module_prefix, optimizer_prefix, plain_name

_PARTS_PER_RANK = 4  # with 4 x ranks microbatches ranks idle little: Huang et al. 2019, arXiv:1811.06965, 2.3


class Stage(nn.Module):
    """Consecutive units of a model; each is given what the one before returned.

    Attributes:
        index: Its number in the pipeline.
        is_last: Whether it returns the model's output.
    """

    def __init__(self, index: int, units: Sequence[nn.Module], *, is_last: bool) -> None:
        super().__init__()
        self.index, self.is_last = index, is_last
        self.units = nn.ModuleList(units)

    def forward(self, x: Any) -> Any:
        """Return what the last unit makes of `x`."""
        for unit in self.units:
            x = unit(x)
        return x


@dataclasses.dataclass(frozen=True)
class PipelineOptions:
    """The section `pipeline` of the configuration."""

    schedule: Schedule = "1f1b"
    microbatches: int | None = None
    stages_per_rank: int = 1


class Pipelining:
    """How models are cut along `mesh.pipeline`.

    Args:
        runtime: The run.
        options: Those of the strategy.

    Attributes:
        peers: The ranks that hold the other stages of what this rank holds a part of; they read the same samples.
        members: Their global ranks.

    Raises:
        StrategyError: D0841, if settings do not go together with stages.
    """

    _WHOLE: ClassVar[Mapping[str, tuple[Callable[[Any], bool], str]]] = {
        "sync_batchnorm": (lambda x: x is True, "statistics are exchanged by all ranks at once"),
        "compile": (lambda x: bool(x) and x["scope"] == "model", "there is no whole model to compile"),
    }

    def __init__(self, runtime: Runtime, options: Mapping[str, Any]) -> None:
        self.runtime = runtime
        self.options = PipelineOptions(**options.get("pipeline", {}))
        self._check(options)
        groups = runtime.mesh.groups("pipeline")
        self.members = next(group for group in groups if runtime.topology.rank in group)
        self.peers: Collectives = runtime.collectives.among(groups)

    @property
    def ranks(self) -> int:
        """How many ranks hold one model."""
        return len(self.members)

    @property
    def stages(self) -> int:
        """How many stages a model is cut into."""
        return self.ranks * self.options.stages_per_rank

    @property
    def microbatches(self) -> int:
        """How many parts a batch is cut into, where it has that many rows."""
        return self.options.microbatches or _PARTS_PER_RANK * self.ranks

    def cut(self, model: nn.Module) -> Cut:
        """Decide which units are where, the same on all ranks; no memory is touched.

        Raises:
            StrategyError: D0842, if the model cannot be cut.
        """
        return Cut(self, model)

    def _check(self, options: Mapping[str, Any]) -> None:
        for name, (is_whole, why) in self._WHOLE.items():
            if is_whole(options.get(name)):
                raise StrategyError(
                    "D0841",
                    f"{name} does not go together with mesh.pipeline: {why}",
                    where=name,
                    fix=f"remove {name}" if name != "compile" else "set compile.scope: blocks",
                )
        several = self.options.stages_per_rank > 1
        if several != (self.options.schedule == "interleaved_1f1b"):
            raise StrategyError(
                "D0841",
                f"pipeline.schedule is {self.options.schedule}, but pipeline.stages_per_rank is "
                f"{self.options.stages_per_rank}; expected "
                + ("1" if several else "at least 2, since it interleaves the stages of a rank"),
                where="pipeline.stages_per_rank",
                fix="set pipeline.schedule: interleaved_1f1b"
                if several
                else "set pipeline.stages_per_rank: 2",
            )


class Cut:
    """One model, cut into stages.

    Attributes:
        model: The user's own.
        stages: Those of this rank, by ascending number.
        layout: The line that says what is where.
        dtype: What losses are added up in.
    """

    def __init__(self, pipelining: Pipelining, model: nn.Module) -> None:
        self.pipelining, self.model = pipelining, model
        if hasattr(model, "_orig_mod"):
            raise _uncuttable(
                model, "it is compiled as a whole", "give prepare the plain model; set compile.scope: blocks"
            )
        units = units_of(model)
        _refuse_what_is_outside(model, units)
        if len(units) < pipelining.stages:
            raise _uncuttable(
                model,
                f"it has {len(units)} units, but mesh.pipeline ({pipelining.ranks}) x pipeline.stages_per_rank "
                f"({pipelining.options.stages_per_rank}) asks for {pipelining.stages} stages",
                "take fewer stages, or return more units from pipeline_units()",
            )
        modules = [module for _, module in units]
        dealt = deal(_new_bytes(modules), pipelining.stages)
        _refuse_tied(model, [[modules[i] for i in part] for part in dealt])
        rank = pipelining.peers.rank
        own = range(rank, pipelining.stages, pipelining.ranks)
        self.stages = [
            Stage(index, [modules[i] for i in dealt[index]], is_last=index == pipelining.stages - 1)
            for index in own
        ]
        is_double = any(x.dtype is torch.float64 for x in model.parameters())
        self.dtype = torch.float64 if is_double else torch.float32
        self.layout = _layout(model, [[modules[i] for i in part] for part in dealt], pipelining)
        inside = {id(module) for stage in self.stages for module in stage.units.modules()}
        names = [(name, id(x)) for name, x in model.named_modules(remove_duplicate=False)]
        self._prefixes = tuple(f"{plain_name(name)}." for name, key in names if name and key in inside)
        vars(model)["_apply"] = self._apply  # what has no memory cannot be moved or converted
        self._apply_precision()

    def _apply_precision(self) -> None:
        """Let the stages compute as the model would; only the last one widens what it returns."""
        policy = self.pipelining.runtime.precision
        for stage in self.stages:
            wide = policy.output if stage.is_last else policy.compute
            own = dataclasses.replace(policy, param=None, fp32_modules=(), output=wide)
            apply_precision(stage, own, self.pipelining.runtime.device)

    def holds(self, name: str) -> bool:
        """Whether a name of the plain model's state dict, or of a parameter, belongs to a stage of this rank."""
        return name.startswith(self._prefixes)

    def owner_of(self, name: str) -> int:
        """Return which of the peers holds a name. Collective, once."""
        return next(
            rank for rank, prefixes in enumerate(self._everyones_prefixes) if name.startswith(prefixes)
        )

    @cached_property
    def _everyones_prefixes(self) -> list[tuple[str, ...]]:
        return self.pipelining.peers.gather_object(self._prefixes)

    def keep_own_part(self, *, moves: bool) -> None:
        """Take memory from all that only stages of other ranks use, and refuse the model's own forward.

        Args:
            moves: Whether the own stages still have to be moved to the rank's device.
        """
        if moves:
            for stage in self.stages:
                stage.to(self.pipelining.runtime.device)
        kept = {id(x) for stage in self.stages for x in chain(stage.parameters(), stage.buffers())}
        empty: dict[int, Tensor] = {}  # tied ones stay tied
        for module in self.model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, x in tensors.items():
                    if x is not None and id(x) not in kept:
                        tensors[name] = empty.setdefault(id(x), _without_memory(x))  # type: ignore[assignment]
        self.model.forward = partial(_refuse_forward, type(self.model).__name__)
        vars(self.model).update(zero_grad=self._zero_grad, __deepcopy__=_refuse_copy)

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:  # noqa: FBT001, FBT002 (torch's signature)
        for stage in self.stages:
            stage._apply(function, recurse)  # type: ignore[no-untyped-call]
        return self.model

    def _zero_grad(self, set_to_none: bool = True) -> None:  # noqa: FBT001, FBT002 (torch's signature)
        for stage in self.stages:
            stage.zero_grad(set_to_none)


def forget_state_of_others(optimizer: Optimizer) -> None:
    """Drop what an optimizer knows of parameters that other ranks hold."""
    for parameter in [x for x in optimizer.state if x.is_meta]:
        del optimizer.state[parameter]


@contextmanager
def loading_own_part(
    loading: AbstractContextManager[ShardedState], optimizers: Sequence[Optimizer]
) -> Iterator[ShardedState]:
    """Return the context of a load that leaves optimizers with state of their own parameters only."""
    try:
        with loading as state:
            yield state
    finally:
        for optimizer in optimizers:
            forget_state_of_others(optimizer)


def own_part(state: ShardedState, models: Sequence[Cut], optimizers: int) -> ShardedState:
    """Leave out tensors and objects that belong to stages of other ranks; groups of optimizers stay whole."""
    prefixes = [module_prefix(i) for i in range(len(models))]
    of_optimizers = tuple(optimizer_prefix(i) for i in range(optimizers))

    def held(name: str) -> bool:
        if name.startswith(of_optimizers):
            parameter = name.partition("/")[2].partition(".")[2]  # after the key of the state
            return _holds_parameter(models, parameter)
        index = next((i for i, prefix in enumerate(prefixes) if name.startswith(prefix)), None)
        return index is None or models[index].holds(name.removeprefix(prefixes[index]))

    objects = {}
    for name, value in state.objects.items():
        if f"{name}/" in of_optimizers:
            mine = {x: y for x, y in value["state"].items() if _holds_parameter(models, x)}
            objects[name] = {**value, "state": mine}
        elif held(name):
            objects[name] = value
    tensors = {name: parts for name, parts in state.tensors.items() if held(name)}
    return ShardedState(tensors, objects, state.aliases)


def _holds_parameter(models: Sequence[Cut], name: str) -> bool:
    """Whether this rank holds a parameter, by its name among those of all models (`slices.parameter_names`)."""
    for index in range(len(models) - 1, 0, -1):
        if name.startswith(f"model_{index}."):
            return models[index].holds(name.partition(".")[2])
    return bool(models) and (models[0].holds(name) or name.startswith("param_groups."))


def whole_state_dict(cut: Cut, own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the model's state dict from what the peers hold of it, on each of them. Collective.

    Args:
        cut: The model.
        own: Its state dict with whole tensors where this rank has the stage.
    """
    peers, device, found = cut.pipelining.peers, cut.pipelining.runtime.device, dict(own)
    for name, value in own.items():
        key = plain_name(name)
        source = cut.owner_of(key)
        if not isinstance(value, Tensor):
            found[name] = peers.broadcast_object(value, source)
            continue
        mine = value.detach() if cut.holds(key) else torch.empty_like(value, device=device)
        found[name] = peers.broadcast(mine, source)
    return found


def units_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return what a model can be cut between, in the order in which it computes.

    That is what its method `pipeline_units()` returns; else the children of an `nn.Sequential`, and in their places
    those of children that are such themselves.

    Returns:
        (name in the model, module).

    Raises:
        StrategyError: D0842.
    """
    own = getattr(model, "pipeline_units", None)
    if callable(own):
        names = {id(module): name for name, module in model.named_modules()}
        units = list(own())
        for unit in units:
            if not isinstance(unit, nn.Module) or not names.get(id(unit)):
                raise _uncuttable(
                    model,
                    f"its pipeline_units() returns {_shown(unit)}, which is not a module inside of it",
                    "return the model's own modules in the order in which they compute",
                )
        return [(names[id(unit)], unit) for unit in units]
    if not _is_plain_sequence(model):
        raise _uncuttable(
            model,
            "it is no plain nn.Sequential and has no method pipeline_units()",
            "give it a method pipeline_units() that returns its modules in order, each taking what the one before "
            "returns",
        )
    if _has_hooks(model):
        raise _uncuttable(
            model, "it has hooks of its own, which no stage would call", "register them on its units instead"
        )
    return list(_flattened(model))


def _flattened(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in model._modules.items():
        if child is None:
            continue
        if _is_plain_sequence(child) and not _has_hooks(child):
            yield from ((f"{name}.{inner}", x) for inner, x in child._modules.items() if x is not None)
        else:
            yield name, child


def _is_plain_sequence(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _has_hooks(module: nn.Module) -> bool:
    return any(
        (module._forward_pre_hooks, module._forward_hooks, module._backward_hooks, module._backward_pre_hooks)
    )


def _shown(unit: object) -> str:
    return type(unit).__name__ if isinstance(unit, nn.Module) else repr(unit)[:80]


def _new_bytes(modules: Sequence[nn.Module]) -> list[int]:
    """Return the bytes of each module's parameters; what a module before has already counts nothing."""
    seen: set[int] = set()
    found = []
    for module in modules:
        new = [x for x in module.parameters() if id(x) not in seen]
        found.append(sum(x.numel() * x.element_size() for x in new))
        seen.update(map(id, new))
    return found


def _refuse_what_is_outside(model: nn.Module, units: Sequence[tuple[str, nn.Module]]) -> None:
    inside = {id(x) for _, unit in units for x in chain(unit.parameters(), unit.buffers())}
    named = chain(model.named_parameters(), model.named_buffers())
    if outside := [name for name, x in named if id(x) not in inside]:
        raise _uncuttable(
            model,
            f"{listed(outside)} {'is' if len(outside) == 1 else 'are'} in none of its units",
            "put them into modules that are units",
        )


def _refuse_tied(model: nn.Module, stages: Sequence[Sequence[nn.Module]]) -> None:
    places: dict[int, set[int]] = {}
    for index, units in enumerate(stages):
        for unit in units:
            for parameter in unit.parameters():
                places.setdefault(id(parameter), set()).add(index)
    named = model.named_parameters(remove_duplicate=False)
    if tied := [name for name, x in named if len(places[id(x)]) > 1]:
        raise _uncuttable(
            model,
            f"{listed(tied)} are tied, but would lie in different stages",
            "untie them, or take mesh.shard instead of mesh.pipeline",
        )


def _layout(model: nn.Module, stages: Sequence[Sequence[nn.Module]], pipelining: Pipelining) -> str:
    numbers = ", ".join(str(len(units)) for units in stages)
    sizes = ", ".join(f"{sum(_new_bytes(units)):,}" for units in stages)
    return (
        f"pipeline: {type(model).__name__} over {pipelining.ranks} ranks in stages of {numbers} units ({sizes} bytes); "
        f"{pipelining.options.schedule}, up to {pipelining.microbatches} microbatches"
    )


def _without_memory(x: Tensor) -> Tensor:
    empty = torch.empty_like(x.detach(), device="meta")
    return nn.Parameter(empty, x.requires_grad) if isinstance(x, nn.Parameter) else empty


def _refuse_forward(kind: str, *_: Any, **__: Any) -> Any:
    raise StrategyError(
        "D0843",
        f"{kind} is cut into stages on several ranks, none of which can run its forward",
        fix="call accelerator.pipeline_step(model, inputs, targets, loss_function) for training and evaluation, or "
        "accelerator.pipeline_forward(model, inputs) for outputs",
    )


def _refuse_copy(_: Any) -> Any:
    raise not_whole("a copy of a model (AveragedModel)")


def refuse_backward() -> StrategyError:
    """Return the error of `backward` where models are cut."""
    return StrategyError(
        "D0843",
        "backward(loss) cannot reach the stages that lie on other ranks (mesh.pipeline)",
        fix="call accelerator.pipeline_step(model, inputs, targets, loss_function), which runs forward and backward",
    )


def not_whole(what: str) -> NotBuiltError:
    """Return the error of what needs the whole model on one rank."""
    return NotBuiltError(f"{what} with mesh.pipeline", fix="take whole tensors from get_state_dict(model)")


def _uncuttable(model: nn.Module, why: str, fix: str) -> StrategyError:
    return StrategyError("D0842", f"{type(model).__name__} cannot be cut into stages: {why}", fix=fix)
