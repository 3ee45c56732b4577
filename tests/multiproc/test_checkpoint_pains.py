"""What users of other runtimes lose with their checkpoints, each as the run that shows it."""

from __future__ import annotations

import json
import os
import re
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from _pytest.mark.structures import ParameterSet
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from distrib import Accelerator
from distrib.checkpoint import export_model, inspect
from distrib.errors import CheckpointError
from distrib.state import Box, ShardedState, Slice
from distrib.testing import run_ranks
from tests.faults.launching import ended, launching, pids, script
from tests.faults.saving import Job

LAST = "step-00000003"


@pytest.fixture(scope="module")
def three_saves(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("three")
    run_ranks(saves_three, 2, folder)
    return folder


def saves_three(folder: Path) -> None:
    job = Job(folder, keep_last=None)
    for _ in range(3):
        job.advance()
        job.accelerator.save_state(durable=False)


@pytest.fixture
def saved(three_saves, tmp_path) -> Path:
    """A run of two ranks with the checkpoints of steps 1 to 3."""
    (tmp_path / "checkpoints").mkdir()
    for path in sorted(three_saves.rglob("*")):
        copy = tmp_path / path.relative_to(three_saves)
        if path.is_dir():
            copy.mkdir(exist_ok=True)
        else:
            copy.write_bytes(path.read_bytes())
    return tmp_path


def said_by(action: Callable[[], object]) -> list[str]:
    """The lines that this rank writes to stderr meanwhile; a rank's own stderr is not that of the test."""
    with tempfile.TemporaryFile("w+") as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            action()
        finally:
            os.dup2(kept, 2)
            os.close(kept)
        file.seek(0)
        return file.read().splitlines()


def resumed_step(folder: Path) -> tuple[int, list[str]]:
    """The step that a resume finds, after looking that everything is of that step, and what it says."""
    job = Job(folder)
    said = said_by(job.accelerator.load_state)
    weights = job.accelerator.get_state_dict(job.model)
    moments = [state["exp_avg"] for state in job.optimizer.state.values()]
    assert {float(x) for value in (*weights.values(), *moments) for x in value.flatten()} == {float(job.step)}
    assert job.counter.value == job.step
    return job.step, said


def truncate(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


FILES = (
    "manifest.json",
    "model/rank-00000.safetensors",
    "model/rank-00001.safetensors",
    "rng/rank-00001.json",
)
DAMAGES = [(name, damage) for name in FILES for damage in (truncate, Path.unlink)]
IN_EVERY_RUN = [(FILES[1], truncate), (FILES[2], Path.unlink)]


def cell(name: str, damage: Callable[[Path], None], *marks: pytest.MarkDecorator) -> ParameterSet:
    return pytest.param(name, damage, id=f"{damage.__name__}-{name}", marks=marks)


@pytest.mark.parametrize(
    ("name", "damage"),
    [cell(*case, *(() if case in IN_EVERY_RUN else [pytest.mark.slow])) for case in DAMAGES],
)
def test_a_resume_takes_the_newest_that_is_complete(saved, name, damage):
    """M11, F27, pain 14 (also a missing file of one rank)."""
    damage(saved / "checkpoints" / LAST / name)
    assert [step for step, _ in run_ranks(resumed_step, 2, saved)] == [2, 2]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        cell(FILES[1], truncate),
        cell(
            FILES[0],
            Path.unlink,
        ),
    ],
)
def test_a_resume_says_in_one_line_which_checkpoint_it_has_skipped_and_for_which_file(saved, name, damage):
    """F27, pain 14."""
    damage(saved / "checkpoints" / LAST / name)
    said = [line for _, lines in run_ranks(resumed_step, 2, saved) for line in lines if LAST in line]
    assert len(said) == 1
    assert Path(name).name in said[0]


def refuses(folder: Path) -> tuple[str, str, bool]:
    job = Job(folder)
    job.advance(value=-7)
    with pytest.raises(CheckpointError) as caught:
        job.accelerator.load_state()
    weights = job.accelerator.get_state_dict(job.model)
    untouched = all(bool((value == -7).all()) for value in weights.values()) and job.counter.value == -7
    return caught.value.code, str(caught.value), untouched and job.step == 1


@pytest.mark.parametrize(
    "name", [FILES[2], *(pytest.param(x, marks=pytest.mark.slow) for x in (FILES[1], FILES[3]))]
)
def test_changed_bytes_of_the_same_length_are_an_error_of_all_ranks_that_changes_nothing(saved, name):
    """M11."""
    file = saved / "checkpoints" / LAST / name
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    for code, told, untouched in run_ranks(refuses, 2, saved):
        assert code in ("D0702", "D0706")
        assert str(file) in told
        assert untouched


# Random states


def draws(folder: Path) -> tuple[list[float], list[str]]:
    """Four numbers after a resume, or after the first save; and what the load said."""
    accelerator = Accelerator(cpu=True, seed=5, project_dir=folder)
    model = accelerator.prepare(nn.Linear(2, 2))
    del model
    found = []
    said = said_by(lambda: found.append(accelerator.load_state()))
    if found == [None]:
        torch.rand(accelerator.process_index + 3)
        accelerator.save_state()
    return torch.rand(4).tolist(), said


@pytest.mark.parametrize(
    ("before", "after"),
    [(1, 2), pytest.param(2, 3, marks=pytest.mark.slow), pytest.param(3, 2, marks=pytest.mark.slow)],
)
def test_another_world_size_gives_every_rank_its_own_defined_stream_and_one_line_says_so(
    tmp_path, before, after
):
    """M9."""
    written = run_ranks(draws, before, tmp_path)
    found = run_ranks(draws, after, tmp_path)
    lines = [line for _, said in found for line in said if "new streams" in line]
    assert len(lines) == 1
    assert f"world size {before}, resumed at {after}" in lines[0]
    assert run_ranks(draws, after, tmp_path) == found
    streams = [tuple(stream) for stream, _ in found]
    assert len(set(streams)) == after
    assert not set(streams) & {tuple(stream) for stream, _ in written}


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_same_world_size_goes_on_with_the_very_next_numbers_of_every_rank(tmp_path, world_size):
    """M9."""
    written, found = (run_ranks(draws, world_size, tmp_path) for _ in range(2))
    assert [stream for stream, _ in found] == [stream for stream, _ in written]


# Data


def reads_on(folder: Path, samples: int | None) -> list[int]:
    """Read one epoch in global batches of 4; save after `samples` and stop, or load and read what is left."""
    accelerator = Accelerator(cpu=True, seed=2, project_dir=folder, global_batch_size=4)
    loader = accelerator.prepare(DataLoader(TensorDataset(torch.arange(24)), batch_size=1, shuffle=True))
    if samples is None:
        accelerator.load_state()
    seen: list[int] = []
    for (x,) in loader:
        seen += accelerator.gather_for_metrics(x).tolist()
        if len(seen) == samples:
            accelerator.save_state()
            return seen
    return seen


@pytest.mark.parametrize(
    ("before", "after"),
    [(1, 2), (2, 1), pytest.param(1, 4, marks=pytest.mark.slow), pytest.param(4, 2, marks=pytest.mark.slow)],
)
def test_a_resume_at_another_world_size_reads_every_sample_exactly_once(tmp_path, before, after):
    """M10 (1 process reads [0..3], 2 go on), M8 without skip_first_batches."""
    seen = run_ranks(reads_on, before, tmp_path, 8)[0]
    rest = run_ranks(reads_on, after, tmp_path, None)[0]
    assert len(seen) == 8
    assert sorted(seen + rest) == list(range(24))


# Memory


def peak_of(action) -> int:
    """How many bytes more than before this process needed at most."""
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak is measured from here
    before = _status("VmRSS")
    action()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    (line,) = re.findall(rf"^{key}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(line) * 1024


def needs(folder: Path, layers: int) -> tuple[int, int, int]:
    """Bytes of the state, and those that saving and loading it needed beside it."""
    accelerator = Accelerator(cpu=True, seed=0, project_dir=folder)
    model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(layers)))
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    accelerator.backward(model(torch.ones(1, 1024)).sum())
    optimizer.step()
    optimizer.zero_grad()
    accelerator.wait_for_everyone()
    saving = peak_of(lambda: accelerator.save_state(folder / "c", durable=False))
    loading = peak_of(lambda: accelerator.load_state(folder / "c"))
    return 2 * layers * 4 * 2**20, saving, loading


EXPORTED = 32 * 2**20  # bytes


def exports_what_one_rank_holds(folder: Path, parts: int) -> int:
    """Bytes that writing a tensor needed beside it; the last `parts` of four ranks hold it, rank 0 does not."""
    accelerator = Accelerator(cpu=True)
    place, rows = accelerator.process_index - (4 - parts), EXPORTED // 4 // 1024
    state = ShardedState({})
    if place >= 0:
        mine = torch.full((rows // parts, 1024), float(accelerator.process_index))
        box = Box((place * rows // parts, 0), (rows // parts, 1024))
        piece = Slice("model/w", (rows, 1024), torch.float32, box, lambda: mine)
        state = ShardedState({"model/w": (piece,)})
    accelerator.wait_for_everyone()
    return peak_of(lambda: export_model(folder, state, accelerator._runtime.collectives, durable=False))


@pytest.mark.parametrize("parts", [1, 2])
def test_exporting_what_few_ranks_hold_needs_little_more_than_one_tensor(tmp_path, parts):
    """A stage's tensors lie on the ranks of that stage: a gather would make room for as much from every other rank."""
    main, *others = run_ranks(exports_what_one_rank_holds, 4, tmp_path, parts, timeout_s=60)
    assert max(others) < 1.25 * EXPORTED
    assert main < (1.25 if parts == 1 else 2.5) * EXPORTED  # the parts, and the whole that is made of them
    written = load_file(tmp_path / "model.safetensors")["w"]
    assert [x[0, 0].item() for x in written.chunk(parts)] == list(range(4 - parts, 4))


@pytest.mark.parametrize("layers", [12, pytest.param(50, marks=pytest.mark.slow)])
def test_saving_and_loading_need_little_memory_beside_the_state(tmp_path, layers):
    """Pain 16: 200 MB of weights (the long run) on two ranks; there less than 0.7 of the model, here 0.15 of the state."""
    for state, saving, loading in run_ranks(needs, 2, tmp_path, layers, timeout_s=100):
        assert saving < 0.15 * state
        assert loading < 0.15 * state


# Preemption

PREEMPTED = """
    import json, os, sys, threading
    from pathlib import Path
    import torch
    from torch import nn
    from torch.utils.data import DataLoader
    from distrib import Accelerator
    from tests.contract.plain import loader_for, per_sample_loss, make_model

    folder, stop, waits_at = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    accelerator = Accelerator(cpu=True, seed=1, project_dir=folder, global_batch_size=8)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader_for(40, 2, shuffle=True))
    accelerator.load_state()
    first = optimizer.num_steps
    history = []
    while optimizer.num_steps < stop:
        for batch in loader:
            with accelerator.accumulate(model):
                losses = per_sample_loss(model, batch)
                accelerator.backward(losses.mean())
                optimizer.step()
                optimizer.zero_grad()
            seen = accelerator.gather_for_metrics({"id": batch["id"], "loss": losses.detach()})
            history += sorted(zip(seen["id"].tolist(), seen["loss"].tolist()))
            if not accelerator.sync_gradients:
                continue
            accelerator.save_state(blocking=False)
            if optimizer.num_steps == waits_at:
                (folder / f"{os.getpid()}.pid").touch()
                threading.Event().wait(60)
            if optimizer.num_steps == stop:
                break
    if accelerator.is_main_process:
        print(json.dumps([first, history]))
"""


@pytest.mark.slow
def test_sigterm_in_a_run_that_saves_each_step_in_the_background_loses_no_step(tmp_path):
    """Pain 17: TERM on two ranks; the checkpoint is of the exact step, and what follows equals the run without it."""
    outcomes = []
    for name, waits_at in (("whole", 0), ("cut", 7)):
        (tmp_path / name).mkdir()
        program = script(tmp_path / name, PREEMPTED)
        with launching("-n", 2, program, tmp_path / name, 12, waits_at, cwd=tmp_path) as process:
            if waits_at:
                pids(tmp_path / name, 2)
                process.send_signal(signal.SIGTERM)
            done = ended(process)
        assert done.code == (143 if waits_at else 0), done.err
        if waits_at:
            assert max(inspect(x).counters["step"] for x in (tmp_path / "cut/checkpoints").iterdir()) == 7
            with launching("-n", 2, program, tmp_path / name, 12, 0, cwd=tmp_path) as process:
                done = ended(process)
        outcomes.append(json.loads(done.out.removeprefix("[rank 0] ")))
    (_, whole), (first, rest) = outcomes
    assert first == 7
    assert rest == whole[-len(rest) :]
    assert len(rest) == 40
