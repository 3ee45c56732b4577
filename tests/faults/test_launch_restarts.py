"""`--max-restarts`: what is tried again, how often, and what is left of it."""

from __future__ import annotations

import json
import signal
import socket
from pathlib import Path

import pytest

from tests.faults.launching import launch, launching, script
from tests.faults.leaving import ended_by, nothing_left, until

# Each attempt leaves `attempt-K-rank-R`, with the port at which it meets.
TELLS = """
    import os, pathlib, sys, time
    attempt, rank = os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]
    print("attempt", attempt)
    pathlib.Path(f"attempt-{attempt}-rank-{rank}").write_text(os.environ["MASTER_PORT"])
    while len(list(pathlib.Path().glob(f"attempt-{attempt}-rank-*"))) < 2:
        time.sleep(0.01)
"""
METHODS = pytest.mark.parametrize("method", ["spawn", "fork"])


def telling(folder: Path, then: str) -> Path:
    return script(folder, TELLS + then)


def attempts(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("attempt-*"))


TRAINS = """
    import os, sys, warnings
    warnings.simplefilter("ignore")
    import torch
    from torch.utils.data import DataLoader, TensorDataset
    from distrib import Accelerator

    torch.set_default_dtype(torch.float64)
    accelerator = Accelerator(cpu=True, seed=3)
    model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    data = TensorDataset(torch.arange(96.0).reshape(32, 3) / 96)
    loader = DataLoader(data, batch_size=2, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    accelerator.register_for_checkpointing(schedule)
    accelerator.load_state()
    print("begins at", schedule.last_epoch)
    for (x,) in loader:
        optimizer.zero_grad()
        accelerator.backward((model(x) - x.sum(1, keepdim=True)).square().mean())
        optimizer.step()
        schedule.step()
        if os.environ.get("FAILS") and schedule.last_epoch == 5 and accelerator.process_index == 1:
            if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
                raise RuntimeError("injected failure")
        accelerator.save_state()
    print("ends with", [x.hex() for p in model.parameters() for x in p.flatten().tolist()])
"""


def test_a_restarted_run_ends_with_the_weights_of_an_unbroken_one(tmp_path: Path) -> None:
    (tmp_path / "unbroken").mkdir()
    (tmp_path / "broken").mkdir()
    program = script(tmp_path, TRAINS)
    unbroken = launch("-n", 2, "--cpu", program, cwd=tmp_path / "unbroken")
    with nothing_left():
        broken = launch(
            "-n", 2, "--cpu", "--max-restarts", 2, "--grace", 1, program, cwd=tmp_path / "broken", FAILS="1"
        )

    assert (unbroken.code, broken.code) == (0, 0), broken.err
    assert sorted(line for line in broken.out.splitlines() if "begins at" in line) == [
        "[rank 0] begins at 0",
        "[rank 0] begins at 4",
        "[rank 1] begins at 0",
        "[rank 1] begins at 4",
    ]
    weights = [
        sorted(line for line in done.out.splitlines() if "ends with" in line) for done in (unbroken, broken)
    ]
    assert weights[0] == weights[1]
    assert len(weights[0]) == 2
    assert broken.err.count("RuntimeError: injected failure") == 1
    assert "exit code 1; restarting all ranks (1 of 2)" in broken.err


def test_a_restart_does_not_wait_for_the_grace_time_of_ranks_that_have_ended(tmp_path: Path) -> None:
    text = """
    if attempt == "0" and rank == "1":
        pathlib.Path("failed").touch()
        sys.exit(3)
    if attempt == "0":
        time.sleep(60)
    """
    done = launch(
        "-n",
        2,
        "--start-method",
        "spawn",
        "--max-restarts",
        1,
        "--grace",
        12,
        telling(tmp_path, text),
        cwd=tmp_path,
    )

    assert done.code == 0
    restarted_s = (tmp_path / "attempt-1-rank-0").stat().st_mtime - (tmp_path / "failed").stat().st_mtime
    assert restarted_s < 5


@METHODS
def test_a_job_that_always_fails_is_given_up_after_its_restarts(tmp_path: Path, method: str) -> None:
    text = "    if rank == '1': sys.exit(10 + int(attempt))\n    time.sleep(60)"
    with nothing_left():
        done = launch(
            *("-n", 2, "--start-method", method, "--max-restarts", 2, "--grace", 1, "--log-dir", "logs"),
            telling(tmp_path, text),
            cwd=tmp_path,
        )

    assert attempts(tmp_path) == [f"attempt-{k}-rank-{r}" for k in range(3) for r in range(2)]
    assert done.code == 12
    assert done.report[-1] == "exit code 12; gave up after 2 restarts"
    ports = [[(tmp_path / f"attempt-{k}-rank-{r}").read_text() for r in range(2)] for k in range(3)]
    assert all(ours == theirs for ours, theirs in ports)
    assert len({ours for ours, _ in ports}) == 3
    (run,) = (tmp_path / "logs").iterdir()
    logs = {str(path.relative_to(run)): path.read_text() for path in run.glob("attempt-*/*.log")}
    assert logs == {f"attempt-{k}/rank-{r}.log": f"attempt {k}\n" for k in range(3) for r in range(2)}
    failure, about = (json.loads((run / name).read_text()) for name in ("failure.json", "launch.json"))
    assert (failure["attempt"], failure["max_restarts"], failure["exit_code"]) == (2, 2, 12)
    assert about["exit_code"] == 12
    assert (run / "report.txt").read_text().splitlines() == done.report


@METHODS
def test_every_attempt_meets_at_the_port_that_was_named(tmp_path: Path, method: str) -> None:
    text = """
    import socket
    server = socket.socket()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if rank == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        server.bind((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])))
        server.listen()
        socket.create_connection(server.getsockname()).close()
    sys.exit(7 if attempt == "0" else 0)
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    done = launch(
        *("-n", 2, "--start-method", method, "--max-restarts", 1, "--grace", 1, "--master-port", port),
        telling(tmp_path, text),
        cwd=tmp_path,
    )

    assert done.code == 0, done.err
    assert {path.read_text() for path in tmp_path.glob("attempt-1-*")} == {str(port)}


@pytest.mark.parametrize(
    "then",
    ["from distrib.errors import ConfigError; raise ConfigError('D0101', 'wrong')", "sys.exit(2)"],
    ids=["of distrib", "of the program"],
)
def test_wrong_usage_is_not_tried_again(tmp_path: Path, then: str) -> None:
    done = launch(
        "-n",
        2,
        "--start-method",
        "spawn",
        "--max-restarts",
        2,
        telling(tmp_path, f"    {then}"),
        cwd=tmp_path,
    )

    assert done.code == 2
    assert attempts(tmp_path) == ["attempt-0-rank-0", "attempt-0-rank-1"]
    assert done.report[-1] == "exit code 2"


def test_success_is_not_tried_again(tmp_path: Path) -> None:
    done = launch(
        "-n", 2, "--start-method", "spawn", "--max-restarts", 2, telling(tmp_path, ""), cwd=tmp_path
    )

    assert done.code == 0
    assert attempts(tmp_path) == ["attempt-0-rank-0", "attempt-0-rank-1"]


@METHODS
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("moment", ["at its start", "in its course"])
def test_a_signal_ends_a_restarted_job(
    tmp_path: Path, method: str, number: signal.Signals, code: int, moment: str
) -> None:
    text = "    if attempt == '0': sys.exit(3)\n    pathlib.Path('again').touch()\n    time.sleep(60)"
    words = ("-n", 2, "--start-method", method, "--max-restarts", 5, "--grace", 2, telling(tmp_path, text))
    with nothing_left(), launching(*words, cwd=tmp_path) as process:
        assert process.stderr is not None
        while "restarting all ranks (1 of 5)" not in process.stderr.readline():
            pass
        if moment == "in its course":
            until(tmp_path / "again", process)
        done = ended_by(process, number)

    assert done.code == code, done.err
    assert done.seconds < 10
    assert len(attempts(tmp_path)) <= 4
    assert "restarting" not in done.err
    assert "Traceback" not in done.err


def test_nothing_is_left_of_a_restarted_job_whose_launcher_is_killed(tmp_path: Path) -> None:
    text = "    if attempt == '0': sys.exit(3)\n    pathlib.Path('again').touch()\n    time.sleep(60)"
    words = ("-n", 2, "--max-restarts", 5, "--grace", 1, telling(tmp_path, text))
    with nothing_left(), launching(*words, cwd=tmp_path) as process:
        until(tmp_path / "again", process)
        assert ended_by(process, signal.SIGKILL).code == -signal.SIGKILL


LOSES_ITS_LOGS = """
    import os, pathlib, shutil, sys
    run = pathlib.Path("logs")
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        shutil.rmtree(run)
        raise RuntimeError("injected failure")
    print("trained")
"""


@METHODS
def test_a_restart_goes_on_without_logs_if_their_folder_has_gone(tmp_path: Path, method: str) -> None:
    program = script(tmp_path, LOSES_ITS_LOGS)
    with nothing_left():
        done = launch(
            *("-n", 1, "--cpu", "--start-method", method, "--max-restarts", 1, "--log-dir", "logs", program),
            cwd=tmp_path,
        )

    assert done.code == 0, done.err
    assert done.out == "trained\n"
    told = done.err.count("warning: the logs are not complete: No such file or directory")
    assert told in (1, 2)  # once in each attempt; the script may be quicker than the first one's log
    assert "rank-0.log" not in done.err
