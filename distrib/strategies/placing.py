"""What every strategy does to a model or an optimizer before it lays it out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from distrib.collectives.base import Collectives
from distrib.errors import StrategyError
from distrib.logging import notice
from distrib.precision import apply_precision, fp8, matching
from distrib.state import Runtime
from distrib.strategies import slices


class Replaced:
    """Parameters that were given and what stands in their place now, so that optimizers made before step the right ones."""

    def __init__(self) -> None:
        self._now = WeakIdKeyDictionary()
        self._ids: set[int] = set()  # of its keys, and of some that are gone

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Note which parameters of `model` the body replaces."""
        before = {(id(m), name): x for m in model.modules() for name, x in m._parameters.items()}
        yield
        for module in model.modules():
            for name, now in module._parameters.items():
                given = before.get((id(module), name))
                if given is not None and now is not given:
                    self._now[given] = now
                    self._ids.add(id(given))
                    for key, value in vars(given).items():
                        vars(now).setdefault(key, value)  # what users and libraries keep at a parameter

    def now(self, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """Return what stands in the places of these parameters."""
        listed = list(parameters)
        if self._ids.isdisjoint(map(id, listed)):  # in nearly every step
            return listed
        return [self._now.get(x, x) for x in listed]  # type: ignore[no-untyped-call]

    def point(self, optimizer: Optimizer, convert: Callable[[Any, Tensor], Any] | None = None) -> None:
        """Let an optimizer step what stands in its parameters' places; `convert` fits state that it has already."""
        for group in optimizer.param_groups:
            group["params"] = self.now(group["params"])
        for given in [x for x in optimizer.state if x in self._now]:
            now, state = self._now[given], optimizer.state.pop(given)
            optimizer.state[now] = {
                key: convert(value, now) if convert else value for key, value in state.items()
            }


def root_of(model: nn.Module) -> nn.Module:
    """Return the user's own module, below what `torch.compile` puts around it."""
    found: nn.Module = getattr(model, "_orig_mod", model)
    return found


def spread_buffers(models: Iterable[nn.Module], ranks: Collectives) -> None:
    """Give all of `ranks` the buffers that the first has: they are what a run goes on with. Collective."""
    for model in models if ranks.world_size > 1 else ():
        buffers = {name: x for name, x in model.named_buffers() if not x.is_meta}
        if buffers:
            for name, value in ranks.broadcast(buffers).items():
                buffers[name].copy_(value)


def apply_policy(model: nn.Module, runtime: Runtime) -> nn.Module:
    """Apply the run's precision policy, in place; say which of its patterns fit no module."""
    for pattern in runtime.precision.fp32_modules:
        if not matching(model, pattern) and runtime.topology.is_main:
            notice(f"mixed_precision.fp32_modules: {pattern!r} fits no module of {type(model).__name__}")
    if runtime.precision.fp8:
        names = fp8.convert(model, runtime.precision)
        if runtime.topology.is_main:
            layers = f"{len(names)} linear layer{'s' if len(names) != 1 else ''}"
            notice(f"fp8: {layers} of {type(model).__name__} multiply in float8")
    return apply_precision(model, runtime.precision, runtime.device)


def refuse_wrapped(model: nn.Module) -> None:
    """Refuse a model that already exchanges its gradients itself."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.DataParallel, DistributedDataParallel)):
            raise StrategyError(
                "D0813",
                f"{name or 'the model'} is in a {type(module).__name__} already, so gradients would be exchanged twice",
                fix="give prepare the plain model",
            )


def refuse_replaced(before: Mapping[str, nn.Parameter], now: Mapping[str, nn.Parameter]) -> None:
    """Refuse parameters that have come or gone while the model's were whole (D0837)."""
    if new := [name for name in {**before, **now} if before.get(name) is not now.get(name)]:
        raise StrategyError(
            "D0837",
            f"parameters have come or gone inside gathered: {slices.listed(sorted(new))}; they would be neither divided nor "
            "averaged",
            fix="change values in place there, and modules before prepare",
        )


def refuse_half_precision(model: nn.Module) -> None:
    """Refuse trained parameters in float16, which a loss scale does not help."""
    for name, parameter in model.named_parameters():
        if parameter.dtype is torch.float16 and parameter.requires_grad:
            raise StrategyError(
                "D0814",
                f"{name} is kept in float16, where gradients under a loss scale overflow and small updates are lost",
                fix="give prepare a float32 model (model.float()); its matrix products run in float16 all the same",
            )


def move_state(optimizer: Optimizer) -> None:
    """Bring state that was loaded before `prepare` to where its parameters are now."""
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[key] = value.to(parameter.device)
