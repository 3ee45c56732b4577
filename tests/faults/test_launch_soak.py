"""Storms: launches that are ended at random moments leave nothing, and right scripts end well every time."""

from __future__ import annotations

import random
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.faults.launching import launch, launching, script
from tests.faults.leaving import ended_by, nothing_left
from tests.faults.test_launch_promises import STREAMS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

# Ranks with data workers, which share memory, in a loop without end.
BUSY = """
    import os, pathlib, warnings
    pathlib.Path(os.environ["PORTS"], os.environ["MASTER_PORT"]).touch()
    warnings.simplefilter("ignore")
    import torch
    from torch.utils.data import DataLoader, TensorDataset
    from distrib import Accelerator

    if __name__ == "__main__":
        accelerator = Accelerator(cpu=True, seed=0)
        model = torch.nn.Linear(64, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
        loader = DataLoader(TensorDataset(torch.ones(64, 64)), batch_size=4, num_workers=1)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        while True:
            for (x,) in loader:
                accelerator.backward(model(x).mean())
                optimizer.step()
            accelerator.save_state()
"""
CODES = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143, signal.SIGINT: 130}


def shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()}


def listeners(ports: Path) -> list[str]:
    """Return who listens at a port of the launch."""
    own = {int(path.name) for path in ports.iterdir()}
    listening = [each for each in psutil.net_connections("tcp") if each.status == psutil.CONN_LISTEN]
    return [str(each) for each in listening if each.laddr and each.laddr.port in own]


def folders(temporary: Path) -> list[str]:
    """Return what lies there, but for what others leave there that cannot tidy up after a SIGKILL."""
    names = [path.name for path in temporary.iterdir()]
    return [name for name in names if not name.startswith(("pymp-", "torchinductor_"))]


def test_nothing_is_left_of_launches_that_are_ended_at_random_moments(tmp_path: Path) -> None:
    program, chance = script(tmp_path, BUSY), random.Random(4711)
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    before = shared_memory()
    wrong = []
    for number in range(30):
        method = chance.choice(["fork", "fork", "spawn"])
        end = chance.choice(list(CODES))
        after_s = chance.uniform(0, 9 if method == "spawn" else 6)
        ports = tmp_path / f"ports-{number}"
        ports.mkdir()
        env = {"PORTS": str(ports), "TMPDIR": str(temporary)}
        words = ("-n", 2, "--cpu", "--start-method", method, "--grace", 3, "--max-restarts", 1, program)
        with nothing_left(), launching(*words, cwd=tmp_path, **env) as process:
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=after_s)
            done = ended_by(process, end)
        early = not done.err  # Python itself may not have got to our handlers
        found = {
            f"exit code {done.code}": done.code not in {CODES[end], -end if early else CODES[end]},
            f"{done.seconds:.1f} s": done.seconds > 8,
            "a traceback": "Traceback" in done.err and not early,
            f"listening: {listeners(ports)}": listeners(ports),
            f"shared memory: {shared_memory() - before}": shared_memory() - before,
            f"folders: {folders(temporary)}": folders(temporary),
        }
        mistakes = [what for what, is_so in found.items() if is_so]
        if mistakes:
            wrong.append(
                f"launch {number}: {method}, {end.name} after {after_s:.3f} s: {mistakes}\n{done.err}"
            )

    assert not wrong, "\n".join(wrong)


def test_a_right_script_ends_well_200_times_of_200(tmp_path: Path) -> None:
    programs = [script(tmp_path, STREAMS.format(workers=workers), f"{workers}.py") for workers in (0, 1)]
    for number in range(200):
        method = "spawn" if number % 4 == 3 else "fork"
        done = launch("-n", 2, "--cpu", "--start-method", method, programs[number % 2], cwd=tmp_path)
        assert done.code == 0, f"run {number}: {done.err}"
        assert "terminate" not in done.err
