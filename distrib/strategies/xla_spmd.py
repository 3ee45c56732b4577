"""One program for all XLA devices: a mesh of them, along which the compiler divides batches and parameters (SPMD).

A process sees one device and whole tensors; annotations say how they lie. Batches are divided over all devices; with
`mesh.shard` parameters and optimizer state are divided over the devices of that axis, as in FSDP.
"""

from __future__ import annotations

import importlib
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from distrib.collectives.trees import tensors
from distrib.devices.xla_runtime import Graph
from distrib.logging import notice
from distrib.state import Box, Runtime, Slice, TensorSpec
from distrib.strategies.blocks import outermost
from distrib.strategies.xla_state import room_for, take_over

_SHARD: Final = "fsdp"  # what torch-xla's FSDP calls the axis
_DATA: Final = ("replicate", _SHARD)  # along both of them a batch's rows are divided

Partition = tuple[Any, ...]  # for each dim of a tensor the axes along which it is divided, or None


class Spmd:
    """How tensors lie over the mesh.

    Args:
        runtime: The run's.
        graph: The device's.
    """

    alone = True  # gradients are those of the whole batch already

    def __init__(self, runtime: Runtime, graph: Graph) -> None:
        self.runtime, self._graph = runtime, graph
        self._spmd: Any = importlib.import_module("torch_xla.distributed.spmd")
        sizes = tuple(runtime.mesh.size(axis) for axis in ("replicate", "shard"))
        self._devices, self._shards = sizes[0] * sizes[1], sizes[1]
        self._mesh = self._spmd.Mesh(np.arange(self._devices), sizes, _DATA)
        self._spmd.set_global_mesh(self._mesh)
        self._partitions = WeakIdKeyDictionary()  # parameter -> its partition
        self._layouts: dict[int, Any] = {}  # dims of a batch's tensor -> its layout
        self._has_told = False

    def describe(self) -> str:
        """Say in one line what lies where."""
        divided = f"over {self._shards}" if self._shards > 1 else "whole on each"
        return (
            f"one program for {self._devices} devices; rows of a batch over all of them, parameters {divided}"
        )

    def lay_out(self, x: Tensor) -> Any:
        """Return the layout of a batch's tensor: rows over all devices; None, for a copy on each, if they do not fit."""
        if not x.dim() or not x.shape[0] or x.shape[0] % self._devices:
            self._tell_of_rows(x)
            return None
        if x.dim() not in self._layouts:
            self._layouts[x.dim()] = self._spmd.ShardingSpec(self._mesh, self._by_rows(x))
        return self._layouts[x.dim()]

    def equalise(self, model: nn.Module) -> None:
        """Give every process rank 0's parameters and buffers: one program has one model. Collective."""
        if self.runtime.collectives.world_size > 1:
            take_over(dict(model.state_dict(keep_vars=True)), self.runtime.collectives)

    def wrap(self, model: nn.Module) -> nn.Module:
        """Annotate a model's parameters; with shards, return torch-xla's FSDP around it."""
        self.annotate(model)
        if self._shards == 1:
            return model
        self._annotate_blocks(model)
        # torch_xla's FSDP hooks into the backward of the model, whose inputs need no gradient
        warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
        wrapped: nn.Module = _fsdp()(
            model, mesh=self._mesh, shard_output=lambda output, _: self._divide(output)
        )
        return wrapped.train(model.training)

    def annotate(self, model: nn.Module) -> None:
        """Say how a model's parameters lie, and leave the model as it is."""
        for parameter in model.parameters():
            self._annotate(parameter)

    def unwrap(self, model: nn.Module) -> nn.Module:
        """Return the user's module."""
        inner: Any = getattr(model, "_orig_mod", model)
        if not isinstance(inner, _fsdp()):
            return model
        found: nn.Module = inner.module
        return found

    def average(self, model: nn.Module) -> None:
        """Do nothing: the gradient of a global mean is the average."""

    def spread_buffers(self, model: nn.Module) -> None:
        """Do nothing: one program has one set of buffers."""

    def parts_to_save(self, part: Slice, value: Tensor) -> tuple[Slice, ...] | None:
        """Return the parts of a divided tensor that lie on this process's devices; None for one that is whole."""
        if not self._is_divided(value):
            return None
        shards = _Shards(self._spmd.wrap_if_sharded(value))
        return tuple(
            replace(part, where=box, get=partial(shards.take, index))
            for index, (replica, box) in enumerate(shards.boxes)
            if replica == 0
        )

    def parts_to_fill(self, part: Slice, value: Tensor) -> tuple[Slice, ...] | None:
        """Return host memory for the parts of a divided tensor; it is uploaded when all of them are there."""
        if not self._is_divided(value):
            return None
        shards = _Shards(self._spmd.wrap_if_sharded(value))
        boxes = list(dict.fromkeys(box for _, box in shards.boxes))
        return tuple(
            replace(
                part,
                where=box,
                get=partial(room_for, box, value.dtype),
                commit=partial(shards.put, box, len(boxes)),
                is_new=True,
            )
            for box in boxes
        )

    def empty_for(self, spec: TensorSpec, parameter: nn.Parameter) -> Tensor:
        """Return memory for optimizer state of a parameter's shape, which lies as the parameter does."""
        made = torch.empty(spec.shape, dtype=spec.dtype, device=parameter.device)
        if parameter in self._partitions:
            self._spmd.mark_sharding(made, self._mesh, self._partitions[parameter])
        return made

    @contextmanager
    def open(self, model: nn.Module) -> Iterator[None]:
        """Let the body see and change whole parameters; a changed one would lie whole on each device from then on."""
        yield
        self._graph.run(wait=True)  # what is still under way can get no annotation
        for parameter in self.unwrap(model).parameters():
            if parameter in self._partitions and any(self._partitions[parameter]):
                self._spmd.clear_sharding(parameter)
                self._annotate(parameter)
        self._graph.run()

    def _annotate(self, parameter: nn.Parameter) -> None:
        """Divide a parameter along its longest dim, as torch-xla's FSDP does; or say that it lies whole everywhere."""
        partition: list[str | None] = [None] * parameter.dim()
        if self._shards > 1 and parameter.dim():
            partition[parameter.shape.index(max(parameter.shape))] = _SHARD
        self._partitions[parameter] = tuple(partition)
        self._spmd.mark_sharding(parameter, self._mesh, tuple(partition))

    def _annotate_blocks(self, model: nn.Module) -> None:
        """Keep the repeated blocks of a model apart: their outputs lie by rows, their backwards are not merged."""
        names, _ = outermost(model, None)
        for name in names:
            block = model.get_submodule(name)
            block.register_forward_hook(lambda _, __, output: self._divide(output))
            self._spmd.apply_backward_optimization_barrier(block)

    def _divide(self, output: Any) -> None:
        for x in tensors(output):
            if x.dim() and x.shape[0] and not x.shape[0] % self._devices:
                self._spmd.mark_sharding(x, self._mesh, self._by_rows(x))

    def _by_rows(self, x: Tensor) -> Partition:
        return (_DATA, *[None] * (x.dim() - 1))

    def _is_divided(self, value: Tensor) -> bool:
        wrapped = self._spmd.wrap_if_sharded(value)
        kinds = self._spmd.ShardingType
        return hasattr(wrapped, "sharding_type") and wrapped.sharding_type not in (
            kinds.REPLICATED,
            kinds.MAXIMAL,
        )

    def _tell_of_rows(self, x: Tensor) -> None:
        if x.dim() and not self._has_told and self.runtime.topology.is_main:
            self._has_told = True
            notice(
                f"warning: xla.spmd: a tensor of shape {tuple(x.shape)} in a batch has no multiple of {self._devices} "
                "rows, so each device computes all of it; choose a batch size that the number of devices divides"
            )


class _Shards:
    """The parts of one tensor on this process's devices; reads them all at the first request, since torch-xla does.

    Attributes:
        boxes: (number of the replica, where) of each part.
    """

    def __init__(self, tensor: Any) -> None:
        self._tensor, self._shape = tensor, tuple(tensor.shape)
        core = importlib.import_module("torch_xla")._XLAC
        found = core._get_local_shard_replica_and_indices([tensor.global_tensor])[0]
        self.boxes = [(replica, self._box(indices)) for replica, indices in found]
        self._data: dict[int, Tensor] = {}
        self._filled: dict[Box, Tensor] = {}
        self._lock = threading.Lock()

    def take(self, index: int) -> Tensor:
        """Return a copy of a part; each may be taken once before all are read again."""
        with self._lock:
            if index not in self._data:
                self._data = {i: shard.data for i, shard in enumerate(self._tensor.local_shards)}
            return self._data.pop(index)[self._without_padding(index)]

    def put(self, box: Box, number: int, filled: Tensor) -> None:
        """Take a part's new values; upload them when all `number` parts have come."""
        self._filled[box] = filled
        if len(self._filled) < number:
            return
        shards = self._tensor.local_shards
        for index, (shard, (_, where)) in enumerate(zip(shards, self.boxes, strict=True)):
            shard.data[self._without_padding(index)] = self._filled[where]
        self._tensor.load_local_shards_(shards)
        self._filled.clear()

    def _without_padding(self, index: int) -> tuple[slice, ...]:
        return tuple(slice(0, size) for size in self.boxes[index][1].size)

    def _box(self, indices: Any) -> Box:
        if indices is Ellipsis:
            return Box((0,) * len(self._shape), self._shape)
        return Box(tuple(x.start for x in indices), tuple(x.stop - x.start for x in indices))


def _fsdp() -> Any:
    module = importlib.import_module("torch_xla.experimental.spmd_fully_sharded_data_parallel")
    return module.SpmdFullyShardedDataParallel
