"""How values move between ranks."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from distrib.collectives.base import Collectives
from distrib.collectives.process_group import check_existing_group, connect, connected_ranks
from distrib.collectives.single import SingleCollectives
from distrib.devices.base import DeviceBackend
from distrib.errors import TopologyError
from distrib.registry import Registry
from distrib.topology import Topology

__all__ = ["Collectives", "connect_ranks", "connected_ranks"]

# device -> collectives of its own, made from its back-end; the others have a back-end of torch.distributed
_OF_DEVICE: Registry[Any] = Registry(
    "collectives", "distrib.collectives", {"xla": "distrib.collectives.xla:XlaCollectives"}
)


def connect_ranks(
    topology: Topology,
    backend: DeviceBackend,
    device: torch.device,
    timeout_s: float,
    *,
    rendezvous_timeout_s: float | None = None,
) -> Collectives:
    """Return the collectives of this topology; a world of one has no process group. Collective.

    Args:
        topology: Who this rank is.
        backend: The kind of its device.
        device: Its device.
        timeout_s: Seconds after which a collective that a peer does not join fails.
        rendezvous_timeout_s: Seconds to wait for the others at the start; `timeout_s` by default.

    Raises:
        TopologyError: if the device has no communication back-end, the ranks cannot meet, or the script's own
            process group has other ranks.
    """
    if topology.world_size == 1:
        check_existing_group(topology)
        return SingleCollectives()
    if backend.comm_backend is None:
        raise TopologyError(
            "D0292",
            f"device {backend.name} has no communication back-end, but the world size is {topology.world_size}",
            fix="start one process, or use device: cpu",
        )
    make = partial(_OF_DEVICE.get(backend.name), backend) if backend.name in _OF_DEVICE.builtin else None
    return connect(
        topology, backend.comm_backend, device, timeout_s, rendezvous_timeout_s or timeout_s, make=make
    )
