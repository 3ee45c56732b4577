"""State on an XLA device as slices in host memory: what is there is read and written whole, so that nothing is compiled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from distrib.collectives.base import Collectives
from distrib.devices.xla_runtime import upload
from distrib.state import Box, ShardedState, Slice

Parts = Callable[[Slice, Tensor], "tuple[Slice, ...] | None"]


def to_save(state: ShardedState, parts: Parts) -> ShardedState:
    """Return `state` whose slices of device tensors give copies in host memory.

    Args:
        state: Whose slices are whole tensors.
        parts: Returns the parts of a tensor that lies on several devices; None for one that does not.
    """
    tensors: dict[str, tuple[Slice, ...]] = {}
    for name, (part,) in state.tensors.items():
        value = part.get()
        if value.is_cpu:
            tensors[name] = (part,)
        else:
            tensors[name] = parts(part, value) or (replace(part, get=partial(_host_copy, value)),)
    return replace(state, tensors=tensors)


def to_fill(state: ShardedState, parts: Parts) -> ShardedState:
    """Return `state` whose slices of device tensors are fresh host memory, and are uploaded when they are filled."""
    tensors: dict[str, tuple[Slice, ...]] = {}
    for name, (part,) in state.tensors.items():
        value = part.get()
        if value.is_cpu:
            tensors[name] = (part,)
            continue
        tensors[name] = parts(part, value) or (
            replace(
                part,
                get=partial(_room, tuple(value.shape), value.dtype),
                commit=_then(partial(_fill, value), part.commit, value),
                is_new=True,
            ),
        )
    return replace(state, tensors=tensors)


def room_for(box: Box, dtype: torch.dtype) -> Tensor:
    """Return uninitialised host memory for a part of a tensor."""
    return _room(box.size, dtype)


def _host_copy(value: Tensor) -> Tensor:
    return value.detach().cpu()


def _room(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cpu")


def _fill(value: Tensor, filled: Tensor) -> None:
    with torch.no_grad():
        value.copy_(upload(filled, value.device))


def _then(
    fill: Callable[[Tensor], None], commit: Callable[[Tensor], None], value: Tensor
) -> Callable[[Tensor], None]:
    def both(filled: Tensor) -> None:
        fill(filled)
        commit(value)

    return both


def move(model: nn.Module, device: torch.device) -> None:
    """Bring a model to the device, in place; unlike `Module.to` on XLA, what is tied stays tied."""
    moved: dict[int, Tensor] = {}

    def there(x: Tensor) -> Tensor:
        found = moved.get(id(x))
        if found is None:
            found = x.detach().to(device)
            if isinstance(x, Parameter):
                found = Parameter(found, x.requires_grad)
                found.grad = None if x.grad is None else x.grad.to(device)
            moved[id(x)] = found
        return found

    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, x in held.items():
                if x is not None and x.device != device:
                    held[name] = there(x)  # type: ignore[assignment]


def take_over(values: dict[str, Any], collectives: Collectives) -> None:
    """Give tensors, in host memory or on the device, rank 0's values. Collective."""
    held = {name: x for name, x in values.items() if isinstance(x, Tensor) and not x.is_meta}
    with torch.no_grad():
        for name, value in collectives.broadcast(
            {name: x.detach().cpu() for name, x in held.items()}
        ).items():
            held[name].copy_(value)
