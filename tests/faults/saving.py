"""A training run whose state says of which step it is, and file operations that a test can hold, slow down or cut."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from distrib import Accelerator, RunConfig
from distrib.checkpoint import open_checkpoint, verify
from distrib.checkpoint.storage import Storage
from distrib.checkpoint.store import Store
from distrib.collectives.single import SingleCollectives

OPERATIONS = [name for name in vars(Storage) if not name.startswith("_")]


class Counter:
    """A user's own object."""

    value = 0

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


class Job:
    """A run in which all weights, moments and the user's object are equal to `value`, which is the step by default."""

    def __init__(self, folder: Path | str, **checkpoint):
        self.accelerator = Accelerator(
            RunConfig(
                device="cpu", seed=0, project_dir=str(folder), checkpoint={"keep_last": 1, **checkpoint}
            )
        )
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 1))
        self.model, self.optimizer = self.accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
        self.counter = Counter()
        self.accelerator.register_for_checkpointing(self.counter)

    @property
    def step(self) -> int:
        return self.optimizer.num_steps

    def advance(self, value: int | None = None) -> None:
        """Train one step, and mark everything with its value."""
        self.accelerator.backward(self.model(torch.ones(2, 64)).mean())
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.counter.value = self.step if value is None else value
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.fill_(self.counter.value)
            for state in self.optimizer.state.values():
                state["exp_avg"].fill_(self.counter.value)


def stored_value(path: Path) -> int:
    """Return the one value that every part of a checkpoint agrees on, after reading every byte of it."""
    verify(path)
    with open_checkpoint(path, SingleCollectives()) as reader:
        names = [name for name in reader.specs() if name.startswith(("model/", "optimizer/exp_avg."))]
        assert len(names) == 8
        found = {reader.custom[0]["value"], *torch.cat([reader.tensor(x).flatten() for x in names]).tolist()}
    (value,) = found
    return int(value)


def before_each_operation(act: Callable[[str], object]) -> None:
    """Call `act` with its name before each file operation of all saves of this process from now on."""
    for name in OPERATIONS:
        setattr(Storage, name, _led_by(act, name, getattr(Storage, name)))


def _led_by(act, name, operation):
    def method(self, *args):
        act(name)
        return operation(self, *args)

    return method


def slow_disk(delay_s: float, operations: tuple[str, ...] = ("write",)) -> None:
    """Let each of these operations take that much longer."""
    never = threading.Event()
    before_each_operation(lambda name: name in operations and never.wait(delay_s))


def hold_writes(holding: Path, until: Path) -> None:
    """Say that the first write has been reached by a file of the process's id, and go on when `until` exists."""
    before_each_operation(lambda name: name == "write" and _hold(holding, until))


def hold_uploads(holding: Path, until: Path) -> None:
    """The same for an object store."""
    writing = Store.writing

    def held(self, name, size):
        _hold(holding, until)
        return writing(self, name, size)

    Store.writing = held


def _hold(holding: Path, until: Path) -> None:
    tick = threading.Event()
    (holding / f"{os.getpid()}.pid").touch()
    while not until.exists():
        tick.wait(0.01)
