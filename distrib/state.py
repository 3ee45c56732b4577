"""The values that flow between the parts: what is trained, where it lies, and where the data stand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from distrib.collectives.base import Collectives
from distrib.devices.base import DeviceBackend
from distrib.precision.policy import PrecisionPolicy
from distrib.topology import Mesh, Topology


@dataclass(frozen=True)
class Runtime:
    """All that a strategy may know about the run.

    Attributes:
        topology: This process's place in the job.
        mesh: How the ranks are laid out.
        device: This rank's device.
        device_backend: Its kind.
        collectives: All ranks.
        readers: The ranks that read different samples, this one among them; along other axes of the mesh the ranks of
            each such group read the same.
        precision: Number formats.
    """

    topology: Topology
    mesh: Mesh
    device: torch.device
    device_backend: DeviceBackend
    collectives: Collectives
    readers: Collectives
    precision: PrecisionPolicy


@dataclass(frozen=True)
class TrainState:
    """What `prepare` takes and gives, by role and in the order of preparation."""

    models: tuple[nn.Module, ...] = ()
    optimizers: tuple[Optimizer, ...] = ()
    schedulers: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class Box:
    """A hyper-rectangle of a tensor: start and size of each dim."""

    start: tuple[int, ...]
    size: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Interval:
    """Elements [start, stop) of a tensor flattened in row-major order."""

    start: int
    stop: int


def _nothing(_: torch.Tensor) -> None:
    """Commit of a slice whose `get` is the live tensor."""


@dataclass(frozen=True)
class Slice:
    """The part of one logical tensor that this rank holds.

    Attributes:
        name: "model/<fqn>" or "optimizer/<state>.<fqn>", with the plain module's fully qualified name.
        global_shape: Shape of the whole tensor.
        dtype: Its dtype.
        where: Which part this rank holds; the same part on several ranks is a replica.
        get: Returns the part as a tensor. Most strategies return the live tensor, to be filled in place.
        commit: Called with the filled tensor after a load; does nothing where `get` is live.
        is_new: Whether the tensor of `get` was made for this load and nobody has seen its memory: a load may give it other.
    """

    name: str
    global_shape: tuple[int, ...]
    dtype: torch.dtype
    where: Box | Interval
    get: Callable[[], torch.Tensor]
    commit: Callable[[torch.Tensor], None] = _nothing
    is_new: bool = False


def whole(name: str, tensor: torch.Tensor) -> Slice:
    """Describe a tensor that this rank holds completely; its `get` is the live tensor."""
    shape = tuple(tensor.shape)
    return Slice(name, shape, tensor.dtype, Box((0,) * len(shape), shape), lambda: tensor)


@dataclass(frozen=True)
class ShardedState:
    """What this rank holds of models and optimizers.

    Attributes:
        tensors: Logical name -> the slices of it that lie on this rank.
        objects: JSON-like values beside them: param groups by parameter names, scalar optimizer state.
        aliases: Name of a tied tensor -> the name under which it is stored.
    """

    tensors: Mapping[str, tuple[Slice, ...]]
    objects: Mapping[str, Any] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and dtype of a logical tensor as a checkpoint holds it."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class LoaderPosition:
    """Where a loader stands: valid at any world size and number of workers.

    Attributes:
        epoch: Index of the epoch that the next sample belongs to.
        seed: Seed of the sample order.
        consumed: Samples of that epoch already used, over all ranks; always a window's boundary. Batches, where the
            user's own batch sampler makes them.
        global_batch_size: Samples of one optimizer step, fixed at the run's first start.
        samples: Length of the data set; -1 if it has none.
        divided_by: Ranks that read streams of their own; 1 where all read the same data.
        stream: (position, what the data set's own `state_dict` returned there), where it has one.
    """

    epoch: int
    seed: int
    consumed: int
    global_batch_size: int
    samples: int = -1
    divided_by: int = 1
    stream: Any = None
