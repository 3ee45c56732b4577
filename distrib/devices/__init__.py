"""What the ranks compute on. Every question about hardware is answered in this package."""

from __future__ import annotations

from collections.abc import Mapping

from distrib.devices.base import DeviceBackend, Memory, too_few_devices
from distrib.errors import TopologyError
from distrib.registry import Registry

__all__ = ["DEVICES", "DeviceBackend", "Memory", "choose_device", "initialized_devices"]

DEVICES: Registry[type[DeviceBackend]] = Registry(
    "device",
    "distrib.devices",
    {
        "xla": "distrib.devices.xla:XlaDevice",
        "cuda": "distrib.devices.cuda:CudaDevice",
        "xpu": "distrib.devices.xpu:XpuDevice",
        "mps": "distrib.devices.mps:MpsDevice",
        "cpu": "distrib.devices.cpu:CpuDevice",
    },
)


def choose_device(
    requested: str, local_world_size: int, *, env: Mapping[str, str] | None = None, where: str | None = None
) -> tuple[DeviceBackend, str]:
    """Return the device back-end to use, not bound yet, and the reason for it in one line.

    Args:
        requested: A name in `DEVICES`, or "auto": the first accelerator that is available, else the CPU.
        local_world_size: Number of ranks on this node; each needs an accelerator of its own.
        env: The process's environment; without it a device that has to be asked for there is not taken by "auto".
        where: Where the request was made, to name in an error: "train.yaml:3 (device)".

    Raises:
        ConfigError: if no device has this name (D0101).
        TopologyError: if the requested device is not available (D0210), if there are too few (D0211), or if what drives
            it is installed in versions that do not go together (D0890).
    """
    if requested == "auto":
        backend, reason = _first_available(local_world_size, env or {})
    else:
        backend, reason = _requested(requested, env or {}, where)
    if 0 < backend.count() < local_world_size:
        raise too_few_devices(backend, local_world_size, where=where)
    return backend, reason


def initialized_devices() -> list[str]:
    """Return the devices that this process has touched already, so that a child it forks could not use them."""
    return [name for name in DEVICES.builtin if DEVICES.get(name)().initialized()]


def _backend(name: str, env: Mapping[str, str]) -> DeviceBackend:
    backend = DEVICES.get(name)()
    backend.env = env
    return backend


def _first_available(local_world_size: int, env: Mapping[str, str]) -> tuple[DeviceBackend, str]:
    refused = []
    for name in (name for name in DEVICES if name != "cpu"):
        backend = _backend(name, env)
        usable, reason = backend.available()
        if usable and local_world_size > 1 and backend.comm_backend is None:
            usable, reason = False, f"{local_world_size} ranks cannot talk to each other on it"
        if usable:
            return backend, f"device {name}: {reason}"
        refused.append(f"{name}: {reason}")
    return DEVICES.get("cpu")(), f"device cpu: no accelerator can be used ({'; '.join(refused)})"


def _requested(name: str, env: Mapping[str, str], where: str | None) -> tuple[DeviceBackend, str]:
    backend = _backend(name, env)
    backend.check_installation()
    usable, reason = backend.available()
    if usable:
        return backend, f"requested, {reason}"
    raise TopologyError(
        "D0210",
        f"device {name!r} is not available: {reason}",
        where=where,
        fix="set device: auto, which takes what is there, or install a driver and a torch build for it",
    )
