"""Parameters that are divided over ranks (torch's DTensor): which part lies here, and how parts come and go."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distrib.state import Box, Slice, TensorSpec, whole


def local_gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Return the gradients as they lie on this rank, plain tensors."""
    return [local(parameter.grad) for parameter in parameters if parameter.grad is not None]


def local(tensor: Tensor) -> Tensor:
    """Return what lies on this rank; the tensor itself, if it is not divided."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def num_parts(tensor: Tensor) -> int:
    """Return into how many different parts the whole is divided over the ranks."""
    if not isinstance(tensor, DTensor):
        return 1
    sizes = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    return math.prod(size for size, placement in sizes if not placement.is_replicate())


def is_divided_along(axis: str, parameter: Tensor) -> bool:
    """Whether ranks along an axis of the mesh hold different parts."""
    if not isinstance(parameter, DTensor):
        return False
    names = parameter.device_mesh.mesh_dim_names or ()
    return axis in names and not parameter.placements[names.index(axis)].is_replicate()


@contextmanager
def without_advice() -> Iterator[None]:
    """Keep torch from telling every rank that a tensor divided along two axes is gathered in two operations."""
    log = logging.getLogger("torch.distributed.tensor._redistribute")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _box(shard: DTensor) -> Box:
    """Return which part of the whole tensor lies on this rank; empty where there are fewer rows than ranks."""
    (chunk,) = shard.__create_chunk_list__()  # type: ignore[no-untyped-call]  # what torch's own checkpoints ask for
    return Box(tuple(chunk.offsets), tuple(chunk.sizes))


def slice_of(name: str, tensor: Tensor) -> Slice:
    """Describe what lies on this rank; its `get` is the live tensor."""
    if not isinstance(tensor, DTensor):
        return whole(name, tensor)
    here = tensor.to_local()
    return Slice(name, tuple(tensor.shape), tensor.dtype, _box(tensor), lambda: here)


def empty(spec: TensorSpec, parameter: nn.Parameter) -> Tensor:
    """Make optimizer state that is divided as its parameter is."""
    return torch.empty_like(parameter.detach(), dtype=spec.dtype)


def cut(value: Any, like: Tensor) -> Any:
    """Return this rank's part of optimizer state that every rank has whole."""
    if not isinstance(value, Tensor) or value.shape != like.shape or not isinstance(like, DTensor):
        return value
    mine = torch.empty_like(like.detach(), dtype=value.dtype)
    assert isinstance(mine, DTensor)
    mine.to_local().copy_(_part(value, _box(like)))
    return mine


def put(parameter: Tensor, value: Tensor) -> None:
    """Fill this rank's part of a parameter from the whole value."""
    if isinstance(parameter, DTensor):
        parameter.to_local().copy_(_part(value, _box(parameter)))
    else:
        parameter.copy_(value)


def _part(tensor: Tensor, box: Box) -> Tensor:
    for dim, (start, size) in enumerate(zip(box.start, box.size, strict=True)):
        tensor = tensor.narrow(dim, start, size)
    return tensor


@torch.no_grad()
def take_back(shard: DTensor, now: Tensor) -> None:
    """Let the part that lies here be what the whole has become, unless it is that already."""
    here, new = shard.to_local(), _part(now.detach(), _box(shard))
    if not torch.equal(here.to(new.dtype), new):
        here.copy_(new)
