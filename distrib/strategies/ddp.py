"""Replicas on every rank, gradients averaged while they are computed (torch's DistributedDataParallel)."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Final

import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import DebugLevel, _register_comm_hook, get_debug_level, set_debug_level
from torch.autograd import Variable
from torch.autograd.graph import get_gradient_edge
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel
from torch.utils.weak import WeakIdKeyDictionary

from distrib.collectives.base import Collectives
from distrib.collectives.trees import tensors
from distrib.errors import StrategyError
from distrib.logging import notice
from distrib.state import Runtime, ShardedState, TensorSpec, TrainState
from distrib.strategies import batchnorm, ddp_hooks, slices
from distrib.strategies.base import Capabilities, StepResult
from distrib.strategies.placing import root_of, spread_buffers
from distrib.strategies.single import Single

_SPENT: Final = "spent"  # true, as DDP wants it; see DDP.backward
_POWERSGD: Final = "ddp_powersgd"  # name in a checkpoint
_BUCKETING: Final = ("bucket_cap_mb", "gradient_as_bucket_view")  # given on to torch
_UNFINISHED = re.compile(r"Parameters which did not receive grad for rank \d+: (.*)")
_TWICE = re.compile(r"Parameter at index \d+ with name (\S+) has been marked as ready twice")
_STEPPED = StepResult(stepped=True)


class DDP(Single):
    """torch's DistributedDataParallel around each model that has something to train."""

    capabilities: ClassVar[Capabilities] = Capabilities(("cpu", "cuda", "xpu"), axes=("replicate", "context"))

    def __init__(self, runtime: Runtime, options: Mapping[str, object]) -> None:
        super().__init__(runtime, options)
        self._looks = options.get("find_unused_parameters", "auto")
        self._static = options.get("static_graph") is True
        self._hook = str(options.get("comm_hook", "none"))
        self._bucketing: dict[str, Any] = {key: options[key] for key in _BUCKETING if key in options}
        if self._hook == "none" and runtime.precision.reduce is not None:
            self._hook = next(name for name, x in ddp_hooks.FORMATS.items() if x is runtime.precision.reduce)
        self._batch_norms = batchnorm.BatchNorms(runtime, synchronize=options.get("sync_batchnorm") is True)
        self._alone = runtime.collectives.world_size == 1
        self._wrapped: list[weakref.ref[DistributedDataParallel]] = []
        self._first_steps: weakref.WeakKeyDictionary[nn.Module, FirstStep] = weakref.WeakKeyDictionary()
        self._power_sgd: weakref.WeakKeyDictionary[nn.Module, PowerSGDState] = weakref.WeakKeyDictionary()
        self._averaged = WeakIdKeyDictionary()
        self._not_averaged_of: dict[int, tuple[int, list[nn.Parameter]]] = {}  # by id of the optimizer
        self._guards: list[Any] = []  # handles of forward hooks that are there until the first step
        self._said: set[str] = set()
        if self._static and self._looks is True:
            raise StrategyError(
                "D0807",
                "ddp.static_graph and ddp.find_unused_parameters are both true, but a static graph finds unused "
                "parameters once, in the first step",
                fix="remove ddp.find_unused_parameters",
            )

    def prepare(self, state: TrainState) -> TrainState:
        if not self._alone:
            for model in filter(_is_trained, state.models):
                self._batch_norms.see_to(model)
        state = super().prepare(state)
        self._not_averaged_of.clear()  # a model that comes now may have what was in none before
        return replace(state, models=tuple(map(self._wrap, state.models)))

    def prepare_for_evaluation(self, model: nn.Module) -> nn.Module:
        model = self.place(model)
        with torch.no_grad():
            values = {name: x for name, x in model.state_dict().items() if isinstance(x, torch.Tensor)}
            for name, value in self.runtime.collectives.broadcast(values).items():
                values[name].copy_(value)
        return model

    def gradient_sync(self, models: Sequence[nn.Module], *, enabled: bool) -> AbstractContextManager[None]:
        wrapped = [x for x in map(_wrapper, models) if x is not None]
        return nullcontext() if enabled or not wrapped else _NoSync(wrapped)

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients; averaged in every backward of a micro-step that synchronizes, not in its first only.

        DDP averages once per forward. After that, a second loss of the same micro-step would add gradients that
        differ between ranks, in silence. So a model is marked as spent, which its next forward undoes, and one that
        is still spent averages once more if the loss reaches it.
        """
        averaging: list[Any] = []
        spent: list[DistributedDataParallel] = []
        for reference in self._wrapped:
            model: Any = reference()
            if model is not None and model.require_backward_grad_sync:
                averaging.append(model)
                if model.require_forward_param_sync is _SPENT:
                    spent.append(model)
        hook = loss.register_hook(partial(_average_again, spent, loss)) if spent else None  # type: ignore[no-untyped-call]
        try:
            loss.backward()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            if "mark a variable ready only once" in str(error):
                raise _reached_twice(str(error)) from error
            raise
        if hook is not None:
            hook.remove()
        for model in averaging:
            vars(model)["require_forward_param_sync"] = _SPENT

    def step(self, optimizer: Optimizer) -> StepResult:
        for reference in self._wrapped:
            model: Any = reference()
            if model is not None:
                try:
                    model.reducer._check_reducer_finalized()
                except RuntimeError as error:
                    raise self._not_averaged(model, str(error)) from error
        while self._guards:
            self._guards.pop().remove()
        num_groups, outside = self._not_averaged_of.get(id(optimizer), (0, []))
        if num_groups != len(optimizer.param_groups) and not self._alone:
            outside = self._outside_of_models(optimizer)
        if outside:
            _refuse_gradients(outside, optimizer)
        optimizer.step()
        return _STEPPED

    def sharded_state(self, state: TrainState) -> ShardedState:
        self._spread_buffers(state.models)
        steps = [self._power_sgd[model].iter for model in state.models if model in self._power_sgd]
        own = ShardedState({}, {_POWERSGD: steps} if steps else {})
        return slices.joined([super().sharded_state(state), own])

    @contextmanager
    def loading(
        self,
        state: TrainState,
        stored: Mapping[str, TensorSpec],
        objects: Mapping[str, Any],
        *,
        strict: bool = True,
    ) -> Iterator[ShardedState]:
        with super().loading(state, stored, objects, strict=strict) as own:
            yield own
        hooks = [self._power_sgd[model] for model in state.models if model in self._power_sgd]
        for hook, steps in zip(hooks, objects.get(_POWERSGD, [0] * len(hooks)), strict=False):
            ddp_hooks.resume_power_sgd(hook, steps)

    @contextmanager
    def gathered(self, model: nn.Module) -> Iterator[nn.Module]:
        self._spread_buffers([model])
        with super().gathered(model) as plain:
            yield plain

    def unwrap(self, model: nn.Module) -> nn.Module:
        wrapped = _wrapper(model)
        return model if wrapped is None else wrapped.module

    def join_uneven_inputs(self, models: Sequence[nn.Module]) -> AbstractContextManager[None]:
        """Return a context in which a rank may run out of batches before others: it takes part without gradients.

        Raises:
            StrategyError: D0810, for models that talk in ways that torch's `Join` does not know.
        """
        wrapped = [x for x in map(_wrapper, models) if x is not None]
        for model in wrapped:
            if model.static_graph or batchnorm.is_synchronized(model):
                what = "ddp.static_graph" if model.static_graph else "synchronized BatchNorm"
                raise StrategyError(
                    "D0810",
                    f"join_uneven_inputs cannot be used with {what}: a rank without batches would be waited for",
                    fix="leave one of the two out, or give every rank the same number of batches",
                )
            if model in self._first_steps:
                self._first_steps[model].give_up(model)
        return Join(list(wrapped)) if wrapped else nullcontext()

    def _wrap(self, model: nn.Module) -> nn.Module:
        if self._alone:
            return model
        if not _is_trained(model) or isinstance(model, AveragedModel):  # an average follows what is trained
            return self.prepare_for_evaluation(model)
        device = self.runtime.device
        with _names_in_errors():
            wrapped = DistributedDataParallel(
                model,
                device_ids=None if device.type == "cpu" else [device.index],
                find_unused_parameters=self._looks is True,
                static_graph=self._static,
                **self._bucketing,
            )
        if not self._static:  # so that a first loss is averaged that comes from a method of the model within
            vars(wrapped)["require_forward_param_sync"] = _SPENT
        if self._hook != "none":
            self._compress(wrapped)
        if self._looks == "auto" and not self._static:
            is_main = self.runtime.topology.is_main
            self._first_steps[wrapped] = FirstStep(wrapped, self.runtime.collectives, say=is_main)
        self._averaged.update({x: True for x in model.parameters() if x.requires_grad})
        self._guards.append(wrapped.register_forward_pre_hook(self._guard))
        self._wrapped = [x for x in self._wrapped if x() is not None] + [weakref.ref(wrapped)]
        return wrapped

    def _outside_of_models(self, optimizer: Optimizer) -> list[nn.Parameter]:
        """Return the optimizer's parameters whose gradients nothing averages; found anew when it gets a group."""
        outside = [x for group in optimizer.param_groups for x in group["params"] if x not in self._averaged]
        self._not_averaged_of[id(optimizer)] = len(optimizer.param_groups), outside
        return outside

    def _compress(self, model: DistributedDataParallel) -> None:
        if self._hook == "powersgd" and (sparse := ddp_hooks.sparse_modules(model.module)):
            raise StrategyError(
                "D0809",
                f"ddp.comm_hook powersgd cannot compress the sparse gradients of {slices.listed(sparse)}",
                fix="make these embeddings with sparse=False, or take fp16 or bf16, which leave them as they are",
            )
        if (names := ddp_hooks.left_alone(model.module, self._hook)) and self._hook != "fp32":
            self._say_once(
                f"ddp.comm_hook {self._hook}: only dense float32 gradients are compressed, not those of {slices.listed(names)}"
            )
        state = ddp_hooks.register_hook(model, self._hook)
        if state is not None:
            self._power_sgd[model] = state

    def _spread_buffers(self, models: Sequence[nn.Module]) -> None:
        """Give every rank rank 0's buffers, as the next forward would. Collective."""
        wrapped = [x for x in models if isinstance(x, DistributedDataParallel)]
        spread_buffers(wrapped, self.runtime.collectives)

    def _guard(self, model: nn.Module, _: Any) -> None:
        """Raise at the next forward, as torch does but in our form, in a loop whose steps are not ours."""
        assert isinstance(model, DistributedDataParallel)
        if torch.is_grad_enabled():
            try:
                model.reducer._check_reducer_finalized()
            except RuntimeError as error:
                raise self._not_averaged(model, str(error)) from error

    def _not_averaged(self, model: DistributedDataParallel, said: str) -> StrategyError:
        found = _UNFINISHED.search(said)
        names = slices.listed(found[1].split(", ")) if found else "some parameters"
        return StrategyError(
            "D0806",
            f"the last backward gave no gradient to {names} on this rank, so the ranks could not average",
            fix=self._how_to_average(model),
        )

    def _how_to_average(self, model: DistributedDataParallel) -> str:
        if model.static_graph:
            return "set ddp.static_graph: false: this step uses other parameters than the first one"
        if self._looks is False:
            return "set ddp.find_unused_parameters: auto, or freeze what is never used with requires_grad_(False) before prepare"
        first = self._first_steps.get(model)
        if first is not None and first.all_used:
            return "set ddp.find_unused_parameters: true: the first step used them all, so the run stopped looking"
        return (
            "call the prepared model, not the one inside, and let forward return its tensors in lists, tuples or dicts, "
            "where unused parameters are looked for"
        )

    def _say_once(self, text: str) -> None:
        if self.runtime.topology.is_main and text not in self._said:
            self._said.add(text)
            notice(text)


class FirstStep:
    """Finds out, in the first backward that averages gradients, whether every rank uses every parameter.

    Until then DDP runs as it does without looking for unused parameters, which costs nothing. What that backward has
    not reached is handed in at its end, so that the averages are complete. If every rank has used everything, DDP
    stays as it is; else its reducer is replaced by one that looks in every step.

    Args:
        model: The wrapped model; only its forward hooks refer to this object.
        collectives: Over which the ranks agree, once.
        say: Whether this rank tells what was found.
    """

    def __init__(self, model: DistributedDataParallel, collectives: Collectives, *, say: bool) -> None:
        self.all_used: bool | None = None  # not known yet
        self._collectives, self._say = collectives, say
        self._parameters, self._is_sparse = model._build_params_for_reducer()  # type: ignore[no-untyped-call]
        self._names = model._build_debug_param_to_name_mapping(self._parameters)  # type: ignore[no-untyped-call]
        self._ready_before: list[int] = []
        self._is_queued = False
        self._hook = model.register_forward_hook(self._watch)

    def give_up(self, model: DistributedDataParallel) -> None:
        """Look in every step without having found out whether that is needed."""
        if self.all_used is None:
            self._decide(model, all_used=False)

    def _watch(self, model: nn.Module, _: Any, output: Any) -> None:
        assert isinstance(model, DistributedDataParallel)
        if torch.is_grad_enabled() and model.require_backward_grad_sync:
            self._is_queued = False
            self._ready_before = model.reducer.get_backward_stats()
            for x in tensors(output):
                if (
                    x.grad_fn is not None
                ):  # its own backward is the outermost one, whatever is checkpointed inside
                    x.register_hook(partial(self._begin, model))  # type: ignore[no-untyped-call]

    def _begin(self, model: DistributedDataParallel, _: Tensor) -> None:
        if not self._is_queued and self.all_used is None:
            self._is_queued = True
            _at_end_of_backward(partial(self._complete, model))

    def _complete(self, model: DistributedDataParallel) -> None:
        """Hand in what has not been reached; DDP averages it as zeros and ends its own work after this call."""
        is_used = [parameter.grad is not None for parameter in self._parameters]
        ready = model.reducer.get_backward_stats()
        for index, (before, now) in enumerate(zip(self._ready_before, ready, strict=True)):
            if before == now:
                model.reducer._autograd_hook(index)  # type: ignore[attr-defined]
        _at_end_of_backward(partial(self._agree, model, is_used))

    def _agree(self, model: DistributedDataParallel, is_used: list[bool]) -> None:
        used_by = torch.tensor(is_used, dtype=torch.int32, device=self._parameters[0].device)
        used_by = self._collectives.all_reduce_(used_by)
        numbers = used_by.tolist()
        for parameter, number in zip(self._parameters, numbers, strict=True):
            if not number:
                parameter.grad = None  # as in one process, where weight decay would not touch it either
        all_used = min(numbers) == self._collectives.world_size
        self._decide(model, all_used=all_used)
        if not all_used and self._say:
            notice(self._found(numbers))

    def _decide(self, model: DistributedDataParallel, *, all_used: bool) -> None:
        self.all_used = all_used
        self._hook.remove()
        if all_used:
            return
        model._remove_autograd_hooks()  # type: ignore[no-untyped-call]
        model.find_unused_parameters = True
        with _names_in_errors():
            model._ddp_init_helper(self._parameters, self._is_sparse, self._names, False)  # type: ignore[no-untyped-call]
        model._has_rebuilt_buckets = False
        for hook, state in model._comm_hooks:
            _register_comm_hook(model.reducer, state, hook)

    def _found(self, numbers: list[int]) -> str:
        most = self._collectives.world_size
        unused = [self._names[i] for i, number in enumerate(numbers) if not number]
        partly = [self._names[i] for i, number in enumerate(numbers) if 0 < number < most]
        parts = [
            f"{what} {slices.listed(names)}"
            for what, names in (("no rank used", unused), ("only some ranks used", partly))
            if names
        ]
        return (
            f"ddp.find_unused_parameters auto: in the first step {' and '.join(parts)}, of {len(numbers)} parameters; "
            "every step looks for unused ones from now on"
        )


class _NoSync:
    """`DistributedDataParallel.no_sync` of some models, which can be entered again and again, and within itself."""

    def __init__(self, models: Sequence[DistributedDataParallel]) -> None:
        self._models = models
        self._before: list[list[bool]] = []

    def __enter__(self) -> None:
        self._before.append([model.require_backward_grad_sync for model in self._models])
        for model in self._models:
            # A static graph is learned in the first backward of all, which has to average (torch 2.13: INTERNAL ASSERT).
            if not model.static_graph or model._static_graph_delay_allreduce_enqueued:
                model.require_backward_grad_sync = False

    def __exit__(self, *error: object) -> None:
        for model, before in zip(self._models, self._before.pop(), strict=True):
            model.require_backward_grad_sync = before


def _reached_twice(said: str) -> StrategyError:
    found = _TWICE.search(said)
    return StrategyError(
        "D0811",
        f"the gradient of {slices.listed([found[1]]) if found else 'a parameter'} came when it had been averaged already: "
        "either a reentrant activation checkpoint computes it in parts, or several forwards that use different "
        "parameters came before one backward",
        fix="call backward after each forward; for checkpoints set ddp.static_graph: true or use_reentrant=False",
    )


def _refuse_gradients(outside: Sequence[nn.Parameter], optimizer: Optimizer) -> None:
    for parameter in outside:
        if parameter.requires_grad and parameter.grad is not None:
            raise StrategyError(
                "D0812",
                f"a parameter of shape {tuple(parameter.shape)} of the {type(optimizer).__name__} has a gradient, but "
                "it is in no prepared model, or was frozen when that was prepared: the ranks would step with "
                "gradients of their own",
                fix="make it part of a model that is prepared, and unfreeze parameters before prepare",
            )


def _wrapper(model: nn.Module) -> DistributedDataParallel | None:
    """Return the wrapper of a prepared model, also of one that has been compiled since."""
    found = root_of(model)
    return found if isinstance(found, DistributedDataParallel) else None


def _is_trained(model: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in model.parameters())


def _average_again(models: Sequence[DistributedDataParallel], loss: Tensor, _: Tensor) -> None:
    """Prepare models for one more backward, as their forward does; a hook of the loss, so that it runs first."""
    for model in models:
        if _reaches(model) and _is_finished(model):
            model.reducer.prepare_for_forward()
            model.reducer._rebuild_buckets()
            looks = model.find_unused_parameters and not model.static_graph
            model.reducer.prepare_for_backward([loss] if looks else [])


def _reaches(model: DistributedDataParallel) -> bool:
    """Whether the backward that runs now computes a gradient for any parameter."""
    nodes = [get_gradient_edge(x).node for x in model.module.parameters() if x.requires_grad]
    return any(map(torch._C._will_engine_execute_node, nodes))


def _is_finished(model: DistributedDataParallel) -> bool:
    """Whether no averaging is under way, which this backward may complete: two losses may share no parameter."""
    try:
        model.reducer._check_reducer_finalized()
    except RuntimeError:
        return False
    return True


def _at_end_of_backward(function: Callable[[], None]) -> None:
    Variable._execution_engine.queue_callback(function)


@contextmanager
def _names_in_errors() -> Iterator[None]:
    """Let a reducer that is made here name parameters in its errors, not number them; it prints nothing more."""
    level = get_debug_level()
    if level == DebugLevel.OFF:
        set_debug_level(DebugLevel.INFO)
    try:
        yield
    finally:
        set_debug_level(level)
