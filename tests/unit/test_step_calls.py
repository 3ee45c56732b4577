"""A step costs few Python calls of ours, however many layers the model has: `benchmarks steps` counts all of them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import distrib
from distrib import Accelerator, RunConfig

PACKAGE = str(Path(distrib.__file__).parent)
MOST = 25


def _own_calls(layers: int, settings: dict[str, object], *, counts: bool) -> int:
    accelerator = Accelerator(RunConfig(device="cpu", **settings))
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)

    def step() -> None:
        with accelerator.accumulate(model):
            loss = model(torch.ones(2, 4)).sum()
            accelerator.backward(loss, count=2 if counts else None)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

    step()
    found = 0

    def note(frame: object, event: str, _: object) -> None:
        nonlocal found
        found += event == "call" and frame.f_code.co_filename.startswith(PACKAGE)  # type: ignore[attr-defined]

    sys.setprofile(note)
    try:
        step()
    finally:
        sys.setprofile(None)
    return found


@pytest.mark.parametrize("settings", [{}, {"mixed_precision": "bf16"}], ids=str)
@pytest.mark.parametrize("counts", [False, True])
def test_a_step_has_few_calls_and_no_more_with_many_layers(settings: dict[str, object], counts: bool) -> None:
    few, many = (_own_calls(layers, settings, counts=counts) for layers in (2, 60))
    assert few == many <= MOST
