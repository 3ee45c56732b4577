"""What `distrib launch` promises of limits, wrong usage, secrets, reports, logs and crowds."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.faults.launching import LIMIT_S, Launched, command, environment, launch, launching, script
from tests.faults.leaving import ended_by, nothing_left, until
from tests.faults.test_launch_terminal import at_terminal

SPAWN = ("--start-method", "spawn")
METHODS = pytest.mark.parametrize("method", ["spawn", "fork"])


def in_shell(line: str, *words: object, cwd: Path, **env: str) -> Launched:
    """Run a launch to its end as a shell runs it: `line`, where "$@" is the launch."""
    start = time.monotonic()
    done = subprocess.run(
        ["bash", "-c", line, "bash", *command(*words)],
        cwd=cwd, env=environment(**env), capture_output=True, text=True, timeout=LIMIT_S, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    return Launched(done.returncode, done.stdout, done.stderr, time.monotonic() - start)


# --- limits


@METHODS
@pytest.mark.parametrize("kib", [150_000, 600_000])
def test_too_little_memory_ends_soon_and_names_the_limit(tmp_path: Path, method: str, kib: int) -> None:
    program = script(tmp_path, "import torch\nx = torch.ones(1 << 28)")
    with nothing_left():
        done = in_shell(f'ulimit -v {kib}; "$@"', "-n", 2, "--start-method", method, program, cwd=tmp_path)

    assert done.code != 0
    assert done.seconds < 10
    assert f"virtual memory of a process is limited to {kib} KiB (`ulimit -v`)" in done.err


# A user who may read everything, as root's Python may lie in root's home, but whose processes are counted.
AS_NOBODY = (
    "setpriv --reuid 54321 --regid 54321 --clear-groups --inh-caps=-all,+dac_override"
    " --ambient-caps=-all,+dac_override --bounding-set=-all,+dac_override"
)


@METHODS
@pytest.mark.parametrize("processes", [3, 5, 8])
def test_too_few_processes_end_soon_and_name_the_limit(tmp_path: Path, method: str, processes: int) -> None:
    if subprocess.run([*AS_NOBODY.split(), "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to become another user: run as root, with util-linux's setpriv")
    with tempfile.TemporaryDirectory() as open_to_all, nothing_left():
        Path(open_to_all).chmod(0o755)
        program = script(Path(open_to_all), "import time; time.sleep(20)")
        done = in_shell(
            f'exec {AS_NOBODY} bash -c \'ulimit -u {processes}; exec "$@"\' bash "$@"',
            *("-n", 8, "--start-method", method, "--grace", 1, program),
            cwd=Path(open_to_all),
        )

    assert done.code == 2
    assert done.seconds < 10
    assert f"processes and threads of a user is limited to {processes} (`ulimit -u`)" in done.err
    assert "Traceback" not in done.err


# --- the shell, and what is not for it


def test_a_reader_that_leaves_after_one_line_ends_nothing_badly(tmp_path: Path) -> None:
    program = script(tmp_path, "for i in range(50000): print('line', i)")
    with nothing_left():
        done = in_shell('"$@" | head -1; exit ${PIPESTATUS[0]}', "-n", 2, *SPAWN, program, cwd=tmp_path)

    assert done.code == 0
    assert done.out.startswith("[rank ")
    assert len(done.err.splitlines()) == 1


@pytest.mark.parametrize(
    "text", ["seed: !!python/object/apply:os.system ['touch ran']", "!!python/object/new:os.mkdir [ran]"]
)
def test_a_configuration_runs_no_code(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    done = launch("--config", "run.yaml", script(tmp_path, "open('ran', 'w')"), cwd=tmp_path)

    assert done.code == 2
    assert "error[D01" in done.err
    assert "run.yaml:1" in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "ran").exists()


@METHODS
def test_no_shell_reads_names_arguments_or_variables(tmp_path: Path, method: str) -> None:
    name = "a; touch ran; $(touch ran) `touch ran` 'x' \"y\" \n.py"
    arguments = ["; touch ran", "$(touch ran)", "", "a\nb", "*", "--", "-n", "7"]
    text = "import json, os, sys\nprint(json.dumps([sys.argv, os.environ['MINE'], os.environ['A B']]))"
    script(tmp_path, text, name)
    mine = "first\nRANK=7\n$(touch ran); \x01\u00e9"
    done = launch(
        "-n", 2, "--start-method", method, name, *arguments, cwd=tmp_path, MINE=mine, **{"A B": "; touch ran"}
    )

    assert done.code == 0, done.err
    for line in done.out.splitlines():
        assert json.loads(line.partition("] ")[2]) == [[name, *arguments], mine, "; touch ran"]
    assert len(done.out.splitlines()) == 2
    assert not (tmp_path / "ran").exists()


# --- secrets

SECRETS = {
    "HF_TOKEN": "hf_Zq81mWc47TrXk20PLvbn",
    "WANDB_API_KEY": "0f3a9c2b7d6e41588890aabbccddeeff",
    "DB_PASSWORD": "correct-horse-9-battery",
    "DATABASE_URL": "postgres://me:s3cr3t-of-url@host/db",
}
HIDDEN = [*list(SECRETS.values())[:3], "s3cr3t-of-url", "sk-of-a-flag-4711-abcdef", "given-with-equals-0815"]


@METHODS
def test_secrets_are_nowhere_in_what_the_launcher_says_or_keeps(tmp_path: Path, method: str) -> None:
    text = """
        import os, sys
        raise ValueError(f"cannot log in with {os.environ['HF_TOKEN']} and {sys.argv} or {dict(os.environ)}")
    """
    program = script(tmp_path, text)
    words = [
        "--api-key",
        "sk-of-a-flag-4711-abcdef",
        "--password=given-with-equals-0815",
        "--lr",
        "0.1234567",
    ]
    done = launch(
        "-n",
        2,
        "--start-method",
        method,
        "--max-restarts",
        1,
        "--grace",
        1,
        "--log-dir",
        "logs",
        program,
        *words,
        cwd=tmp_path,
        **SECRETS,
    )
    planned = launch("-n", 2, "--dry-run", program, *words, cwd=tmp_path, **SECRETS)
    explained = launch("-n", 2, "--explain", program, *words, cwd=tmp_path, **SECRETS)
    (run,) = (tmp_path / "logs").iterdir()
    kept = [(run / name).read_text() for name in ("report.txt", "failure.json", "launch.json")]

    assert done.code == 1
    shown = [done.out, done.err, planned.out, planned.err, explained.out, explained.err, *kept]
    assert [
        (secret, number) for secret in HIDDEN for number, each in enumerate(shown) if secret in each
    ] == []
    assert "ValueError: cannot log in with <redacted: HF_TOKEN>" in "\n".join(done.report)
    assert all("0.1234567" in each for each in (done.err, planned.out, kept[2]))


# --- wrong usage


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-n", "0"], "got 0; expected a whole number of at least 1"),
        (["-n", "-1"], "got -1; expected a whole number of at least 1"),
        (["-n", "two"], "got 'two'; expected a whole number of at least 1"),
        (["--nproc-per-nod", "2"], "did you mean '--nproc-per-node'"),
        (["--max-restarts", "-1"], "got -1; expected a whole number of at least 0"),
        (["--start-method", "forkserver"], "expected fork or spawn"),
        (["--show-ranks", "2", "-n", "2"], "error[D0314]"),
        (["--log-dir", "train.py"], "error[D0320]"),
        (["--set", "data.tial=pad"], "did you mean 'data.tail'"),
        (["-c", "nope.yaml"], "nope.yaml"),
    ],
)
def test_wrong_usage_is_refused_in_words_and_starts_nothing(
    tmp_path: Path, words: list[str], said: str
) -> None:
    done = launch(*words, script(tmp_path, "open('ran', 'w')"), cwd=tmp_path)

    assert done.code == 2
    assert done.seconds < 10
    assert said in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "ran").exists()


def test_more_ranks_than_cores_are_started_as_asked_and_warned_of(tmp_path: Path) -> None:
    done = launch("-n", 64, "--no-python", "sh", "-c", "echo $RANK of $WORLD_SIZE", cwd=tmp_path)

    assert done.code == 0, done.err
    assert sorted(done.out.splitlines()) == sorted(f"[rank {r}] {r} of 64" for r in range(64))
    assert f"{len(os.sched_getaffinity(0))} cores" in done.err or "usable cores" in done.err
    assert "warning" in done.err


# A program whose clock is set, forwards and backwards, again and again.
JUMPING_CLOCK = """
    import itertools, time
    true, jumps = time.time, itertools.cycle((0, 3600, -3600, 86400))
    time.time = lambda: true() + next(jumps)
"""
MEETS = """
    import os, sys, torch
    import torch.distributed as dist
    dist.init_process_group("gloo")
    ones = torch.ones(1)
    dist.all_reduce(ones)
    print("sum", ones.item())
    {then}
"""


@pytest.mark.parametrize(("then", "code"), [("", 0), ("sys.exit(dist.get_rank() * 3)", 3)])
def test_a_clock_that_jumps_changes_nothing(tmp_path: Path, then: str, code: int) -> None:
    (tmp_path / "jumps").mkdir()
    script(tmp_path / "jumps", JUMPING_CLOCK, "sitecustomize.py")
    path = f"{tmp_path / 'jumps'}{os.pathsep}{environment()['PYTHONPATH']}"
    done = launch("-n", 2, script(tmp_path, MEETS.format(then=then)), cwd=tmp_path, PYTHONPATH=path)

    assert done.code == code, done.err
    assert sorted(done.out.splitlines()) == ["[rank 0] sum 2.0", "[rank 1] sum 2.0"]
    assert done.seconds < 15


def test_the_command_line_wins_over_the_file_and_one_line_says_so(tmp_path: Path) -> None:
    (tmp_path / "distrib.yaml").write_text("mixed_precision: bf16\n")
    text = "from distrib import Accelerator\nprint('precision', Accelerator(cpu=True).mixed_precision)"
    done = launch("--mixed-precision", "fp16", script(tmp_path, text), cwd=tmp_path)

    assert done.code == 0, done.err
    assert done.out == "precision fp16\n"
    (line,) = [line for line in done.err.splitlines() if "bf16" in line]
    assert "mixed_precision = fp16 (--mixed-precision) overrides bf16 (distrib.yaml:1)" in line.replace(
        "'", ""
    )


def test_no_file_outside_the_working_directory_applies(tmp_path: Path) -> None:
    home, work = tmp_path / "home", tmp_path / "work"
    for name in ("distrib.yaml", ".distrib.yaml", ".config/distrib.yaml", ".config/distrib/config.yaml",
                 ".config/distrib/distrib.yaml", ".cache/huggingface/accelerate/default_config.yaml"):  # fmt: skip
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text("mixed_precision: bf16\nseed: 4711\n")
    (tmp_path / "distrib.yaml").write_text("seed: 4711\n")
    work.mkdir()
    env = {
        "HOME": str(home),
        "XDG_CONFIG_HOME": str(home / ".config"),
        "HF_HOME": str(home / ".cache/huggingface"),
    }
    nothing = launch("--explain", cwd=work, **env)
    (work / "distrib.yaml").write_text("seed: 3\n")
    own = launch("--explain", cwd=work, **env)

    assert (nothing.code, own.code) == (0, 0), nothing.err + own.err
    assert "config: (no file)" in nothing.out
    assert "4711" not in nothing.out + own.out
    assert "bf16" not in nothing.out + own.out
    assert "seed = 3  (distrib.yaml:1)" in own.out


@pytest.mark.parametrize(
    "words",
    [
        ["-c", "import distrib, distrib.config, distrib.errors"],
        ["-m", "distrib", "--help"],
        ["-m", "distrib", "launch", "--help"],
        ["-m", "distrib", "logs", "--help"],
        ["-m", "distrib", "launch", "-n", "2", "--explain"],
        ["-m", "distrib", "launch", "-n", "2", "--dry-run", "train.py"],
        ["-m", "distrib", "launch", "-n", "2", "--start-method", "spawn", "train.py"],
    ],
    ids=lambda words: " ".join(words[1:5]),
)
def test_torch_is_not_imported_for(tmp_path: Path, words: list[str]) -> None:
    script(tmp_path, "")
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *words],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )

    imported = {
        line.rpartition("|")[2].strip()
        for line in done.stderr.splitlines()
        if line.startswith("import time:")
    }
    assert "json" in imported or "distrib" in imported
    assert not imported & {"torch", "numpy"}


# --- the report

FAILS = """
    import os, pathlib, time

    def wait_for_the_others():
        pathlib.Path("waits").touch()
        while True:
            time.sleep(0.01)

    def load(row):
        raise KeyError(f"no column {row}")

    def train():
        if os.environ["RANK"] == "1":
            while not os.path.exists("waits"):
                time.sleep(0.01)
            load("x")
        wait_for_the_others()

    train()
"""


@METHODS
def test_the_facts_of_a_failure_are_kept_beside_the_report(tmp_path: Path, method: str) -> None:
    program = script(tmp_path, FAILS)
    done = launch("-n", 2, "--start-method", method, "--log-dir", "logs", program, cwd=tmp_path)
    (run,) = (tmp_path / "logs").iterdir()
    failure = json.loads((run / "failure.json").read_text())

    assert done.code == 1
    assert (run / "report.txt").read_text().splitlines() == done.report
    assert any(
        line.startswith("  rank 0 followed: ended by the launcher, at ")
        and line.endswith((f"{program}:7 in wait_for_the_others", f"{program}:8 in wait_for_the_others"))
        for line in done.report
    ), done.report
    stated = {
        key: failure[key]
        for key in ("format", "attempt", "max_restarts", "exit_code", "interrupted", "root_cause")
    }
    assert stated == {
        "format": 1,
        "attempt": 0,
        "max_restarts": 0,
        "exit_code": 1,
        "interrupted": None,
        "root_cause": 1,
    }
    first, second = failure["ranks"]
    assert (second["rank"], second["exception"], second["followed"]) == (1, "KeyError", False)
    assert second["message"] == "KeyError: 'no column x'"
    assert [frame[2] for frame in second["frames"]] == ["<module>", "train", "load"]
    assert {frame[0] for frame in second["frames"]} == {str(program)}
    assert (second["exit_code"], second["signal"]) == (1, None)
    assert (first["rank"], first["exception"], first["followed"], first["exit_code"]) == (0, None, True, 143)
    assert [frame[2] for frame in first["stood_at"]] == ["wait_for_the_others", "train", "<module>"]
    assert [Path(each["log"]).name for each in failure["ranks"]] == ["rank-0.log", "rank-1.log"]
    assert f"its whole output: {second['log']}" in "\n".join(done.report)


def test_one_failure_while_training_is_at_most_25_lines_in_all(tmp_path: Path) -> None:
    text = """
        import torch
        from torch.utils.data import DataLoader, TensorDataset
        from distrib import Accelerator

        def check(loss, step):
            if step == 2 and accelerator.process_index == 1:
                raise ValueError(f"loss is {loss:.1f} at step {step}")

        accelerator = Accelerator(cpu=True, seed=0)
        model = torch.nn.Linear(3, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loader = DataLoader(TensorDataset(torch.ones(32, 3)), batch_size=2)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        for step, (x,) in enumerate(loader):
            accelerator.backward(model(x).mean())
            check(4.0, step)
            optimizer.step()
    """
    with nothing_left():
        done = launch("-n", 2, script(tmp_path, text), cwd=tmp_path)

    assert done.code == 1
    assert len((done.out + done.err).splitlines()) <= 25
    assert done.report[0].startswith("distrib: rank 1 (process ")
    assert done.report[0].endswith(" failed: ValueError")
    assert "  ValueError: loss is 4.0 at step 2" in done.report
    assert f"  {tmp_path}/train.py:8 in check" in done.report
    assert done.err.count("ValueError: ") == 1


@pytest.mark.parametrize("columns", [20, 40, 60])
def test_a_narrow_terminal_without_color_shows_the_message_in_lines_that_fit(
    tmp_path: Path, columns: int
) -> None:
    text = """
        import os, pathlib, time
        print("here")
        pathlib.Path(os.environ["RANK"]).touch()
        while not (os.path.exists("0") and os.path.exists("1")):
            time.sleep(0.01)
        raise ValueError("one two three four five six seven " * 9)
    """
    words = ("-n", 2, *SPAWN, script(tmp_path, text))
    with at_terminal(*words, cwd=tmp_path, columns=columns, NO_COLOR="1", TERM="xterm-256color") as terminal:
        assert terminal.end() == 1

    assert "[rank 0] here\n" in terminal.shown
    assert not [
        part for part in terminal.shown.split("\x1b")[1:] if part.split("m")[0].strip("[;0123456789") == ""
    ]
    report = terminal.shown[terminal.shown.rindex("distrib: rank ") :].splitlines()
    assert len(report) <= 25
    assert max(len(line) for line in report) <= columns
    assert report[-1] == "exit code 1"
    assert "one two" in "\n".join(report[1:])


@METHODS
@pytest.mark.parametrize("text", ["def f(:\n", "import no_such_module\n"], ids=["syntax", "import"])
def test_an_error_before_the_first_line_is_shown_once(tmp_path: Path, text: str, method: str) -> None:
    done = launch("-n", 4, "--start-method", method, script(tmp_path, text), cwd=tmp_path)

    assert done.code == 1
    assert method == "fork" or done.seconds < 10  # to load torch takes its time, before the fault
    assert done.err.count("Error: ") == 1
    assert "Traceback" not in done.err
    assert str(tmp_path / "train.py") in "\n".join(done.report)


# --- output


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """Mount a disk of its own size, or skip the test."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs: run as root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("code", [0, 7])
def test_a_full_disk_for_logs_is_told_and_the_job_goes_on(tmp_path: Path, code: int) -> None:
    text = f"""
        import os, sys
        for i in range(4000):
            print(i, "x" * 100)
        open(f"ran-{{os.environ['RANK']}}", "w").close()
        while not (os.path.exists("ran-0") and os.path.exists("ran-1")):
            pass
        sys.exit({code})
    """
    with small_disk(tmp_path / "disk", "200k") as disk, nothing_left():
        done = launch("-n", 2, *SPAWN, "--log-dir", disk / "logs", script(tmp_path, text), cwd=tmp_path)

    assert len(done.out.splitlines()) == 8000
    (warning,) = [line for line in done.err.splitlines() if line.startswith("distrib: warning: the logs")]
    assert "No space left on device" in warning
    assert "Traceback" not in done.err
    assert done.code == code
    assert not code or done.report[-1] == "exit code 7"


def test_an_endless_output_is_kept_whole_and_takes_no_memory(tmp_path: Path) -> None:
    text = "import os, sys\nline = os.environ['RANK'] * 999 + '\\n'\nfor i in range(100): sys.stdout.write(line * 1000)"
    words = command("-n", 2, *SPAWN, "--log-dir", "logs", script(tmp_path, text))
    # Started by a small process: what a process weighed before it became another program counts as that one's.
    start = "import os, sys; at = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ); _, status, used = os.wait4(at, 0)"
    start += "; print(used.ru_maxrss, file=sys.stderr); sys.exit(os.waitstatus_to_exitcode(status))"
    with (tmp_path / "out").open("wb") as out:
        small = [sys.executable, "-S", "-c", start, *words]
        done = subprocess.run(
            small, cwd=tmp_path, env=environment(), stdout=out, stderr=subprocess.PIPE, check=False
        )

    assert done.returncode == 0
    assert (tmp_path / "out").stat().st_size == 2 * 100_000 * (1000 + len("[rank 0] "))
    (run,) = (tmp_path / "logs").iterdir()
    assert [path.stat().st_size for path in sorted(run.glob("attempt-0/*"))] == [100_000_000] * 2
    assert int(done.stderr.split()[-1]) < 150_000  # KiB
    shutil.rmtree(tmp_path / "logs")
    (tmp_path / "out").unlink()


# --- crowds

TALKS = """
    import os, socket, time
    address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    if os.environ["RANK"] == "0":
        server = socket.socket()
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(address)
        server.listen()
        peer = server.accept()[0]
        assert peer.recv(99).decode() == os.environ["MINE"]
    else:
        while True:
            peer = socket.socket()
            try:
                peer.connect(address)
                break
            except ConnectionRefusedError:
                peer.close()
                time.sleep(0.01)
        peer.send(os.environ["MINE"].encode())
"""


@pytest.mark.parametrize(
    ("launches", "method", "text"), [(8, "spawn", TALKS), (4, "fork", MEETS.format(then=""))]
)
def test_launches_at_once_all_pass(tmp_path: Path, launches: int, method: str, text: str) -> None:
    program = script(tmp_path, text)
    with nothing_left():
        processes = [
            subprocess.Popen(
                command("-n", 2, "--start-method", method, program),
                cwd=tmp_path, env=environment(MINE=str(number)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for number in range(launches)
        ]  # fmt: skip
        ended = [process.communicate(timeout=LIMIT_S) for process in processes]

    assert [process.returncode for process in processes] == [0] * launches, ended


# --- the end

SUMS = """
    import os, pathlib, torch
    import torch.distributed as dist
    from distrib import Accelerator
    accelerator = Accelerator(cpu=True)
    while True:
        accelerator.reduce(torch.ones(1))
        pathlib.Path(f"sums-{accelerator.process_index}").touch()
"""


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)]
)
def test_nothing_is_left_of_ranks_that_talk_to_each_other(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    with nothing_left(), launching("-n", 2, "--cpu", script(tmp_path, SUMS), cwd=tmp_path) as process:
        for rank in range(2):
            until(tmp_path / f"sums-{rank}", process)
        done = ended_by(process, number)

    assert done.code == code, done.err
    assert done.seconds < 12
    if code > 0:
        assert len(done.report) == 1, done.err
        assert "Traceback" not in done.err


FORKS = """
    import atexit, os, pathlib
    memory = bytearray(os.urandom(4096)) * 100_000  # which makes a fork take long
    atexit.register(lambda: os.getpid() == own and print("bye"))
    own = os.getpid()
    pathlib.Path("forks").touch()
    while True:
        child = os.fork()
        if not child:
            os._exit(0)
        os.waitpid(child, 0)
"""


@METHODS
def test_a_rank_that_is_forking_hears_that_it_is_to_end(tmp_path: Path, method: str) -> None:
    words = ("--start-method", method, "--grace", 5, script(tmp_path, FORKS))
    for _ in range(3):
        with nothing_left(), launching(*words, cwd=tmp_path) as process:
            until(tmp_path / "forks", process)
            (tmp_path / "forks").unlink()
            done = ended_by(process, signal.SIGTERM)

        assert (done.code, done.out) == (143, "bye\n"), done.err
        assert done.seconds < 4
        assert "Traceback" not in done.err


STREAMS = """
    import warnings
    warnings.simplefilter("ignore")
    import torch
    from torch.utils.data import DataLoader, IterableDataset
    from distrib import Accelerator

    class Rows(IterableDataset):
        def __iter__(self):
            return iter(torch.arange(33.0).reshape(11, 3))

    if __name__ == "__main__":
        accelerator = Accelerator(cpu=True, seed=0)
        model = torch.nn.Linear(3, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
        loader = DataLoader(Rows(), batch_size=2, num_workers={workers})
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        rows = 0
        for x in loader:
            rows += len(x)
            optimizer.zero_grad()
            accelerator.backward(model(x).mean())
            optimizer.step()
        print("world", accelerator.num_processes, torch.distributed.get_backend(), "rows", rows)
"""


@pytest.mark.parametrize("workers", [0, 1])
def test_two_ranks_that_stream_their_data_and_just_end_are_a_success(tmp_path: Path, workers: int) -> None:
    with nothing_left():
        done = launch(
            "--cpu", "--num_processes", 2, script(tmp_path, STREAMS.format(workers=workers)), cwd=tmp_path
        )

    assert done.code == 0, done.err
    worlds = [line.split()[2:7] for line in sorted(done.out.splitlines())]
    assert [world[:4] for world in worlds] == [["world", "2", "gloo", "rows"]] * 2
    assert sum(int(world[4]) for world in worlds) == 11
    assert "terminate" not in done.err
