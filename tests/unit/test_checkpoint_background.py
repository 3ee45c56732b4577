"""Saving while training goes on: `save_state(blocking=False)`."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from distrib import Accelerator, CheckpointError
from distrib.checkpoint import inspect, open_checkpoint, verify
from distrib.checkpoint.staging import Arena
from distrib.checkpoint.storage import Storage
from distrib.collectives.single import SingleCollectives


class Gate:
    """Holds back every write of a checkpoint until it is opened; then writes may fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, self.error = threading.Event(), None
        write = Storage.write

        def gated(storage: Storage, file: int, data: bytes | memoryview) -> None:
            assert self.opened.wait(30)
            if self.error is not None:
                raise self.error
            write(storage, file, data)

        monkeypatch.setattr(Storage, "write", gated)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch):
    gate = Gate(monkeypatch)
    yield gate
    gate.opened.set()


@pytest.fixture
def run(tmp_path: Path):
    accelerator = Accelerator(cpu=True, project_dir=tmp_path, seed=0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model, optimizer = accelerator.prepare(model, optimizer)
    step(model, optimizer)
    return accelerator, model, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def stored(path: Path) -> torch.Tensor:
    with open_checkpoint(path, SingleCollectives()) as reader:
        return reader.tensor("model/weight")


def test_it_stores_what_was_there_at_the_call_although_training_goes_on(run, gate, tmp_path):
    accelerator, model, optimizer = run
    before = model.weight.detach().clone()
    handle = accelerator.save_state(tmp_path / "c", blocking=False)
    step(model, optimizer)

    assert not handle.done
    assert not (tmp_path / "c").exists()
    gate.opened.set()
    assert handle.wait() == tmp_path / "c"
    assert handle.done
    assert torch.equal(stored(tmp_path / "c"), before)
    assert not torch.equal(model.weight, before)
    verify(tmp_path / "c")


def test_a_second_save_waits_for_the_first_and_does_not_touch_its_copies(run, gate, tmp_path):
    accelerator, model, optimizer = run
    before = model.weight.detach().clone()
    accelerator.save_state(tmp_path / "a", blocking=False)
    step(model, optimizer)
    threading.Timer(0.2, gate.opened.set).start()
    second = accelerator.save_state(tmp_path / "b", blocking=False)

    assert inspect(tmp_path / "a").counters["step"] == 1
    assert torch.equal(stored(tmp_path / "a"), before)
    second.wait()
    assert torch.equal(stored(tmp_path / "b"), model.weight)


@pytest.mark.parametrize("call", ["save_state", "load_state", "end_training"])
def test_an_error_surfaces_at_the_next_call_once(run, gate, tmp_path, call):
    accelerator, _, _ = run
    gate.error = OSError(28, "No space left on device")
    accelerator.save_state(tmp_path / "c", blocking=False)
    gate.opened.set()
    with pytest.raises(CheckpointError, match=r"D0714.*No space left"):
        getattr(accelerator, call)()

    gate.error = None
    assert not (tmp_path / "c").exists()
    assert list(tmp_path.glob(".*")) == []
    accelerator.save_state(tmp_path / "c")
    verify(tmp_path / "c")


def test_an_error_that_the_handle_has_told_is_not_told_again(run, gate, tmp_path):
    accelerator, _, _ = run
    gate.error = OSError(5, "Input/output error")
    handle = accelerator.save_state(tmp_path / "c", blocking=False)
    gate.opened.set()
    with pytest.raises(CheckpointError, match="Input/output error"):
        handle.wait()

    assert handle.wait() == tmp_path / "c"
    accelerator.end_training()


def test_an_error_that_nobody_waited_for_is_logged_at_the_end(tmp_path):
    ended = script(tmp_path, FAILS)

    assert ended.returncode == 0, ended.stderr
    assert "c was not saved" in ended.stderr
    assert "Input/output error" in ended.stderr


@pytest.mark.parametrize("end", ["end_training", "free_memory"])
def test_the_memory_of_the_copies_goes_with_the_end(run, tmp_path, end):
    accelerator, _, _ = run
    handle = accelerator.save_state(tmp_path / "c", blocking=False)
    handle.wait()
    memory = weakref.ref(accelerator._background.arena._memory)
    assert memory().numel() > 0
    getattr(accelerator, end)()
    gc.collect()

    assert memory() is None


def test_memory_that_is_freed_during_a_save_stays_until_it_is_written(run, gate, tmp_path):
    accelerator, model, _ = run
    weight = model.weight.detach().clone()
    handle = accelerator.save_state(tmp_path / "c", blocking=False)
    accelerator.free_memory()
    gate.opened.set()
    handle.wait()

    verify(tmp_path / "c")
    assert torch.equal(stored(tmp_path / "c"), weight)


def test_an_accelerator_that_nobody_uses_any_more_keeps_no_memory(tmp_path):
    accelerator = Accelerator(cpu=True, project_dir=tmp_path)
    accelerator.prepare(nn.Linear(4, 3))
    handle = accelerator.save_state(tmp_path / "c", blocking=False)
    handle.wait()
    background, arena = weakref.ref(accelerator._background), weakref.ref(accelerator._background.arena)
    del accelerator
    gc.collect()

    assert (background(), arena()) == (None, None)


def test_the_older_checkpoint_is_there_until_the_new_one_is_complete(run, gate, tmp_path):
    accelerator, model, optimizer = run
    gate.opened.set()
    accelerator.save_state(tmp_path / "c")
    old = stored(tmp_path / "c")
    gate.opened.clear()
    step(model, optimizer)
    handle = accelerator.save_state(tmp_path / "c", blocking=False)

    assert torch.equal(stored(tmp_path / "c"), old)
    gate.opened.set()
    handle.wait()
    assert torch.equal(stored(tmp_path / "c"), model.weight)


def test_old_checkpoints_go_only_when_the_new_one_is_complete(run, gate, tmp_path):
    accelerator, model, optimizer = run
    gate.opened.set()
    for _ in range(4):
        step(model, optimizer)
        handle = accelerator.save_state(blocking=False)
    handle.wait()

    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-00000003", "step-00000004", "step-00000005"]


def test_a_wrong_place_is_refused_at_once(run, tmp_path):
    (tmp_path / "c").write_text("a file")
    with pytest.raises(CheckpointError, match="D0711"):
        run[0].save_state(tmp_path / "c", blocking=False)


SAVES = """
import gc, torch
from distrib import Accelerator
accelerator = Accelerator(cpu=True)
model = accelerator.prepare(torch.nn.Linear(512, 512))
accelerator.save_state("c", blocking=False)
"""
FAILS = (
    """
from distrib.checkpoint.storage import Storage

def write(*_):
    raise OSError(5, "Input/output error")

Storage.write = write
"""
    + SAVES
)
# A pool is asked for only when the main thread has ended, as a store's client asks for one when it connects again.
LATE = f"""
import threading
from concurrent.futures import ThreadPoolExecutor
from distrib.checkpoint.storage import Storage
pool, write, ended = ThreadPoolExecutor(1), Storage.write, threading.Event()

def late(*args):
    assert ended.wait(30)
    return pool.submit(write, *args).result()

Storage.write = late
{SAVES}
threading._register_atexit(ended.set)
"""


def script(folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", text], cwd=folder, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    "text", [SAVES, SAVES + "del accelerator\ngc.collect()", LATE], ids=["kept", "dropped", "late"]
)
def test_a_script_that_ends_at_once_has_its_checkpoint(tmp_path, text):
    done = script(tmp_path, text)

    assert (done.returncode, "was not saved" in done.stderr) == (0, False), done.stderr
    verify(tmp_path / "c")


def test_copies_are_contiguous_bitwise_and_share_one_block():
    arena = Arena()
    given = [
        torch.arange(12.0).view(3, 4).t(),
        torch.tensor(3),
        torch.empty(0, 5),
        torch.tensor([True, False, True]),
        torch.randn(7).bfloat16(),
        torch.randn(3, dtype=torch.complex64).conj(),
    ]
    first = arena.copies(given)
    assert all(
        torch.equal(a, b) and a.is_contiguous() and a.dtype is b.dtype
        for a, b in zip(first, given, strict=True)
    )
    place = first[0].data_ptr()
    assert arena.copies(given[:1])[0].data_ptr() == place
    larger = arena.copies([torch.ones(100_000)])
    assert torch.equal(larger[0], torch.ones(100_000))


def test_memory_that_could_not_be_had_once_is_asked_for_again(monkeypatch):
    arena, given = Arena(), [torch.ones(1000), torch.zeros(3)]
    arena.copies(given[1:])
    with monkeypatch.context() as patch:

        def refuse(*_, **__):
            raise RuntimeError("not enough memory")

        patch.setattr(torch, "empty", refuse)
        with pytest.raises(RuntimeError, match="not enough memory"):
            arena.copies(given)
    assert all(torch.equal(a, b) for a, b in zip(arena.copies(given), given, strict=True))
