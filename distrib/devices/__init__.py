"""What the ranks compute on. Every question about hardware is answered in this package."""

from __future__ import annotations

from distrib.devices.base import DeviceBackend, Memory, too_few_devices
from distrib.errors import TopologyError
from distrib.registry import Registry

__all__ = ["DEVICES", "DeviceBackend", "Memory", "choose_device", "initialized_devices"]

DEVICES: Registry[type[DeviceBackend]] = Registry(
    "device",
    "distrib.devices",
    {
        "cuda": "distrib.devices.cuda:CudaDevice",
        "xpu": "distrib.devices.xpu:XpuDevice",
        "mps": "distrib.devices.mps:MpsDevice",
        "cpu": "distrib.devices.cpu:CpuDevice",
    },
)


def choose_device(
    requested: str, local_world_size: int, *, where: str | None = None
) -> tuple[DeviceBackend, str]:
    """Return the device back-end to use, not bound yet, and the reason for it in one line.

    Args:
        requested: A name in `DEVICES`, or "auto": the first accelerator that is available, else the CPU.
        local_world_size: Number of ranks on this node; each needs an accelerator of its own.
        where: Where the request was made, to name in an error: "train.yaml:3 (device)".

    Raises:
        ConfigError: if no device has this name (D0101).
        TopologyError: if the requested device is not available (D0210), or if there are too few (D0211).
    """
    if requested == "auto":
        backend, reason = _first_available(local_world_size)
    else:
        backend, reason = _requested(requested, where)
    if 0 < backend.count() < local_world_size:
        raise too_few_devices(backend, local_world_size, where=where)
    return backend, reason


def initialized_devices() -> list[str]:
    """Return the devices that this process has touched already, so that a child it forks could not use them."""
    return [name for name in DEVICES.builtin if DEVICES.get(name)().initialized()]


def _first_available(local_world_size: int) -> tuple[DeviceBackend, str]:
    refused = []
    for name in (name for name in DEVICES if name != "cpu"):
        backend = DEVICES.get(name)()
        usable, reason = backend.available()
        if usable and local_world_size > 1 and backend.comm_backend is None:
            usable, reason = False, f"{local_world_size} ranks cannot talk to each other on it"
        if usable:
            return backend, f"device {name}: {reason}"
        refused.append(f"{name}: {reason}")
    return DEVICES.get("cpu")(), f"device cpu: no accelerator can be used ({'; '.join(refused)})"


def _requested(name: str, where: str | None) -> tuple[DeviceBackend, str]:
    backend = DEVICES.get(name)()
    usable, reason = backend.available()
    if usable:
        return backend, f"requested, {reason}"
    raise TopologyError(
        "D0210",
        f"device {name!r} is not available: {reason}",
        where=where,
        fix="set device: auto, which takes what is there, or install a driver and a torch build for it",
    )
