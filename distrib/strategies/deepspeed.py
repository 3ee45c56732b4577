"""DeepSpeed's ZeRO: optimizer state, gradients and parameters divided over the ranks, with this library's semantics.

DeepSpeed lays out, exchanges and updates. When a window ends, what it is divided by, clipped to and scaled with is decided
here as under every other strategy, so its own accumulation, clipping, loss scaling and schedulers are off.

`python -m distrib.strategies.deepspeed build-ops` compiles DeepSpeed's operations ahead of a run.
"""

from __future__ import annotations

import copy
import importlib
import json
import logging
import os
import sys
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from distrib.collectives.sync import take_over
from distrib.devices import choose_device
from distrib.errors import DistribError, StrategyError
from distrib.logging import notice
from distrib.state import Runtime, ShardedState, Slice, TensorSpec, TrainState, whole
from distrib.strategies import batchnorm, meta, slices
from distrib.strategies.base import Capabilities, StepResult, Strategy
from distrib.strategies.blocks import Forwards
from distrib.strategies.context import dividing
from distrib.strategies.deepspeed_config import (
    Seen,
    Settings,
    check,
    engine_config,
    read_user_file,
    refuse_precision,
    stage_of,
    unused_scaling,
)
from distrib.strategies.deepspeed_ops import build_ops, has_float16, join_process_group, load_deepspeed
from distrib.strategies.deepspeed_state import LAYOUTS, Held
from distrib.strategies.gradients import norm_to_the_power, scale_and_check
from distrib.strategies.placing import Replaced, apply_policy, refuse_half_precision, refuse_wrapped

if TYPE_CHECKING:
    from distrib.accelerator import Accelerator

_ANY_MODEL = Seen(1, 1)  # one that is not there yet
_HELD = "_distrib_deepspeed"  # attribute of a model and of its optimizer
_LOG = logging.getLogger(__name__)
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_STEPPED = StepResult(stepped=True)
_NOT_FINITE = StepResult(stepped=False, reason="DeepSpeed found gradients that are not finite")


class DeepSpeed(Strategy):
    """A DeepSpeed engine for each pair of a model and its optimizer; the model stays the user's own object.

    Options: `zero_stage`, `offload_optimizer`, `offload_param`, and `config`, a file of DeepSpeed's own settings.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(
        ("cpu", "cuda"),
        model_and_optimizer_together=True,
        whole_replicas=False,
        axes=("shard",),
        free_axis="shard",
    )

    def __init__(self, runtime: Runtime, options: Mapping[str, object]) -> None:
        super().__init__(runtime, options)
        self._user, self._settings = read_user_file(options.get("config")), Settings.of(options, runtime)
        env: Any = options["env"]
        self._deepspeed = load_deepspeed(env, runtime.device.type, runtime.topology.local_rank)
        check(self._user, self._settings)
        self._stage = stage_of(self._user, self._settings)
        refuse_precision(runtime.precision, self._stage)
        join_process_group(self._deepspeed, runtime)
        self._parts = dividing(runtime, options)
        self._replaced = Replaced()
        self._engines: list[weakref.ref[Held]] = []  # in the order in which all ranks have made them
        self._said_batchnorm = False
        self._used: list[dict[str, Any]] = []
        if names := unused_scaling(self._user):
            self._say(
                f"deepspeed: {', '.join(names)} in {self._user.path} do nothing: distrib scales losses (docs/numbers.md)"
            )

    def prepare(self, state: TrainState) -> TrainState:
        for model in state.models:
            refuse_wrapped(model)
            if self.runtime.precision.loss_scaling == "dynamic":
                refuse_half_precision(model)
            self._place(model)
        for optimizer in state.optimizers:
            self._replaced.point(optimizer)
        for model, optimizer in _pairs(state):
            self._make_engine(model, optimizer)
        for model in state.models:
            if _held_of(model) is None and any(x.requires_grad for x in model.parameters()):
                self._say(
                    f"deepspeed: {type(model).__name__} was prepared without an optimizer: it stays whole on every "
                    "rank, and is not trained"
                )
        return state

    def prepare_for_evaluation(self, model: nn.Module) -> nn.Module:
        self._place(model)
        return model

    def as_prepared(self, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        return self._replaced.now(parameters)

    def gradient_sync(self, models: Sequence[nn.Module], *, enabled: bool) -> AbstractContextManager[None]:
        # Stages 0 and 1 exchange at a window's end, whatever is asked for here; 2 and 3 hold no whole gradients.
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        held = self._all_held()
        for x in held:
            x.before_backward()
        try:
            loss.backward()  # type: ignore[no-untyped-call]
        except BaseException:
            for x in held:
                x.abort_backward()
            raise
        for x in held:
            x.after_backward()

    def scale_gradients_(
        self, parameters: Iterable[nn.Parameter], factor: float, *, check_finite: bool = False
    ) -> bool:
        wanted = {id(x) for x in parameters}
        # A loss scale can change in the midst of a window; all other divisions are made at its end.
        at_end = check_finite or self.runtime.precision.loss_scaling == "none"
        gradients = self._gradients(wanted, finished=at_end)
        if not check_finite:
            if gradients:
                torch._foreach_mul_(gradients, factor)
            return True
        is_finite = scale_and_check(gradients, factor)
        is_bad = torch.tensor(not is_finite, dtype=torch.float32, device=self.runtime.device)
        return not bool(self.runtime.collectives.all_reduce_(is_bad, "max"))

    def clip_grad_norm_(
        self, parameters: Sequence[nn.Parameter], max_norm: float, norm_type: float = 2.0
    ) -> Tensor:
        norm_type = float(norm_type)
        gradients = self._gradients({id(x) for x in parameters}, finished=True)
        device = self.runtime.device
        total = norm_to_the_power(gradients, norm_type, device).to(torch.float32)
        if self._stage > 0:
            op = "max" if norm_type == torch.inf else "sum"
            total = self.runtime.collectives.all_reduce_(total, op)  # type: ignore[arg-type]
        if norm_type != torch.inf:
            total = total.pow(1 / norm_type)
        factor = torch.clamp(max_norm / (total + 1e-6), max=1.0)
        for gradient in gradients:
            gradient.mul_(factor.to(gradient.device, gradient.dtype))
        return total

    def clip_grad_value_(self, parameters: Sequence[nn.Parameter], clip_value: float) -> None:
        for gradient in self._gradients({id(x) for x in parameters}, finished=True):
            gradient.clamp_(-clip_value, clip_value)

    def step(self, optimizer: Optimizer) -> StepResult:
        held = _held_by(optimizer)
        _refuse_new_groups(held)
        return _STEPPED if held.step() else _NOT_FINITE

    def clear_gradients(self, optimizer: Optimizer, *, set_to_none: bool) -> None:
        _held_by(optimizer).forget()

    def replicated(self, model: nn.Module) -> dict[str, Tensor]:
        found = super().replicated(model)
        held = _held_of(model)
        if held is None or self._stage < 3:
            return found
        divided = {id(x) for x in model.parameters()}
        return {name: x for name, x in found.items() if id(x) not in divided}

    def whole_state_dict(self, model: nn.Module) -> dict[str, Any]:
        held = _held_of(model)
        self._spread_buffers([model])
        masters = held.whole_masters(self.runtime.collectives) if held is not None else {}
        return {
            name: masters.get(id(x), x.detach()) if isinstance(x, Tensor) else x
            for name, x in model.state_dict(keep_vars=True).items()
        }

    @contextmanager
    def gathered(self, model: nn.Module) -> Iterator[nn.Module]:
        """Let the model have whole parameters; what the body changes in them goes back to the masters.

        Every rank has to make the same changes. In mixed precision the whole parameters are in the compute dtype.
        """
        self._spread_buffers([model])
        held = _held_of(model)
        with nullcontext() if held is None else held.gathered():
            yield model
        if held is not None:
            held.take_back()

    def unwrap(self, model: nn.Module) -> nn.Module:
        return model

    def used_settings(self) -> dict[str, Any]:
        return {"deepspeed.engines": self._used}

    @contextmanager
    def making_sharded(self) -> Iterator[None]:
        """Return a context in which transformers divides what it makes or loads; without stage 3 it does nothing."""
        if self._stage < 3:
            yield
            return
        if find_spec("transformers") is None or find_spec("accelerate") is None:
            raise StrategyError(
                "D0870",
                "transformers makes models sharded with the help of the packages transformers and accelerate, of which one "
                "is not installed",
                where="init_sharded",
                fix="pip install transformers accelerate; or load the model outside of it, whole on every rank",
            )
        integration = importlib.import_module("transformers.integrations.deepspeed")
        config = engine_config(self._user, self._settings, _ANY_MODEL, self._kept_in())
        alive = integration.HfDeepSpeedConfig(config)  # transformers has only a weak reference
        try:
            yield
        finally:
            integration.unset_hf_deepspeed_config()
            del alive

    def describe(self) -> str:
        """Return what is divided over how many ranks, a line for each engine."""
        what = ("nothing", "optimizer state", "optimizer state and gradients", "all of it")[self._stage]
        ranks = self.runtime.collectives.world_size
        return "\n".join(
            f"{type(x.module).__name__}: ZeRO stage {self._stage}, {what} divided over {ranks} ranks"
            for x in self._all_held()
        )

    def sharded_state(self, state: TrainState) -> ShardedState:
        self._spread_buffers(state.models)
        names = self.parameter_names(state.models)
        return slices.joined([
            *(self._model_slices(m, slices.module_prefix(i)) for i, m in enumerate(state.models)),
            *(
                self._optimizer_slices(o, names, slices.optimizer_prefix(i))
                for i, o in enumerate(state.optimizers)
            ),
        ])  # fmt: skip

    @contextmanager
    def loading(
        self,
        state: TrainState,
        stored: Mapping[str, TensorSpec],
        objects: Mapping[str, Any],
        *,
        strict: bool = True,
    ) -> Iterator[ShardedState]:
        names = self.parameter_names(state.models)
        held = [x for x in map(_held_of, state.models) if x is not None]
        before = [(x, dict(x.base.state)) for x in held]
        for x in held:
            x.before_loading()

        def describe() -> ShardedState:
            for i, optimizer in enumerate(state.optimizers):
                self._allocate(optimizer, names, stored, slices.optimizer_prefix(i))
            return self.sharded_state(state)

        try:
            # The user's optimizers have options and names; what they remember is with DeepSpeed's.
            with slices.loading_in_place(
                state, state.models, describe, names, {}, objects, strict=strict
            ) as own:
                yield own
            for i, optimizer in enumerate(state.optimizers):
                self._restore_numbers(optimizer, names, objects.get(slices.optimizer_prefix(i).rstrip("/")))
        except BaseException:
            for x, old in before:
                x.base.state.clear()
                x.base.state.update(old)
            raise
        for x in held:
            x.refresh()

    def _place(self, model: nn.Module) -> None:
        """Take rank 0's values over, apply the precision policy and move the model, in place. Collective."""
        root = _root(model)
        if _held_of(model) is not None:
            return
        self._see_to_batchnorm(root)
        Forwards(self.options, self._parts, say=self.runtime.topology.is_main).replace(model)
        if meta.is_empty(root):
            with self._replaced.watching(root):
                meta.materialise(root, self.runtime.device, self.runtime.collectives)
        take_over(root, self.runtime.collectives)
        apply_policy(model.to(self.runtime.device), self.runtime)

    def _make_engine(self, model: nn.Module, optimizer: Optimizer) -> None:
        root = _root(model)
        if optimizer.state:
            raise StrategyError(
                "D0876",
                f"{type(optimizer).__name__} has state already, which DeepSpeed would lay out anew and lose",
                fix="prepare the optimizer before its first step, and load its state with load_state afterwards",
            )
        _refuse_wide(root)
        if self._kept_in() is not None:
            _refuse_batchnorm(root)
        own = _copy_for_engine(optimizer)
        config = engine_config(self._user, self._settings, Seen.of(root), self._kept_in())
        self._used.append(copy.deepcopy(config))
        if self.runtime.topology.is_main:
            _LOG.debug("DeepSpeed's configuration for %s: %s", type(root).__name__, json.dumps(config))
        engine, *_ = self._deepspeed.initialize(model=root, optimizer=own, config=config)
        held = LAYOUTS[self._stage](engine, optimizer)
        if engine.bfloat16_enabled() or engine.fp16_enabled():
            _match_norms(root)
        vars(root)[_HELD] = vars(optimizer)[_HELD] = held
        self._engines = [x for x in self._engines if x() is not None] + [weakref.ref(held)]

    def _all_held(self) -> list[Held]:
        return [x for reference in self._engines if (x := reference()) is not None]

    def _kept_in(self) -> torch.dtype | None:
        """Return the format of the parameters that are computed with; None leaves them as they are, under autocast."""
        narrow = self.runtime.precision.compute
        if self._stage == 0 or (narrow is torch.float16 and not has_float16()):
            return None
        return narrow

    def _gradients(self, wanted: Collection[int], *, finished: bool) -> list[Tensor]:
        found: list[Tensor] = []
        for held in self._all_held():
            if not held.ids.isdisjoint(wanted):
                if finished:
                    held.finish()
                found += held.tensors(wanted)
        return found

    def _model_slices(self, model: nn.Module, prefix: str) -> ShardedState:
        held = _held_of(model)
        if held is None:
            return slices.module_slices(model, prefix)
        parameters = {
            prefix + slices.plain_name(name): x for name, x in model.named_parameters(remove_duplicate=False)
        }

        def slice_of(name: str, tensor: Tensor) -> Slice:
            parameter = parameters.get(name)
            if parameter is None or not (self._stage == 3 or held.steps(parameter)):
                return whole(name, tensor)
            fragment = held.fragment(parameter)
            return fragment.slice_of(name, fragment.master)

        return slices.module_slices(model, prefix, slice_of)

    def _optimizer_slices(self, optimizer: Optimizer, names: slices.Names, prefix: str) -> ShardedState:
        held = _held_by(optimizer)
        tensors: dict[str, tuple[Slice, ...]] = {}
        numbers: dict[str, dict[str, Any]] = {}
        for name, parameter in slices.named_parameters(optimizer, names):
            if not held.steps(parameter):
                continue
            fragment = held.fragment(parameter)
            for key, value in held.state_of(parameter).items():
                full = f"{prefix}{key}.{name}"
                if not isinstance(value, Tensor):
                    numbers.setdefault(name, {})[key] = value
                elif value.dim() == 0:
                    tensors[full] = (_shared(full, value),)
                else:
                    tensors[full] = (fragment.slice_of(full, value),)
        found = slices.optimizer_slices(optimizer, names, prefix)
        for name, values in numbers.items():
            found.objects[prefix.rstrip("/")]["state"].setdefault(name, {}).update(values)
        return slices.joined([found, ShardedState(tensors)])

    def _allocate(
        self, optimizer: Optimizer, names: slices.Names, stored: Mapping[str, TensorSpec], prefix: str
    ) -> None:
        keys: dict[str, dict[str, TensorSpec]] = {}
        for full, spec in stored.items():
            if full.startswith(prefix):
                key, _, name = full.removeprefix(prefix).partition(".")
                keys.setdefault(name, {})[key] = spec
        held = _held_by(optimizer)
        held.allocate({
            parameter: keys.get(name, {})
            for name, parameter in slices.named_parameters(optimizer, names)
            if held.steps(parameter)
        })  # fmt: skip

    def _restore_numbers(
        self, optimizer: Optimizer, names: slices.Names, stored: Mapping[str, Any] | None
    ) -> None:
        """Hand what an optimizer keeps outside of tensors, such as a number of steps, on to DeepSpeed's."""
        held = _held_by(optimizer)
        for name, parameter in slices.named_parameters(optimizer, names):
            values = (stored or {}).get("state", {}).get(name, {})
            if values and held.steps(parameter):
                flat = held.fragment(parameter).flat
                assert flat is not None, "it is stepped"
                held.base.state[flat].update(values)
        optimizer.state.clear()

    def _see_to_batchnorm(self, model: nn.Module) -> None:
        if self.options.get("sync_batchnorm") is True:
            batchnorm.synchronize_batchnorm(model, on_host=torch.empty(0, device=self.runtime.device).is_cpu)
        elif self.runtime.collectives.world_size > 1 and (names := batchnorm.of_each_rank(model)):
            if not self._said_batchnorm and self.runtime.topology.is_main:
                batchnorm.warn_of_each_rank(names)
            self._said_batchnorm = True

    def _spread_buffers(self, models: Sequence[nn.Module]) -> None:
        """Give every rank rank 0's buffers: they are what the run goes on with. Collective."""
        for model in models:
            buffers = dict(model.named_buffers())
            if buffers and self.runtime.collectives.world_size > 1:
                for name, value in self.runtime.collectives.broadcast(buffers).items():
                    buffers[name].copy_(value)

    def _say(self, text: str) -> None:
        if self.runtime.topology.is_main:
            notice(text)


def _root(model: nn.Module) -> nn.Module:
    """Return the module that the engine gets: the user's own, below what `torch.compile` puts around it."""
    found: nn.Module = getattr(model, "_orig_mod", model)
    return found


def _held_of(model: nn.Module) -> Held | None:
    root = _root(model)
    held: Held | None = vars(root).get(_HELD)
    return held if held is not None and held.module is root else None  # a copy of a model has no engine


def _held_by(optimizer: Optimizer) -> Held:
    held: Held = vars(optimizer)[_HELD]
    return held


def _match_norms(model: nn.Module) -> None:
    """Let normalizations take what comes in the format of their weights: on the CPU, autocast does not see to it."""

    def narrowed(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        weight = module.weight
        assert isinstance(weight, Tensor), "it was looked at below"
        if not weight.is_cpu:
            return inputs
        return tuple(
            x.to(weight.dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs
        )

    for module in model.modules():
        if isinstance(module, _NORMS) and isinstance(module.weight, Tensor):
            module.register_forward_pre_hook(narrowed)


def _shared(name: str, value: Tensor) -> Slice:
    """Describe a number that all parameters of a flat tensor share; each stores it as its own."""

    def commit(filled: Tensor) -> None:
        value.copy_(filled)

    return replace(whole(name, value.clone()), commit=commit)


def _copy_for_engine(optimizer: Optimizer) -> Optimizer:
    """Return an optimizer like the user's that DeepSpeed may take apart: its groups get other parameters.

    Hooks are shared. `step` is not: schedulers have put a counter around the user's.
    """
    own: Optimizer = object.__new__(type(optimizer))
    vars(own).update({key: x for key, x in vars(optimizer).items() if key != "step"})
    own.state = type(optimizer.state)(dict)
    trained = [[x for x in group["params"] if x.requires_grad] for group in optimizer.param_groups]
    own.param_groups = [
        {**group, "params": parameters}
        for group, parameters in zip(optimizer.param_groups, trained, strict=True)
        if parameters
    ]
    return own


def _pairs(state: TrainState) -> list[tuple[nn.Module, Optimizer]]:
    """Return each optimizer's model.

    Raises:
        StrategyError: D0874, D0875, unless each optimizer trains parameters of exactly one model, and no other does.
    """
    pairs: list[tuple[nn.Module, Optimizer]] = []
    for optimizer in state.optimizers:
        stepped = {id(x) for group in optimizer.param_groups for x in group["params"]}
        models = [m for m in state.models if not stepped.isdisjoint(map(id, m.parameters()))]
        if not models:
            raise StrategyError(
                "D0874",
                f"{type(optimizer).__name__} steps no parameter of the models in this call; DeepSpeed needs a model and "
                "its optimizer together",
                where="prepare",
                fix="model, optimizer = accelerator.prepare(model, optimizer)",
            )
        taken = any(models[0] is model for model, _ in pairs)
        if len(models) > 1 or taken or stepped - {id(x) for x in models[0].parameters()}:
            what = (
                f"steps {len(models)} models"
                if len(models) > 1
                else f"is a second one for {type(models[0]).__name__}"
                if taken
                else f"steps parameters that are not in {type(models[0]).__name__}"
            )
            raise StrategyError(
                "D0875",
                f"{type(optimizer).__name__} {what}; a DeepSpeed engine has one model and one optimizer",
                where="prepare",
                fix="give each model one optimizer of its own, with its parameters only, or choose fsdp or ddp",
            )
        pairs.append((models[0], optimizer))
    return pairs


def _refuse_wide(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dtype is torch.float64:
            raise StrategyError(
                "D0877",
                f"{name} is in float64, which DeepSpeed keeps and exchanges in float32",
                fix="give prepare a float32 model (model.float()), or choose ddp or fsdp",
            )


def _refuse_batchnorm(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            raise StrategyError(
                "D0879",
                f"{name or 'the model'} is a {type(module).__name__}, whose weights would be in 16 bits and its statistics in "
                "float32, which torch does not compute with",
                where="mixed_precision",
                fix="set mixed_precision: no or deepspeed.zero_stage: 0, where autocast is used, or choose ddp or fsdp",
            )


def _refuse_new_groups(held: Held) -> None:
    if sum(len(group["params"]) for group in held.given.param_groups) != len(held.ids):
        raise StrategyError(
            "D0878",
            f"{type(held.given).__name__} has got other parameters since it was prepared; DeepSpeed has laid its state "
            "out by then",
            fix="add parameter groups before prepare, frozen by requires_grad_(False) if they come later",
        )


@contextmanager
def init_sharded(accelerator: Accelerator) -> Iterator[None]:
    """Let models of transformers that are loaded inside be divided over the ranks at once, under stage 3. Collective.

    `from_pretrained` and `from_config` then never hold more than one parameter whole. Only for models that are trained:
    `prepare` each with its optimizer. Under other stages and strategies it does nothing.

    Args:
        accelerator: Whose strategy it is.

    Raises:
        StrategyError: D0870, if transformers or accelerate is not installed.
    """
    strategy = accelerator._strategy
    with strategy.making_sharded() if isinstance(strategy, DeepSpeed) else nullcontext():
        yield


def main(arguments: Sequence[str], env: MutableMapping[str, str]) -> int:
    """Compile DeepSpeed's operations for this machine's device: `build-ops [BUILDER ...]`."""
    if not arguments or arguments[0] != "build-ops":
        sys.stderr.write("usage: python -m distrib.strategies.deepspeed build-ops [BUILDER ...]\n")
        return 2
    try:
        build_ops(env, choose_device("auto", 1)[0].name, tuple(arguments[1:]))
    except DistribError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:], os.environ))  # noqa: TID251 (a program is an edge)
