"""The seam of a device: every question about hardware is asked here and nowhere else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch

from distrib.errors import TopologyError


@dataclass(frozen=True)
class Memory:
    """Bytes of device memory: in use by this process, and in all."""

    used_bytes: int
    total_bytes: int


class Copier(ABC):
    """Brings tensors to a device, while it computes if it can."""

    @abstractmethod
    def start(self, x: torch.Tensor) -> Any:
        """Begin to copy; return what `finish` needs."""

    @abstractmethod
    def finish(self, started: Any) -> torch.Tensor:
        """Return the copy, which the device's current stream may use."""

    def next_batch(self) -> None:
        """Note that the loop asks for its next batch: it has given all the work of the last one."""
        return None


class DeviceBackend(ABC):
    """One kind of device. A new kind is one file with a subclass and one line in `distrib.devices`.

    An instance is bound to one local rank by `bind` before any other question about *its* device is asked;
    `available` and `count` may be asked at any time and touch no device context.
    """

    name: ClassVar[str]
    """torch's device type: "cpu", "cuda"."""
    comm_backend: ClassVar[str | None]
    """torch.distributed back-end for tensors on this device: "gloo", "nccl"; None where there is none."""
    env: Mapping[str, str] = MappingProxyType({})
    """The process's environment, where some devices are told what to use."""
    has_ring_attention: ClassVar[bool] = False
    """Whether torch has attention over parts of sequences, between which keys and values travel."""

    @abstractmethod
    def available(self) -> tuple[bool, str]:
        """Whether this machine has such a device, and the reason in a few words."""

    def check_installation(self) -> None:
        """Refuse an installation that cannot work, before it is used.

        Raises:
            TopologyError: with the versions that do not go together.
        """
        return None

    @abstractmethod
    def count(self) -> int:
        """How many ranks of one node may have a device of their own; for the CPU, any number: returns 0."""

    @abstractmethod
    def bind(self, local_rank: int) -> torch.device:
        """Make the device of this local rank the current one and return it.

        Raises:
            TopologyError: if the node has fewer devices than local ranks.
        """

    @abstractmethod
    def supports(self, dtype: torch.dtype) -> tuple[bool, str]:
        """Whether computing in `dtype` works on the bound device, and the reason in a few words.

        `torch.float8_e4m3fn` asks for matrix products in float8, as `mixed_precision: fp8` has them.
        """

    @abstractmethod
    def seed(self, seed: int) -> None:
        """Seed the device's own random generator, if it has one."""

    @abstractmethod
    def rng_state(self) -> torch.Tensor | None:
        """Return the state of the device's own generator as a CPU uint8 tensor; None where it has none."""

    @abstractmethod
    def set_rng_state(self, state: torch.Tensor) -> None:
        """Restore what `rng_state` returned."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until all work queued on the device is done."""

    @abstractmethod
    def memory(self) -> Memory:
        """Return the memory in use and in all, in bytes."""

    def initialized(self) -> bool:
        """Whether this process has touched the device already, so that a child it forks could not use it."""
        return False

    @abstractmethod
    def empty_cache(self) -> None:
        """Give unused cached memory back to the device."""

    def copier(self, device: torch.device) -> Copier | None:
        """Return what brings batches to `device`; None where they are there already."""
        return None


def check_local_rank(backend: DeviceBackend, local_rank: int) -> None:
    """Refuse a local rank that has no device of its own; for the implementers of `bind`.

    Raises:
        TopologyError: if the node has fewer devices than local ranks (D0211).
    """
    if local_rank >= backend.count():
        raise too_few_devices(backend, local_rank + 1, where=None)


def too_few_devices(backend: DeviceBackend, needed: int, *, where: str | None) -> TopologyError:
    """Return the error that says how many devices are visible and how many ranks need one."""
    return TopologyError(
        "D0211",
        f"{needed} ranks on this node, but {backend.count()} {backend.name} visible; expected one each",
        where=where,
        fix=f"start {max(1, backend.count())} on this node, set device: cpu, or make more devices visible "
        "(with Slurm, --gpu-bind=none where each task sees only its own)",
    )
