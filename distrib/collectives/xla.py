"""Collectives of ranks on XLA devices.

What ranks tell each other, and what they gather for people to read, travels through host memory over gloo: its sizes
change, and on the device each of them would be one more graph to compile. Sums in inner loops stay on the device.
"""

from __future__ import annotations

import importlib
from typing import Final

import torch
import torch.distributed as dist

from distrib.collectives.base import ReduceOp
from distrib.collectives.process_group import ProcessGroupCollectives
from distrib.devices.xla_runtime import PjrtBackend, xla_model
from distrib.errors import TopologyError

_OPS: Final = {"sum": "REDUCE_SUM", "mean": "REDUCE_SUM", "max": "REDUCE_MAX", "min": "REDUCE_MIN"}


class XlaCollectives(ProcessGroupCollectives):
    """Collectives over gloo, with sums on the device where its ranks can talk. Collective.

    Args:
        backend: The device's; its `on_host` says that the ranks' devices cannot talk.
        device: This rank's device.
        owned: As for the class above this one.

    Raises:
        TopologyError: D0892, if the script's own process group is of torch-xla and would not reduce anything.
    """

    def __init__(self, backend: PjrtBackend, device: torch.device, *, owned: bool) -> None:
        super().__init__(device, owned=owned)
        self.device = torch.device("cpu")  # where buffers of several tensors are packed
        self._on_host = backend.on_host
        check_own_group(self.world_size, backend.name)

    def all_reduce_(self, tensor: torch.Tensor, op: ReduceOp = "sum") -> torch.Tensor:
        if tensor.is_cpu:
            return super().all_reduce_(tensor, op)
        if self._on_host:
            return tensor.copy_(super().all_reduce_(tensor.detach().cpu(), op))
        model = xla_model()
        scale = 1 / self.world_size if op == "mean" else 1.0
        model.all_reduce(getattr(model, _OPS[op]), [tensor], scale=scale)
        return tensor

    def all_to_all(self, rows: torch.Tensor) -> torch.Tensor:
        return super().all_to_all(rows.cpu()).to(rows.device)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return super().all_gather(tensor.cpu()).to(tensor.device)


def check_own_group(world_size: int, kind: str) -> None:
    """Refuse a process group of torch-xla whose operations hand their input back.

    Raises:
        TopologyError: D0892, with both numbers of ranks.
    """
    if kind not in dist.get_backend_config():  # such as "cpu:gloo,xla:xla"
        return
    seen = int(importlib.import_module("torch_xla.runtime").world_size())
    if seen != world_size:
        raise ranks_disagree(seen, world_size, "the script's own process group")


def ranks_disagree(seen: int, expected: int, source: str) -> TopologyError:
    """Return the error of a world that torch-xla and others count differently: its operations would reduce nothing."""
    return TopologyError(
        "D0892",
        f"torch_xla sees {seen} rank{'s' if seen != 1 else ''}, {source} says {expected}; an all_reduce over devices "
        "would return its input as it is, without a word",
        where="xla.host_collectives",
        fix="start one process for each device with `distrib launch`; on the CPU client, which has no operations "
        "between processes, leave xla.host_collectives out or true, and init_process_group to the Accelerator",
    )
