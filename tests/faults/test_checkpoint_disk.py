"""Disks that fail, are full or cannot be written, and places where no checkpoint can be."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from distrib.checkpoint import latest, save
from distrib.checkpoint.storage import Storage
from distrib.errors import CheckpointError
from distrib.testing import run_ranks
from tests.faults.launching import LIMIT_S, command, environment, script
from tests.faults.saving import Job, stored_value
from tests.faults.test_checkpoint_faults import ALONE, ROOT, contents, stored_value as value_in

# F21: the system calls themselves fail


def is_traced(pid: int) -> bool:
    return "TracerPid:\t0\n" not in Path(f"/proc/{pid}/status").read_text()


def save_with_a_failing_call(target: Path, value: int, fault: str, log: Path) -> tuple[bool, bool]:
    """Save in a child of which strace lets a system call fail; return whether it was saved, and whether one did fail."""
    ready, go = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.read(ready, 1)
            save(target, contents(value), ALONE)
            os._exit(0)
        except CheckpointError:
            os._exit(3)
        finally:
            os._exit(1)
    tracer = subprocess.Popen(
        ["strace", "-f", "-qq", "-o", log, "-p", str(child), "-e", f"inject={fault}"],
        stderr=subprocess.DEVNULL,
    )
    tick = threading.Event()
    while not is_traced(child):
        assert tracer.poll() is None, "strace cannot attach"
        tick.wait(0.002)
    os.write(go, b"x")
    _, status = os.waitpid(child, 0)
    tracer.wait(10)
    os.close(ready)
    os.close(go)
    assert os.WEXITSTATUS(status) in (0, 3), f"{fault}: {status}"
    return os.WEXITSTATUS(status) == 0, "(INJECTED)" in log.read_text()


def fail_every_call(folder: Path, call: str, error: str, *, stuck: bool) -> None:
    """Run by a process of its own, since it forks."""
    target = folder / "saves" / "c"
    save(target, contents(0), ALONE)
    failures = 0
    for nth in itertools.count(1):
        before = value_in(target)
        fault = f"{call}:error={error}:when={nth}{'+' if stuck else ''}"
        saved, failed = save_with_a_failing_call(target, nth, fault, folder / "log")
        assert value_in(target) in ({nth} if saved else {before, nth} if stuck else {before}), fault
        if not failed:
            break
        failures += not saved
    assert value_in(target) == nth
    save(target, contents(-1), ALONE)
    assert [path.name for path in target.parent.iterdir()] == ["c"]
    print(failures, "failures told")


CALLS = [
    pytest.param(call, error, stuck, at_least, id=f"{call}-{error}-{'stuck' if stuck else 'once'}", marks=marks)
    for call, at_least in {
        "write": 6, "fsync": 8, "renameat2": 1, "mkdir": 3, "unlink": 0, "rmdir": 0, "rename": 0, "flock": 1,
        "ftruncate": 1, "pwrite64": 1, "statfs": 0, "getdents64": 0, "lseek": 0,
    }.items()
    for error, stuck in (("EIO", False), ("EIO", True), ("ENOSPC", False))
    for marks in [() if call == "fsync" and (error, stuck) == ("EIO", False) else pytest.mark.slow]
]  # fmt: skip


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace: apt install strace")
@pytest.mark.parametrize(("call", "error", "stuck", "at_least"), CALLS)
def test_whichever_system_call_of_a_save_fails_it_is_told_and_the_older_checkpoint_is_whole(
    tmp_path, call, error, stuck, at_least
):
    """F21: as SQLite does, the nth one for every n, until a save runs clean."""
    start = f"fail_every_call(Path(sys.argv[1]), {call!r}, {error!r}, stuck={stuck})"
    text = f"import sys; from pathlib import Path; from tests.faults.test_checkpoint_disk import *; {start}"
    found = subprocess.run(
        [sys.executable, "-c", text, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert found.returncode == 0, found.stderr
    assert int(found.stdout.split()[0]) >= at_least


# F22: a small or read-only file system of its own

NAMESPACE = ["unshare", "--map-root-user", "--mount"]


def on_tmpfs(folder: Path, options: str, text: str) -> subprocess.CompletedProcess[str]:
    """Launch a script on two ranks; its first argument is a directory that is a tmpfs of its own."""
    if subprocess.run([*NAMESPACE, "mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip(
            "needs user namespaces that may mount: sysctl kernel.unprivileged_userns_clone=1, or run as root"
        )
    disk = folder / "disk"
    disk.mkdir()
    mount = f'mount -t tmpfs -o {options} tmpfs "$1" && shift && exec "$@"'
    words = command("-n", 2, script(folder, text), disk)
    return subprocess.run(
        [*NAMESPACE, "sh", "-c", mount, "sh", disk, *words],
        cwd=folder, env=environment(), capture_output=True, text=True, timeout=LIMIT_S, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def test_a_read_only_file_system_is_an_error_of_all_ranks_at_once(tmp_path):
    """F22."""
    done = on_tmpfs(
        tmp_path,
        "ro",
        """
        import sys, time
        from distrib import CheckpointError
        from tests.faults.saving import Job

        job = Job(sys.argv[1])
        job.accelerator.load_state()
        job.advance()
        start = time.monotonic()
        try:
            job.accelerator.save_state()
        except CheckpointError as error:
            told = time.monotonic() - start < 5, error.code, sys.argv[1] in str(error)
            print(job.accelerator.gather_object(told))
            raise
        """,
    )
    assert done.returncode == 1, done.stderr
    assert "[(True, 'D0714', True), (True, 'D0714', True)]" in done.stdout
    assert "Read-only file system" in done.stderr
    assert "cannot be written to, so save_state is going to fail" in done.stderr


def test_a_full_disk_is_told_before_or_while_it_is_written_and_leaves_the_older_checkpoint(tmp_path):
    """Pain 14, with a tmpfs of 4 MiB that fills."""
    done = on_tmpfs(
        tmp_path,
        "size=4m",
        """
        import sys
        from pathlib import Path
        from distrib import CheckpointError
        from distrib.checkpoint import latest
        from distrib.checkpoint.storage import Storage
        from tests.faults.saving import Job, stored_value

        def attempt(blocking):
            try:
                job.accelerator.save_state(blocking=blocking).wait()
            except CheckpointError as error:
                job.accelerator.wait_for_everyone()
                left = sorted(path.name for path in (disk / "checkpoints").iterdir())
                assert left == ["step-00000001"], left
                return error.code, "No space left" in str(error), stored_value(latest(disk / "checkpoints"))
            return "saved"

        disk = Path(sys.argv[1])
        job = Job(disk)
        job.advance()
        job.accelerator.save_state()
        job.advance()
        if job.accelerator.is_main_process:
            (disk / "filler").write_bytes(bytes(Storage().free_bytes(disk) - (20 << 10)))
        job.accelerator.wait_for_everyone()
        found = [attempt(True)]
        room = Storage.free_bytes
        Storage.free_bytes = lambda *_: 10**15  # somebody else fills the disk after it has been looked at
        found += [attempt(True), attempt(False)]
        Storage.free_bytes = room
        job.accelerator.wait_for_everyone()
        if job.accelerator.is_main_process:
            (disk / "filler").unlink()
        job.accelerator.wait_for_everyone()
        found.append(attempt(False))
        assert job.accelerator.gather_object(found) == [found, found]
        print(found, stored_value(latest(disk / "checkpoints")))
        """,
    )
    assert done.returncode == 0, done.stderr
    full = "('D0714', True, 1)"
    assert f"[('D0713', False, 1), {full}, {full}, 'saved'] 2" in done.stdout


# F23: places where no checkpoint can be


def refused(folder: Path, kind: str) -> tuple[str, str, float]:
    job = Job(folder)
    job.advance()
    place = {
        "file": folder / "file", "below a file": folder / "file/c", "dangling": folder / "dangling",
        "long": folder / ("x" * 300), "loop": folder / "loop/c", "nul": f"{folder}/a\0b",
    }[kind]  # fmt: skip
    start = time.monotonic()
    with pytest.raises(CheckpointError) as caught:
        job.accelerator.save_state(place, blocking=kind == "file")
    return caught.value.code, str(caught.value), time.monotonic() - start


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("file", "D0711"),
        pytest.param("dangling", "D0711", marks=pytest.mark.slow),
        pytest.param("below a file", "File exists", marks=pytest.mark.slow),
        ("long", "File name too long"),
        pytest.param("loop", "File exists", marks=pytest.mark.slow),
        pytest.param("nul", "null byte", marks=pytest.mark.slow),
    ],
)
def test_an_impossible_place_is_refused_on_all_ranks_at_the_call_with_the_system_s_words(
    tmp_path, kind, text
):
    """F23."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    names = sorted(tmp_path.iterdir())
    for _, told, seconds in run_ranks(refused, 2, tmp_path, kind, timeout_s=30):
        assert text in told
        assert seconds < 5
    assert sorted(tmp_path.iterdir()) == names
    assert (tmp_path / "file").read_text() == "mine"


# F24: one rank's share fails


def one_share_fails(folder: Path, operation: str) -> str:
    job = Job(folder)
    job.advance()
    job.accelerator.save_state()
    job.advance()

    def fail(*_):
        raise OSError(5, "Input/output error", "the share of rank 1")

    if job.accelerator.process_index == 1:
        setattr(Storage, operation, fail)
    with pytest.raises(CheckpointError) as caught:
        job.accelerator.save_state()
    return str(caught.value)


@pytest.mark.parametrize(
    "operation", ["create", *(pytest.param(x, marks=pytest.mark.slow) for x in ("write", "sync", "close"))]
)
def test_a_share_that_fails_on_rank_1_alone_is_an_error_of_all_ranks_and_shows_no_manifest(
    tmp_path, operation
):
    """F24."""
    for told in run_ranks(one_share_fails, 2, tmp_path, operation, timeout_s=30):
        assert "rank 1" in told
        assert "Input/output error" in told
    assert [path.parent.name for path in tmp_path.rglob("manifest.json")] == ["step-00000001"]
    assert stored_value(tmp_path / "checkpoints/step-00000001") == 1


# F26: copies


@pytest.mark.parametrize("tool", [["cp", "-r"], ["rsync", "-r"], ["tar"]], ids=lambda tool: tool[0])
def test_copied_checkpoints_load_whatever_their_times_say(tmp_path, tool):
    """F26: the newest is told by its number, and completeness by what the manifest says, not by a marker's time."""
    if shutil.which(tool[0]) is None:
        pytest.skip(f"needs {tool[0]}: apt install {tool[0]}")
    for value in (9, 10):
        save(tmp_path / f"a/step-{value}", contents(value), ALONE, durable=False)
    if tool == ["tar"]:
        (tmp_path / "b").mkdir()
        pack = subprocess.run(["tar", "c", "-C", tmp_path / "a", "."], check=True, capture_output=True)
        subprocess.run(["tar", "xm", "-C", tmp_path / "b"], input=pack.stdout, check=True)
    else:
        subprocess.run([*tool, f"{tmp_path}/a/.", tmp_path / "b"], check=True)
    files = sorted((tmp_path / "b").rglob("*"), reverse=True)
    for at, path in enumerate(files):
        os.utime(path, (10**9 - at, 10**9 - at))
    found = latest(tmp_path / "b")
    assert found == tmp_path / "b/step-10"
    assert value_in(found) == 10
