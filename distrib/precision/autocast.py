"""Precision applied to a model: its forward runs under autocast, its outputs come back in a wide format."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from fnmatch import fnmatchcase
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn

from distrib.collectives.trees import map_tensors
from distrib.precision import fp8
from distrib.precision.policy import PrecisionPolicy

_MARK = "_distrib_plain_forward"
_CONVERTED = (torch.float32, torch.bfloat16, torch.float16)  # whoever keeps float64 wants its digits


def autocast(policy: PrecisionPolicy, device: torch.device) -> AbstractContextManager[Any]:
    """Return the context in which matrix products use the policy's compute dtype."""
    if policy.compute is None:
        return nullcontext()
    return torch.autocast(device.type, policy.compute)


def apply_precision(model: nn.Module, policy: PrecisionPolicy, device: torch.device) -> nn.Module:
    """Let this instance's `forward` run under the policy; without a compute dtype it stays untouched.

    The class is not changed, and the instance can still be copied: the new forward is a method bound to it.
    Parameters are converted in place where the policy says in what they are kept.
    """
    if policy.param is not None:
        _keep_in(policy.param, model)
    if policy.compute is None or _MARK in vars(model.forward):
        return model
    for pattern in policy.fp32_modules:
        for module in matching(model, pattern):
            if _MARK not in vars(module.forward):
                _replace_forward(module, partial(_in_float32, policy, device))
    _replace_forward(model, partial(_under, policy, device))
    return model


def matching(model: nn.Module, pattern: str) -> list[nn.Module]:
    """Return the modules inside `model` whose names fit a pattern such as "*.norm"."""
    return [module for name, module in model.named_modules() if name and fnmatchcase(name, pattern)]


def _replace_forward(module: nn.Module, made_of: Callable[..., Callable[..., Any]]) -> None:
    plain: Any = vars(module).get("forward")
    if (
        getattr(plain, "__self__", None) is module
    ):  # taken apart, so that a copy computes with its own parameters
        plain = plain.__func__
        run = made_of(plain, bound=False)
        vars(run)[_MARK] = partial(MethodType, plain)
    else:
        run = made_of(plain or type(module).forward, bound=plain is not None)
        vars(run)[_MARK] = plain and (lambda _: plain)
    module.forward = MethodType(run, module)


def _keep_in(dtype: torch.dtype, model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.dtype in _CONVERTED and parameter.dtype is not dtype:
            parameter.data = parameter.data.to(dtype)


def remove_precision(model: nn.Module) -> nn.Module:
    """Undo `apply_precision`, but for the dtype of parameters, and put layers that multiply in float8 back."""
    fp8.restore(model)
    for module in model.modules():
        current = vars(module).get("forward")
        if current is not None and _MARK in vars(current):
            plain_of = vars(current)[_MARK]
            del module.forward
            if plain_of is not None:
                module.forward = plain_of(module)
    return model


def _in_float32(
    policy: PrecisionPolicy, device: torch.device, forward: Callable[..., Any], *, bound: bool
) -> Callable[..., Any]:
    narrow = policy.compute

    def widen(x: torch.Tensor) -> torch.Tensor:
        return x.float() if x.dtype == narrow else x

    @functools.wraps(forward)
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = map_tensors(widen, args), map_tensors(widen, kwargs)
        with torch.autocast(device.type, enabled=False):
            return forward(*args, **kwargs) if bound else forward(self, *args, **kwargs)

    return run


def _under(
    policy: PrecisionPolicy, device: torch.device, forward: Callable[..., Any], *, bound: bool
) -> Callable[..., Any]:
    dtype, narrow, wide = policy.compute, policy.compute, policy.output

    def widen(x: torch.Tensor) -> torch.Tensor:
        return x.to(wide) if x.dtype == narrow and wide is not None else x

    @functools.wraps(forward)
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device.type, dtype):
            result = forward(*args, **kwargs) if bound else forward(self, *args, **kwargs)
        if isinstance(result, torch.Tensor):
            return result.to(wide) if result.dtype == narrow else result
        return map_tensors(widen, result)

    return run
