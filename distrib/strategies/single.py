"""One rank: the model as it is."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from distrib.state import Runtime, ShardedState, TensorSpec, TrainState
from distrib.strategies import meta, slices
from distrib.strategies.base import Capabilities, StepResult, Strategy
from distrib.strategies.blocks import Forwards
from distrib.strategies.context import dividing
from distrib.strategies.gradients import scale_and_check
from distrib.strategies.placing import (
    Replaced,
    apply_policy,
    move_state,
    refuse_half_precision,
    refuse_wrapped,
)

_STEPPED = StepResult(stepped=True)


class Single(Strategy):
    """Whole models on one device; what strategies of whole replicas build upon."""

    capabilities: ClassVar[Capabilities] = Capabilities(("cpu", "cuda", "mps", "xpu"), max_world_size=1)

    def __init__(self, runtime: Runtime, options: Mapping[str, object]) -> None:
        super().__init__(runtime, options)
        self._parts = dividing(runtime, options)
        self._replaced = Replaced()
        self.as_prepared = self._replaced.now  # type: ignore[method-assign]  # one call less in every step
        self._optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()

    def prepare(self, state: TrainState) -> TrainState:
        for model in state.models:
            refuse_wrapped(model)
            if self.runtime.precision.loss_scaling == "dynamic":
                refuse_half_precision(model)
            self.place(model)
        self._optimizers.update(state.optimizers)
        for optimizer in self._optimizers:  # also those that came before their model
            self._replaced.point(optimizer)
            move_state(optimizer)
        return state

    def prepare_for_evaluation(self, model: nn.Module) -> nn.Module:
        return self.place(model)

    def place(self, model: nn.Module) -> nn.Module:
        """Move a model to the device, replace its forwards and apply the precision policy, in place."""
        if meta.is_empty(model):
            with self._replaced.watching(model):
                meta.materialise(model, self.runtime.device, self.runtime.collectives)
        Forwards(self.options, self._parts, say=self.runtime.topology.is_main).replace(model)
        return apply_policy(model.to(self.runtime.device), self.runtime)

    def gradient_sync(self, models: Sequence[nn.Module], *, enabled: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def scale_gradients_(
        self, parameters: Iterable[nn.Parameter], factor: float, *, check_finite: bool = False
    ) -> bool:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if not check_finite:
            if gradients:
                torch._foreach_mul_(gradients, factor)
            return True
        return scale_and_check(gradients, factor)  # replicas have the same gradients, so the same answer

    def clip_grad_norm_(
        self, parameters: Sequence[nn.Parameter], max_norm: float, norm_type: float = 2.0
    ) -> Tensor:
        return nn.utils.clip_grad_norm_(parameters, max_norm, norm_type)

    def clip_grad_value_(self, parameters: Sequence[nn.Parameter], clip_value: float) -> None:
        nn.utils.clip_grad_value_(parameters, clip_value)

    def step(self, optimizer: Optimizer) -> StepResult:
        optimizer.step()
        return _STEPPED

    def sharded_state(self, state: TrainState) -> ShardedState:
        models = [self.unwrap(model) for model in state.models]
        names = slices.parameter_names(models)
        of_models = [slices.module_slices(m, slices.module_prefix(i)) for i, m in enumerate(models)]
        of_optimizers = [
            slices.optimizer_slices(o, names, slices.optimizer_prefix(i))
            for i, o in enumerate(state.optimizers)
        ]
        return slices.joined([*of_models, *of_optimizers])

    def loading(
        self,
        state: TrainState,
        stored: Mapping[str, TensorSpec],
        objects: Mapping[str, Any],
        *,
        strict: bool = True,
    ) -> AbstractContextManager[ShardedState]:
        models = [self.unwrap(model) for model in state.models]
        names = slices.parameter_names(models)
        describe = partial(self.sharded_state, state)
        return slices.loading_in_place(state, models, describe, names, stored, objects, strict=strict)

    @contextmanager
    def gathered(self, model: nn.Module) -> Iterator[nn.Module]:
        yield self.unwrap(model)

    def unwrap(self, model: nn.Module) -> nn.Module:
        return model
