"""What the device, the collectives and the strategy of XLA share: torch-xla's runtime, and when a recorded graph runs.

torch-xla is imported when a run has chosen XLA, not before.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import torch

from distrib.devices.base import Copier, DeviceBackend

_GOOGLE: Final = "0x1ae0"  # PCI vendor
# PCI devices, as torch_xla 2.9 lists them in torch_xla/_internal/tpu.py
_CHIPS: Final = frozenset({"0x0027", "0x005e", "0x0063", "0x006f", "0x0056", "0x0062", "0x0076"})
_PCI: Final = Path("/sys/bus/pci/devices")


class PjrtBackend(DeviceBackend):
    """A device of PJRT, as strategy and collectives see it.

    Attributes:
        graph: When what was recorded runs.
        lay_out: Says how a batch's tensor lies over the devices of an SPMD mesh; None puts it on the one device.
        on_host: Whether values travel between ranks through host memory, because the devices cannot talk.
    """

    def __init__(self) -> None:
        self.graph = Graph()
        self.lay_out: Callable[[torch.Tensor], Any] | None = None
        self.on_host = False


class Graph:
    """When what a script has recorded is compiled and runs: in its barrier, or when a value is read.

    Attributes:
        has_backward: Whether gradients have been recorded since the last barrier; they wait for the optimizer.
    """

    def __init__(self) -> None:
        self.has_backward = self._was_cut = False
        self._compiled_before = 0

    def begin(self) -> None:
        """Count compilations from now on."""
        self._compiled_before = compilations()

    def cut(self) -> int:
        """Run what has been recorded; do not wait for it.

        Returns:
            How many graphs have been compiled since the last call.
        """
        importlib.import_module("torch_xla").sync()
        self.has_backward, self._was_cut = False, True
        before, self._compiled_before = self._compiled_before, compilations()
        return self._compiled_before - before

    def run(self, *, wait: bool = False) -> None:
        """Run what has been recorded without ending the step: it is about to be read.

        Args:
            wait: Return when it has run; who reads shards needs that, since torch-xla looks for them at once.
        """
        importlib.import_module("torch_xla").sync(wait=wait)

    def end_of_batch(self) -> None:
        """Cut behind a batch for which nobody else does: an evaluation would record itself without end.

        What a training loop does after its step is left to the graph of the next one.
        """
        if not (self.has_backward or self._was_cut):
            self.cut()
        self._was_cut = False


class XlaCopier(Copier):
    """Copies in the background with torch-xla's own upload, each tensor straight to where it lies on the mesh.

    torch-xla's `MpDeviceLoader` also reads the data set in a thread, where random draws of its items would race with
    the script's, and cuts the graph at each batch; here both stay with the loop.

    Args:
        device: Where to.
        lay_out: As in `PjrtBackend`.
        graph: Is told that the loop asks for its next batch.
    """

    def __init__(
        self, device: torch.device, lay_out: Callable[[torch.Tensor], Any] | None, graph: Graph
    ) -> None:
        self._device, self._lay_out, self._graph = device, lay_out, graph
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="distrib-upload")

    def start(self, x: torch.Tensor) -> Any:
        return x if not x.is_cpu else self._thread.submit(self._send, x)

    def finish(self, started: Any) -> torch.Tensor:
        found: torch.Tensor = started.result() if isinstance(started, Future) else started
        return found

    def next_batch(self) -> None:
        self._graph.end_of_batch()

    def _send(self, x: torch.Tensor) -> torch.Tensor:
        return upload(x, self._device, None if self._lay_out is None else self._lay_out(x))


def upload(x: torch.Tensor, device: torch.device, layout: Any = None) -> torch.Tensor:
    """Return a copy of a CPU tensor on the device.

    Args:
        x: Any tensor.
        device: Where to.
        layout: A `ShardingSpec` of torch-xla; None for the whole tensor on each device.
    """
    with torch.no_grad():
        sent: list[torch.Tensor] = xla_model().send_cpu_data_to_device([x.detach()], device, layout)
    return sent[0]


def compilations() -> int:
    """Return how many graphs this process has compiled, or read from the persistent cache."""
    return int(importlib.import_module("torch_xla.debug.metrics").counter_value("UncachedCompile") or 0)


def pjrt_device(env: Mapping[str, str]) -> str | None:
    """Return what PJRT is going to use: PJRT_DEVICE, or "TPU" if one is attached; None if nobody asked for it."""
    asked_for = env.get("PJRT_DEVICE")
    return asked_for.partition("_")[0] if asked_for else ("TPU" if num_chips() else None)


def num_chips() -> int:
    """Return how many TPU chips the PCI bus shows; does not touch them."""
    return sum(
        _read(folder / "vendor") == _GOOGLE and _read(folder / "device") in _CHIPS
        for folder in (_PCI.iterdir() if _PCI.is_dir() else ())
    )


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:  # a device may go away meanwhile
        return ""


def xla_model() -> Any:
    """Return torch-xla's module of that name."""
    return importlib.import_module("torch_xla.core.xla_model")
