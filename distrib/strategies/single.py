"""One rank: the model as it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from distrib.errors import StrategyError
from distrib.logging import notice
from distrib.precision import apply_precision, matching
from distrib.state import ShardedState, TensorSpec, TrainState
from distrib.strategies import slices
from distrib.strategies.base import Capabilities, StepResult, Strategy

_STEPPED = StepResult(stepped=True)


class Single(Strategy):
    """Whole models on one device; what strategies of whole replicas build upon."""

    capabilities: ClassVar[Capabilities] = Capabilities(("cpu", "cuda", "mps", "xpu"), max_world_size=1)

    def prepare(self, state: TrainState) -> TrainState:
        for model in state.models:
            _refuse_wrapped(model)
            if self.runtime.precision.loss_scaling == "dynamic":
                _refuse_half_precision(model)
            self.place(model)
        for optimizer in state.optimizers:
            _move_state(optimizer)
        return state

    def prepare_for_evaluation(self, model: nn.Module) -> nn.Module:
        return self.place(model)

    def place(self, model: nn.Module) -> nn.Module:
        """Move a model to the device and apply the precision policy, in place."""
        precision = self.runtime.precision
        for pattern in precision.fp32_modules:
            if not matching(model, pattern) and self.runtime.topology.is_main:
                notice(f"mixed_precision.fp32_modules: {pattern!r} fits no module of {type(model).__name__}")
        return apply_precision(model.to(self.runtime.device), precision, self.runtime.device)

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
        return _scale_and_check(gradients, factor)  # replicas have the same gradients, so the same answer

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
        return slices.loading_whole(state, models, describe, names, stored, objects, strict=strict)

    @contextmanager
    def gathered(self, model: nn.Module) -> Iterator[nn.Module]:
        yield self.unwrap(model)

    def unwrap(self, model: nn.Module) -> nn.Module:
        return model


def _refuse_wrapped(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, (nn.DataParallel, DistributedDataParallel)):
            raise StrategyError(
                "D0813",
                f"{name or 'the model'} is in a {type(module).__name__} already, so gradients would be exchanged twice",
                fix="give prepare the plain model",
            )


def _refuse_half_precision(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dtype is torch.float16 and parameter.requires_grad:
            raise StrategyError(
                "D0814",
                f"{name} is kept in float16, where gradients under a loss scale overflow and small updates are lost",
                fix="give prepare a float32 model (model.float()); its matrix products run in float16 all the same",
            )


def _scale_and_check(gradients: Sequence[Tensor], factor: float) -> bool:
    """Multiply and look for inf and NaN in one pass per device and dtype, with the kernel of torch's own scaler."""
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for gradient in gradients:
        alike.setdefault((gradient.device, gradient.dtype), []).append(gradient)
    found = []
    for (device, dtype), group in alike.items():
        found.append(torch.zeros((), device=device))
        if dtype is torch.float64:  # the kernel's factor has 24 bits
            torch._foreach_mul_(group, factor)
        scale = torch.tensor(1.0 if dtype is torch.float64 else factor, dtype=torch.float32, device=device)
        torch._amp_foreach_non_finite_check_and_unscale_(group, found[-1], scale)
    return not sum(map(float, found))


def _move_state(optimizer: Optimizer) -> None:
    """Bring state that was loaded before `prepare` to where its parameters are now."""
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[key] = value.to(parameter.device)
