"""A save that fails or dies at any instant leaves the old checkpoint or the new one, whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distrib.checkpoint import Contents, latest, open_checkpoint, retain, save, verify
from distrib.checkpoint.storage import Storage
from distrib.collectives.single import SingleCollectives
from distrib.errors import CheckpointError
from distrib.state import ShardedState, whole

ALONE = SingleCollectives()
OPERATIONS = [name for name in vars(Storage) if not name.startswith("_")]
ROOT = Path(__file__).parents[2]


class NthFails(Storage):
    """Fails the nth operation from now on, and all later ones if `stuck`, as a full or lost disk would."""

    def __init__(self, nth, *, stuck, exchange=True):
        self.left, self.stuck, self.can_exchange = nth, stuck, exchange

    def count(self, name):
        self.left -= 1
        if self.left == 0 or (self.stuck and self.left < 0):
            raise OSError(5, f"injected into {name}")

    def exchange(self, a, b):
        self.count("exchange")
        return self.can_exchange and Storage.exchange(self, a, b)


def _counted(name):
    operation = getattr(Storage, name)

    def method(self, *args):
        if name == "close":  # a descriptor is closed whatever close says
            operation(self, *args)
            return self.count(name)
        self.count(name)
        return (
            None if name in ("sync", "sync_dir") else operation(self, *args)
        )  # no machine is switched off here

    return method


for _name in OPERATIONS:
    if _name != "exchange":
        setattr(NthFails, _name, _counted(_name))


def contents(value):
    tensors = {
        name: torch.full((50,), float(value)) for name in ("model/a", "model/b", "optimizer/exp_avg.a")
    }
    state = ShardedState({name: (whole(name, x),) for name, x in tensors.items()})
    return Contents(state=state, counters={"step": value}, custom=[{"value": value}])


def stored_value(directory):
    """Return the one value that every part of the checkpoint agrees on."""
    target = {name: torch.zeros(50) for name in ("model/a", "model/b", "optimizer/exp_avg.a")}
    state = ShardedState({name: (whole(name, x),) for name, x in target.items()})
    with open_checkpoint(directory, ALONE) as reader:
        reader.check(state)
        reader.fill(state)
        found = {
            reader.counters["step"],
            reader.custom[0]["value"],
            *torch.cat(list(target.values())).tolist(),
        }
    (value,) = found
    return value


def number_of_operations(directory, value, **options):
    probe = NthFails(10**9, stuck=False, **options)
    save(directory, contents(value), ALONE, storage=probe)
    return 10**9 - probe.left


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two-renames"])
@pytest.mark.parametrize("stuck", [False, True], ids=["one-failure", "all-fail-after"])
def test_whichever_operation_fails_a_whole_checkpoint_remains(tmp_path, stuck, exchange):
    target = tmp_path / "c"
    save(target, contents(0), ALONE, durable=False)
    total = number_of_operations(target, 0, exchange=exchange)
    outcomes = set()
    for nth in range(1, total + 1):
        before = stored_value(target)
        storage = NthFails(nth, stuck=stuck, exchange=exchange)
        try:
            save(target, contents(nth), ALONE, storage=storage)
            possible = {nth}
        except CheckpointError:
            possible = {before, nth} if stuck else {before}  # nothing can be undone on a disk that is lost
        assert stored_value(target) in possible, f"operation {nth} of {total}"
        outcomes.add(possible == {nth})
    assert outcomes == {False, True}  # tidying up may fail without failing the save
    save(target, contents(-1), ALONE, durable=False)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_whichever_operation_of_a_first_save_fails_nothing_or_all_is_there(tmp_path):
    total = number_of_operations(tmp_path / "probe", 0)
    for nth in range(1, total + 1):
        target = tmp_path / f"step-{nth}"
        try:
            save(target, contents(nth), ALONE, storage=NthFails(nth, stuck=True))
        except CheckpointError:
            assert not target.exists()
        else:
            assert stored_value(target) == nth


def test_a_retention_that_fails_removes_no_newer_checkpoint_and_shows_no_half_one(tmp_path):
    for nth in range(1, 40):
        for step in (1, 2, 3):
            save(tmp_path / f"step-{step}", contents(step), ALONE, durable=False)
        storage = NthFails(nth, stuck=True)
        try:
            retain(tmp_path, 1, storage=storage)
            done = storage.left > 0
        except CheckpointError:
            done = False
        assert latest(tmp_path) == tmp_path / "step-3"
        for path in tmp_path.glob("step-*"):
            verify(path)
        if done:
            break
    assert done


class NthKills(NthFails):
    """Kills this process, as the out-of-memory killer would, at the nth operation."""

    def count(self, name):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def killed_at(nth, target, value, **options):
    """Save in a child that is killed at its nth operation; return whether it got to the end instead."""
    child = os.fork()
    if not child:
        try:
            save(target, contents(value), ALONE, storage=NthKills(nth, stuck=False, **options))
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return not os.WIFSIGNALED(status)


def kill_at_every_operation(target, *, exchange):
    """Run by a process of its own, since it forks."""
    save(target, contents(0), ALONE)
    value, nth, ended = 0, 0, False
    while not ended:
        nth += 1
        ended = killed_at(nth, target, nth, exchange=exchange)
        found = stored_value(target)  # this also completes a swap that was cut in two
        assert found in (value, nth), f"operation {nth}: {found}"
        assert latest(target.parent, "step-") == target
        value = found
    assert value == nth
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    print(f"{nth - 1} kills survived")


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two-renames"])
def test_a_writer_killed_at_any_operation_leaves_a_whole_checkpoint(tmp_path, exchange):
    call = f"kill_at_every_operation(Path(sys.argv[1]), exchange={exchange})"
    script = (
        f"import sys; from pathlib import Path; from tests.faults.test_checkpoint_faults import *; {call}"
    )
    target = tmp_path / "saves" / "step-1"
    found = subprocess.run(
        [sys.executable, "-c", script, str(target)], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert found.returncode == 0, found.stderr
    assert "kills survived" in found.stdout
