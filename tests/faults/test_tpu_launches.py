"""`distrib launch --backend tpu` with clients that run here what they should run on workers."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import psutil
import pytest
from distrib_launcher.remote import Client, run_together, tied

from tests.faults.launching import all_gone, ended, environment, launch, launching, pids, script

HOSTS = "127.0.0.1,127.0.0.2"
SSH = """\
#!/bin/sh
# ssh -o BatchMode=yes HOST COMMAND
[ "$1 $2" = "-o BatchMode=yes" ] || exit 255
exec sh -c "$4"
"""
GCLOUD = f"""\
#!{sys.executable}
import json, os, sys
words = sys.argv[1:]
assert words[:3] == ["compute", "tpus", "tpu-vm"] and words[4] == "slice" and "--zone=here" in words, words
if words[3] == "describe":
    print(json.dumps({{"networkEndpoints": [{{"ipAddress": host}} for host in {HOSTS.split(",")!r}]}}))
    sys.exit()
given = dict(word.split("=", 1) for word in words if word.startswith("--") and "=" in word)
os.environ.update(TPU_WORKER_ID=given["--worker"], TPU_WORKER_HOSTNAMES={HOSTS!r})
os.execv("/bin/sh", ["sh", "-c", given["--command"]])
"""
# Rank 1 fails once rank 0 is there; rank 0 notes that it was asked to end.
ONE_FAILS = """
import os, pathlib, signal, sys, time
def end(*_):
    pathlib.Path("asked").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, end)
pathlib.Path(f"{os.getpid()}.pid").touch()
print("here is", os.environ["RANK"], "of", os.environ["WORLD_SIZE"], flush=True)
if os.environ["RANK"] == "1":
    while len(list(pathlib.Path().glob("*.pid"))) < 2:
        time.sleep(0.01)
    sys.exit(3)
time.sleep(1000)
"""
WAITS = """
import os, pathlib, time
pathlib.Path(f"{os.getpid()}.pid").touch()
time.sleep(1000)
"""
GATHERS = """
import torch
from distrib import Accelerator
accelerator = Accelerator()
gathered = accelerator.gather(torch.tensor([accelerator.process_index]))
print(accelerator.num_processes, accelerator.local_process_index, gathered.tolist())
"""


DEAF = """
import os, pathlib, sys, time
pathlib.Path(sys.argv[1], f"{os.getpid()}.pid").touch()
time.sleep(1000)
"""
FAILS_THEN = """
import pathlib, sys, time
while not list(pathlib.Path(sys.argv[1]).glob("*.pid")):
    time.sleep(0.01)
sys.exit(5)
"""


@pytest.fixture
def clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put the stand-ins for ssh and gcloud first on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("ssh", SSH), ("gcloud", GCLOUD)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def words(*more: str, **tpu: str) -> list[str]:
    """Return the options of a launch whose ranks load no torch until the program does."""
    keys = {"python": sys.executable, **(tpu or {"hosts": HOSTS})}
    settings = [word for key, value in keys.items() for word in ("--set", f"tpu.{key}={value}")]
    return ["--backend", "tpu", "--cpu", *settings, *more]


def test_two_workers_are_one_job_whose_ranks_meet_at_the_first(tmp_path: Path, clients: Path) -> None:
    program = script(tmp_path, GATHERS)
    hosts = "127.0.0.2,127.0.0.1"  # the first one's address is not the one that ranks of one machine would meet at

    done = launch(*words("--master-port", "29541", hosts=hosts), "-n", "2", program, cwd=tmp_path)

    assert done.code == 0, done.err
    assert sorted(done.out.splitlines()) == [
        f"[worker {rank // 2}] [rank {rank}] 4 {rank % 2} [0, 1, 2, 3]" for rank in range(4)
    ]


def test_a_worker_that_fails_is_named_and_the_others_are_ended(tmp_path: Path, clients: Path) -> None:
    program = script(tmp_path, ONE_FAILS)

    done = launch(*words("--grace", "20"), program, cwd=tmp_path)

    assert done.code == 3, done.err
    assert done.report == [
        "distrib: worker 1 (127.0.0.2) failed: exit code 3",
        "  worker 0 (127.0.0.1) was ended: exit code 143",
        "  its own report is above",
        "  exit code 3",
    ]
    assert (tmp_path / "asked").exists()
    assert "[worker 1] distrib: rank 1 (process" in done.err
    assert sorted(done.out.splitlines()) == ["[worker 0] here is 0 of 2", "[worker 1] here is 1 of 2"]


def test_gcloud_says_how_many_workers_there_are_and_starts_each(tmp_path: Path, clients: Path) -> None:
    program = script(tmp_path, ONE_FAILS)

    done = launch(*words("--grace", "20", name="slice", zone="here"), program, cwd=tmp_path)

    assert (done.code, done.report[0]) == (3, "distrib: worker 1 failed: exit code 3")
    assert "2 workers of TPU slice, through gcloud" in done.err
    assert (tmp_path / "asked").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_the_launcher_ends_all_workers(
    tmp_path: Path, clients: Path, number: signal.Signals, code: int
) -> None:
    program = script(tmp_path, WAITS)
    with launching(*words("--grace", "20"), program, cwd=tmp_path) as process:
        ranks = pids(tmp_path, 2)
        process.send_signal(number)
        done = ended(process)

    assert (done.code, done.report[-1]) == (code, f"  exit code {code}")
    assert len(ranks) == 2
    assert all_gone(ranks, within_s=5)


def test_when_the_launcher_is_killed_the_workers_end_too(tmp_path: Path, clients: Path) -> None:
    program = script(tmp_path, WAITS)
    with launching(*words(), program, cwd=tmp_path) as process:
        ranks = pids(tmp_path, 2)
        process.kill()

        assert len(ranks) == 2
        assert all_gone(ranks, within_s=20)


def test_a_client_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = script(tmp_path, WAITS)
    monkeypatch.setenv("PATH", str(tmp_path))

    over_ssh = launch(*words(), program, cwd=tmp_path)
    over_gcloud = launch(*words(name="slice"), program, cwd=tmp_path)

    assert (over_ssh.code, over_gcloud.code) == (2, 2)
    assert "error[D0917] worker 0 (127.0.0.1): ssh cannot be started" in over_ssh.err
    assert "error[D0917] tpu.name: gcloud cannot be started" in over_gcloud.err


def test_what_gcloud_says_against_the_name_is_shown(tmp_path: Path, clients: Path) -> None:
    (clients / "gcloud").write_text("#!/bin/sh\necho 'NOT_FOUND: no such TPU' >&2\nexit 1\n")

    done = launch(*words(name="slice"), script(tmp_path, WAITS), cwd=tmp_path)

    assert done.code == 2
    assert (
        "error[D0918] tpu.name: gcloud does not say which workers the TPU has: NOT_FOUND: no such TPU"
        in done.err
    )
    assert list(tmp_path.glob("*.pid")) == []


SHELLS = [shell for shell in ("/bin/sh", "/bin/bash") if Path(shell).exists()]


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("code", [0, 3])
def test_a_tied_command_has_its_own_exit_code_folder_and_variables(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], shell: str, code: int
) -> None:
    folder = tmp_path / "it's here"
    folder.mkdir()
    line = tied(["sh", "-c", f'echo "$NAME in $(pwd)"; exit {code}'], {"NAME": "a 'b'"}, str(folder))

    ran = run_together([Client("one", "[one] ", (shell, "-c", line))], environment(), 5.0)

    out, err = capfd.readouterr()
    assert (ran, out) == (code, f"[one] a 'b' in {folder}\n")
    assert err == (
        "" if code == 0 else "distrib: one failed: exit code 3\n  its own report is above\n  exit code 3\n"
    )


def test_a_home_folder_is_the_workers_own(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "my code").mkdir()
    (tmp_path / "my code/say pwd").symlink_to("/bin/pwd")
    line = tied(["~/my code/say pwd"], {"A": "1"}, "~/my code")

    run_together([Client("one", "", ("sh", "-c", line))], environment(HOME=str(tmp_path)), 5.0)

    assert capfd.readouterr().out == f"{tmp_path}/my code\n"


def test_a_client_that_does_not_end_is_killed_in_bounded_time(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = str(tmp_path)
    deaf = (sys.executable, "-c", DEAF, folder)
    fails = (sys.executable, "-c", FAILS_THEN, folder)

    code = run_together(
        [Client("deaf", "", deaf), Client("fails", "", fails)], environment(), 0.0, margin_s=0.5
    )

    (pid_file,) = tmp_path.glob("*.pid")
    assert (code, "  deaf was ended: exit code 137" in capfd.readouterr().err) == (5, True)
    assert not psutil.pid_exists(int(pid_file.stem))
