"""Random states of one rank: Python, numpy's legacy generator, torch on the CPU and on the device."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from distrib.devices.base import DeviceBackend


def capture(device: DeviceBackend | None = None) -> dict[str, Any]:
    """Return the states of this process's global generators, and of the bound device's where it has one."""
    state = {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),  # the user's data code may draw from the legacy one
        "torch": torch.get_rng_state(),
    }
    on_device = device.rng_state() if device is not None else None
    if device is not None and on_device is not None:
        state |= {"device": on_device, "device_name": device.name}
    return state


def restore(state: Mapping[str, Any], device: DeviceBackend | None = None) -> None:
    """Put back what `capture` returned; the device's state only on a device of the same kind."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if device is not None and state.get("device_name") == device.name:
        device.set_rng_state(state["device"])
