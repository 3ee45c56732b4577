"""Copies to a device that run beside its computation."""

from __future__ import annotations

from typing import Any

import torch

from distrib.devices.base import Copier


class PlainCopier(Copier):
    """Copies when asked, on the device's current stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def start(self, x: torch.Tensor) -> Any:
        return x.to(self._device, non_blocking=True)

    def finish(self, started: Any) -> torch.Tensor:
        moved: torch.Tensor = started
        return moved


class StreamCopier(Copier):
    """Copies on a stream of its own; who uses the result waits on the device, not on the host.

    Pinned host memory (`DataLoader(pin_memory=True)`) is what lets the copy overlap.

    Args:
        device: One whose torch module has streams and events, such as a CUDA or XPU device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._module = device, torch.get_device_module(device)
        self._stream = self._module.Stream(device)

    def start(self, x: torch.Tensor) -> Any:
        with self._module.stream(self._stream):
            moved = x.to(self._device, non_blocking=True)
            done = self._stream.record_event()
        return x, moved, done  # `x` lives until it has been copied

    def finish(self, started: Any) -> torch.Tensor:
        _, moved, done = started
        current = self._module.current_stream(self._device)
        current.wait_event(done)
        found: torch.Tensor = moved
        found.record_stream(current)  # its memory is not given to others before this stream is done with it
        return found
