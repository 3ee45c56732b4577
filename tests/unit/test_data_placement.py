"""Batches on their way to a device: begun ahead, as many as asked for, and in order."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distrib.data.options import Round
from distrib.data.placement import placed
from distrib.devices.copying import PlainCopier


class Watched(PlainCopier):
    """Writes down when a copy begins and ends."""

    def __init__(self, log: list[str]) -> None:
        super().__init__(torch.device("cpu"))
        self._log = log

    def start(self, x: torch.Tensor) -> Any:
        self._log.append(f"start {int(x)}")
        return super().start(x)

    def finish(self, started: Any) -> torch.Tensor:
        self._log.append(f"finish {int(started)}")
        return super().finish(started)

    def next_batch(self) -> None:
        self._log.append("next")


def rounds(n: int, log: list[str]) -> Any:
    for i in range(n):
        log.append(f"read {i}")
        step: Any = None
        yield Round(step, (), (), [{"x": torch.tensor(i), "name": str(i)}])


def options(copier: Any, prefetch: int) -> Any:
    backend = SimpleNamespace(copier=lambda device: copier)
    return SimpleNamespace(device_backend=backend, device=torch.device("cpu"), prefetch=prefetch)


@pytest.mark.parametrize("prefetch", [0, 1, 2, 5])
def test_as_many_copies_are_under_way_as_are_asked_for(prefetch: int):
    log: list[str] = []
    found = []
    for each in placed(rounds(4, log), options(Watched(log), prefetch)):
        batch = each.batches[0]
        found.append((int(batch["x"]), batch["name"]))
        begun = sum(line.startswith("start") for line in log)
        assert begun == min(len(found) + prefetch, 4)
        assert log[-1] == f"finish {len(found) - 1}"
    assert found == [(i, str(i)) for i in range(4)]


@pytest.mark.parametrize("prefetch", [0, 2])
def test_the_device_hears_when_the_loop_has_done_with_a_batch(prefetch: int):
    log: list[str] = []
    for number, _ in enumerate(placed(rounds(3, log), options(Watched(log), prefetch))):
        assert log.count("next") == number
    assert log.count("next") == 3


def test_where_nothing_is_to_be_copied_the_rounds_are_handed_on():
    given = rounds(2, [])
    assert placed(given, options(None, 2)) is given
