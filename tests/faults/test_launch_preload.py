"""Ranks that are forked from a process which has loaded torch are, to the program, ranks of fresh interpreters."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.faults.launching import LIMIT_S, Launched, command, environment, launch, launching, script
from tests.faults.leaving import ended_by, nothing_left, until
from tests.faults.test_launch_program import LOOK, package, plain
from tests.faults.test_launch_terminal import at_terminal
from tests.unit.test_launcher_workers import REFUSES_FORKS

METHODS = pytest.mark.parametrize("method", ["spawn", "fork"])


def told(done: Launched, ranks: int = 2) -> list[Any]:
    """Return the one line of JSON that each rank has printed."""
    assert done.code == 0, done.err
    lines = sorted(line for line in done.out.splitlines() if line.startswith("[rank "))
    assert len(lines) == ranks, done.out
    return [json.loads(line[len("[rank N] ") :]) for line in lines]


@pytest.mark.parametrize(
    "words",
    [
        ["at/look.py", "--lr", "3", "-n"],
        ["-m", "pkg.look", "-m"],
        ["-m", "pkg.sub"],
        ["app.pyz", "x"],
        ["pkg/sub", "x"],
    ],
    ids=["script", "module", "package", "archive", "directory"],
)
def test_a_forked_program_sees_what_plain_python_shows_it(tmp_path: Path, words: list[str]) -> None:
    package(tmp_path)
    (tmp_path / "at").mkdir()
    script(tmp_path / "at", LOOK, "look.py")
    with zipfile.ZipFile(tmp_path / "app.pyz", "w") as archive:
        archive.write(tmp_path / "pkg" / "sub" / "__main__.py", "__main__.py")

    expected = plain(*words, cwd=tmp_path)

    assert told(launch("-n", 2, *words, cwd=tmp_path)) == [expected, expected]


STATE = """
    import torch, torch._dynamo, numpy
    import ctypes, gc, json, locale, logging, multiprocessing, os, resource, signal, subprocess, sys, threading
    import warnings

    def files():
        paths = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
        return sorted(os.readlink(path).partition(":")[0] for path in paths if os.path.islink(path))

    getenv = ctypes.CDLL(None).getenv
    getenv.restype = ctypes.c_char_p
    if __name__ == "__main__":
        handlers = {s.name: getattr(signal.getsignal(s), "__name__", str(signal.getsignal(s))) for s in signal.valid_signals() if s < 32}
        torch.set_num_threads(2)
        print(json.dumps({"env": dict(os.environ), "state": {
            "argv": sys.argv, "orig": sys.orig_argv, "path": sys.path, "flags": str(sys.flags), "warn": sys.warnoptions,
            "filters": [str(each) for each in warnings.filters], "handlers": handlers, "mask": str(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
            "threads": threading.active_count(), "main": threading.current_thread() is threading.main_thread(),
            "name": threading.current_thread().name, "process": multiprocessing.current_process().name,
            "method": multiprocessing.get_start_method(allow_none=True), "parent": str(multiprocessing.parent_process()),
            "gc": [gc.isenabled(), gc.get_threshold()], "recursion": sys.getrecursionlimit(),
            "switch": sys.getswitchinterval(), "handler count": len(logging.root.handlers), "level": logging.root.level,
            "cwd": os.getcwd(), "umask": os.umask(0o22), "locale": locale.setlocale(locale.LC_ALL),
            "files": files(),
            "session": os.getsid(0) == os.getpid() == os.getpgid(0),
            "streams": [[s.encoding, s.errors, s.isatty(), s.line_buffering] for s in (sys.stdin, sys.stdout, sys.stderr)],
            "same streams": [sys.stdout is sys.__stdout__, sys.stderr is sys.__stderr__, sys.stdin is sys.__stdin__],
            "modes": [getattr(s, "mode", None) for s in (sys.stdin, sys.stdout, sys.stderr)],
            "names": [s.name for s in (sys.stdin, sys.stdout, sys.stderr)],
            "limit": resource.getrlimit(resource.RLIMIT_NOFILE), "doc": sys.executable, "path0": sys.path[0],
            "sum": (torch.ones(300, 300) @ torch.ones(300, 300)).sum().item(),
            "dont_write": sys.dont_write_bytecode, "hooks": [sys.displayhook.__name__, threading.excepthook.__name__],
            "default": [str(torch.get_default_dtype()), torch.is_grad_enabled(), torch.get_num_interop_threads()],
        }, "shell": subprocess.check_output("echo $RANK $LOCAL_RANK", shell=True, text=True),
        "native": getenv(b"RANK").decode()}))
"""


def test_a_forked_rank_is_in_the_state_of_a_fresh_interpreter(tmp_path: Path) -> None:
    program = script(tmp_path, STATE)
    fresh, forked = (
        told(launch("-n", 2, "--start-method", method, program, "arg", cwd=tmp_path, MY_OWN="1"))
        for method in ("spawn", "fork")
    )

    of_the_launch = ("MASTER_PORT", "_DISTRIB_RUN", "DISTRIB_CONFIG")
    for rank in range(2):
        assert forked[rank]["shell"].split() == [str(rank)] * 2
        assert forked[rank]["native"] == str(rank)
        assert forked[rank]["env"] == {
            **fresh[rank]["env"],
            **{name: forked[rank]["env"][name] for name in of_the_launch},
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is served beside the ranks
        }
        assert forked[rank]["state"] == fresh[rank]["state"]


def test_random_numbers_differ_by_forked_rank_and_attempt_as_those_of_fresh_interpreters(
    tmp_path: Path,
) -> None:
    text = """
        import json, os, random, secrets, tempfile, uuid
        import numpy, torch
        drawn = [random.random(), numpy.random.rand(), float(numpy.random.default_rng().random()), str(uuid.uuid4())]
        drawn += [next(tempfile._get_candidate_names()), torch.rand(1).item(), torch.initial_seed(), secrets.token_hex(8)]
        print(json.dumps(drawn))
        if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            open(os.environ["RANK"], "w").close()
            while not (os.path.exists("0") and os.path.exists("1")):
                pass
            raise SystemExit(1)
    """
    done = launch("-n", 2, "--max-restarts", 1, "--grace", 1, script(tmp_path, text), cwd=tmp_path)

    assert done.code == 0, done.err
    drawn = zip(*(json.loads(line.partition("] ")[2]) for line in done.out.splitlines()), strict=True)
    assert [len(set(each)) for each in drawn] == [4] * 8


IN_PARALLEL = """
    import json, multiprocessing, os, pickle, warnings
    warnings.simplefilter("ignore")
    import torch
    from torch.utils.data import DataLoader, Dataset

    class Squares(Dataset):
        def __len__(self):
            return 4
        def __getitem__(self, i):
            return torch.tensor([i * i, os.getpid()])

    class Thing:
        def __init__(self, x):
            self.x = x

    def double(thing):
        return Thing(2 * thing.x)

    if __name__ == "__main__":
        seen = {"pickled": pickle.loads(pickle.dumps(Thing(3))).x}
        for method in ("fork", "spawn", "forkserver"):
            context = multiprocessing.get_context(method)
            with context.Pool(1) as pool:
                seen[f"pool {method}"] = [t.x for t in pool.map_async(double, [Thing(1), Thing(2)]).get(20)]
            rows = torch.cat(list(DataLoader(Squares(), 2, num_workers=1, multiprocessing_context=context)))
            seen[f"loader {method}"] = rows[:, 0].tolist()
            seen[f"own {method}"] = os.getpid() in rows[:, 1]
        print(json.dumps(seen))
"""


@METHODS
def test_pools_and_data_workers_find_what_the_program_has_defined(tmp_path: Path, method: str) -> None:
    with nothing_left():
        done = launch("-n", 2, "--start-method", method, script(tmp_path, IN_PARALLEL), cwd=tmp_path)

    expected: dict[str, object] = {"pickled": 3}
    for name in ("fork", "spawn", "forkserver"):
        expected |= {f"pool {name}": [2, 4], f"loader {name}": [0, 1, 4, 9], f"own {name}": False}
    assert told(done) == [expected, expected]


WARNS = """
    import sys, warnings
    for _ in range(2):
        warnings.warn("old", DeprecationWarning)
    warnings.warn("soon", PendingDeprecationWarning)
    import logging
    logging.warning("logged")
    print("shown", file=sys.stderr)
"""


@METHODS
@pytest.mark.parametrize("filters", ["", "error::ResourceWarning,always"])
def test_warnings_are_shown_as_plain_python_shows_them(tmp_path: Path, method: str, filters: str) -> None:
    program = script(tmp_path, WARNS)
    bare = subprocess.run(
        [sys.executable, program],
        env=environment(PYTHONWARNINGS=filters),
        capture_output=True,
        text=True,
        check=True,
    )
    done = launch("-n", 2, "--start-method", method, program, cwd=tmp_path, PYTHONWARNINGS=filters)

    for rank in range(2):
        prefix = f"[rank {rank}] "
        assert (
            "".join(
                line.removeprefix(prefix)
                for line in done.err.splitlines(keepends=True)
                if line.startswith(prefix)
            )
            == bare.stderr
        )


@METHODS
def test_a_line_is_seen_when_it_is_written(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    text = """
        import os, time
        print("first of", os.environ["RANK"])
        while not os.path.exists("seen"):
            time.sleep(0.01)
    """
    words = ("-n", 2, "--start-method", method, script(tmp_path, text))
    with launching(*words, cwd=tmp_path) as process:
        assert process.stdout is not None
        seen = {process.stdout.readline() for _ in range(2)}
        (tmp_path / "seen").touch()
        assert process.wait(LIMIT_S) == 0

    assert seen == {"[rank 0] first of 0\n", "[rank 1] first of 1\n"}


@METHODS
def test_one_rank_has_the_terminal(tmp_path: Path, method: str) -> None:
    text = """
        import os, sys
        print("terminals:", *(s.isatty() for s in (sys.stdin, sys.stdout, sys.stderr)), os.get_terminal_size().columns)
        print("got", input("say: "))
    """
    words = ("--start-method", method, script(tmp_path, text))
    with at_terminal(*words, cwd=tmp_path, columns=97) as terminal:
        terminal.wait_for("say: ")
        terminal.type(b"it\n")
        assert terminal.end() == 0

    assert "terminals: True True True 97\n" in terminal.shown
    assert "got it\n" in terminal.shown


OWN_NAMES = [
    "worker",
    "preloader",
    "guard",
    "numa",
    "report",
    "output",
    "plan",
    "process",
    "starting",
    "launcher",
    "config",
]


@METHODS
@pytest.mark.parametrize(
    "names", [OWN_NAMES, ["secrets", "queue", "numbers", "platform"]], ids=["ours", "Python's"]
)
def test_a_neighbour_of_the_script_may_have_any_name(tmp_path: Path, method: str, names: list[str]) -> None:
    (tmp_path / "at").mkdir()
    for name in names:
        script(tmp_path / "at", f"mine = '{name}'", f"{name}.py")
    text = (
        f"import json, {', '.join(names)}\nprint(json.dumps([{', '.join(f'{name}.mine' for name in names)}]))"
    )

    done = launch("-n", 2, "--start-method", method, script(tmp_path / "at", text), cwd=tmp_path)

    assert told(done) == [names, names]


@METHODS
def test_a_debugger_of_the_first_rank_reads_its_commands(tmp_path: Path, method: str) -> None:
    program = script(tmp_path, "import os\nrank = os.environ['RANK']\nx = 6\nprint('ran', rank)")
    done = subprocess.run(
        command("-n", 2, "--start-method", method, "-m", "pdb", program),
        cwd=tmp_path, env=environment(), input="b 4\nc\np x * 7, rank\nc\nq\n", capture_output=True, text=True,
        timeout=LIMIT_S,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert "(42, '0')" in done.stdout
    assert "(Pdb) ran 0" in done.stdout


def test_a_breakpoint_of_the_first_rank_reads_its_commands(tmp_path: Path) -> None:
    text = "import os\nx = 6\nif os.environ['RANK'] == '0': breakpoint()\nprint('went on with', x)"
    done = subprocess.run(
        command("-n", 2, script(tmp_path, text)),
        cwd=tmp_path, env=environment(), input="x = 8\nc\n", capture_output=True, text=True, timeout=LIMIT_S,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert "(Pdb) (Pdb) went on with 8" in done.stdout
    assert "[rank 1] went on with 6" in done.stdout


@METHODS
def test_the_lines_of_every_rank_are_covered(tmp_path: Path, method: str) -> None:
    coverage = pytest.importorskip("coverage", reason="needs coverage: pip install coverage")
    text = """
        import os
        if os.environ["RANK"] == "0":
            a = 1
        else:
            b = 2
    """
    script(tmp_path, "import coverage; coverage.process_startup()", "sitecustomize.py")
    (tmp_path / "rc").write_text("[run]\nparallel = True\nsource = .\ndata_file = data\n")
    program = script(tmp_path, text)
    path = os.pathsep.join(
        [str(tmp_path), environment()["PYTHONPATH"], str(Path(coverage.__file__).parents[1])]
    )
    done = launch(
        "-n",
        2,
        "--start-method",
        method,
        program,
        cwd=tmp_path,
        COVERAGE_PROCESS_START=str(tmp_path / "rc"),
        PYTHONPATH=path,
    )
    assert done.code == 0, done.err

    data = coverage.Coverage(data_file=str(tmp_path / "data"), config_file=str(tmp_path / "rc"))
    data.combine([str(each) for each in tmp_path.glob("data.*")])
    assert data.get_data().lines(str(program)) == [2, 3, 4, 6]


@METHODS
def test_the_process_table_shows_the_program_of_every_rank(tmp_path: Path, method: str) -> None:
    text = """
        import os, pathlib, time
        pathlib.Path(f"{os.getpid()}.pid").touch()
        while not os.path.exists("seen"):
            time.sleep(0.01)
    """
    program = script(tmp_path, text, "my_program.py")
    with launching("-n", 2, "--start-method", method, program, "--lr", "3", cwd=tmp_path) as process:
        for name in ("a", "b"):
            while len(list(tmp_path.glob("*.pid"))) < 2:
                assert process.poll() is None, name
        shown = [psutil.Process(int(path.stem)).cmdline() for path in tmp_path.glob("*.pid")]
        (tmp_path / "seen").touch()
        assert process.wait(LIMIT_S) == 0

    assert [words[-3:] for words in shown] == [[str(program), "--lr", "3"]] * 2


COUNTS = """
    import os, pathlib
    with open(os.environ["COUNTED"], "a") as file:
        file.write(f"{os.getpid()}\\n")
    loaded_by = os.getpid()
"""


@pytest.mark.parametrize("place", ["on PYTHONPATH", "beside the script"])
def test_a_preloaded_module_is_loaded_once_for_all_ranks(tmp_path: Path, place: str) -> None:
    at = tmp_path if place == "beside the script" else tmp_path / "lib"
    at.mkdir(exist_ok=True)
    script(at, COUNTS, "mine.py")
    program = script(
        tmp_path, "import json, mine, os\nprint(json.dumps([mine.loaded_by, id(mine), os.getpid()]))"
    )
    done = launch(
        *("-n", 2, "--preload", "mine", program),
        cwd=tmp_path,
        COUNTED=str(tmp_path / "counted"),
        PYTHONPATH=f"{environment()['PYTHONPATH']}{os.pathsep}{tmp_path / 'lib'}",
    )

    ranks = told(done)
    (loader,) = map(int, (tmp_path / "counted").read_text().split())
    assert [rank[0] for rank in ranks] == [loader, loader]
    assert ranks[0][1] == ranks[1][1]
    assert loader not in [rank[2] for rank in ranks]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (None, "No module named 'mine'"),
        ("raise ValueError('not today')", "ValueError: not today"),
        ("def f(:", "SyntaxError"),
    ],
    ids=["missing", "raises", "syntax"],
)
def test_a_module_that_cannot_be_preloaded_is_refused_before_anything_starts(
    tmp_path: Path, text: str | None, why: str
) -> None:
    if text is not None:
        script(tmp_path, text, "mine.py")
    program = script(tmp_path, "open('ran', 'w')")
    with nothing_left():
        done = launch(
            *("-n", 2, "--preload", "mine", program),
            cwd=tmp_path,
            PYTHONPATH=f"{environment()['PYTHONPATH']}{os.pathsep}{tmp_path}",
        )

    assert done.code == 2
    assert "error[D0312] launch.preload: mine cannot be imported: " in done.err
    assert why in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "ran").exists()


def test_a_refused_fork_in_the_preloader_is_an_error_with_its_hint(tmp_path: Path) -> None:
    script(tmp_path, REFUSES_FORKS, "mine.py")
    program = script(tmp_path, "open('ran', 'w')")
    with nothing_left():
        done = launch(
            *("-n", 2, "--cpu", "--preload", "mine", program),
            cwd=tmp_path,
            PYTHONPATH=f"{environment()['PYTHONPATH']}{os.pathsep}{tmp_path}",
        )

    assert done.code == 2
    assert "error[D0313]" in done.err
    assert "fix: start fewer processes" in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "ran").exists()


def test_a_module_that_starts_a_thread_is_not_forked_but_said(tmp_path: Path) -> None:
    text = "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\nimport os\nat = os.getpid()"
    script(tmp_path, text, "mine.py")
    program = script(tmp_path, "import json, os, mine\nprint(json.dumps(mine.at == os.getpid()))")
    done = launch(
        *("-n", 2, "--preload", "mine", program),
        cwd=tmp_path,
        PYTHONPATH=f"{environment()['PYTHONPATH']}{os.pathsep}{tmp_path}",
    )

    assert told(done) == [True, True]
    (warning,) = [line for line in done.err.splitlines() if "warning" in line]
    assert "importing mine has started 1 thread" in warning
    assert "fresh interpreter" in warning


# A module that loads until the test lets it.
LOADS = """
    import os, pathlib, time
    pathlib.Path(os.environ["AT"], "loading").touch()
    while not os.path.exists(os.environ["AT"] + "/loaded"):
        time.sleep(0.01)
"""


def preloader(process: subprocess.Popen[str]) -> psutil.Process:
    """Return the process that loads torch for the ranks of a launch."""
    return next(
        each for each in psutil.Process(process.pid).children() if "preloader.py" in " ".join(each.cmdline())
    )


def loading(folder: Path, text: str) -> tuple[tuple[object, ...], dict[str, str]]:
    """Return the words and variables of a launch whose preloader loads until `folder/loaded` exists."""
    script(folder, LOADS, "mine.py")
    path = f"{environment()['PYTHONPATH']}{os.pathsep}{folder}"
    return ("-n", 2, "--preload", "mine", script(folder, text)), {"AT": str(folder), "PYTHONPATH": path}


def test_a_preloader_that_is_killed_while_it_loads_is_replaced_by_fresh_interpreters(tmp_path: Path) -> None:
    words, env = loading(tmp_path, "import os\nprint('ran', os.environ['RANK'])")
    with nothing_left(), launching(*words, cwd=tmp_path, **env) as process:
        until(tmp_path / "loading", process)
        preloader(process).kill()
        out, err = process.communicate(timeout=LIMIT_S)

    assert process.returncode == 0, err
    assert sorted(out.splitlines()) == ["[rank 0] ran 0", "[rank 1] ran 1"]
    (warning,) = [line for line in err.splitlines() if "warning" in line]
    assert "SIGKILL" in warning


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)],
)
def test_nothing_is_left_of_a_launch_that_is_ended_while_it_loads(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    words, env = loading(tmp_path, "open('ran', 'w')")
    with nothing_left(), launching(*words, cwd=tmp_path, **env) as process:
        until(tmp_path / "loading", process)
        done = ended_by(process, number)

    assert done.code == code, done.err
    assert done.seconds < 10
    assert "Traceback" not in done.err
    assert not (tmp_path / "ran").exists()


WAITS = """
    import os, pathlib, sys, time
    attempt, rank = os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]
    pathlib.Path(f"attempt-{attempt}-rank-{rank}").touch()
    while attempt == "0" and not os.path.exists("go"):
        time.sleep(0.01)
    print("went on")
"""


def test_ranks_outlive_the_preloader(tmp_path: Path) -> None:
    with nothing_left(), launching("-n", 2, script(tmp_path, WAITS), cwd=tmp_path) as process:
        for rank in range(2):
            until(tmp_path / f"attempt-0-rank-{rank}", process)
        preloader(process).kill()
        (tmp_path / "go").touch()
        out, err = process.communicate(timeout=LIMIT_S)

    assert process.returncode == 0, err
    assert out.count("went on") == 2


def test_a_job_is_restarted_although_its_preloader_was_killed(tmp_path: Path) -> None:
    program = script(tmp_path, WAITS + '    sys.exit(3 if attempt == "0" else 0)\n')
    words = ("-n", 2, "--max-restarts", 1, "--grace", 1, program)
    with nothing_left(), launching(*words, cwd=tmp_path) as process:
        for rank in range(2):
            until(tmp_path / f"attempt-0-rank-{rank}", process)
        preloader(process).kill()
        (tmp_path / "go").touch()
        err = process.communicate(timeout=LIMIT_S)[1]

    assert process.returncode == 0, err
    assert len(list(tmp_path.glob("attempt-1-*"))) == 2


def test_ranks_find_each_other_after_the_first_one_has_ended(tmp_path: Path) -> None:
    text = """
        import os, time, torch
        import torch.distributed as dist
        dist.init_process_group("gloo")
        rank, host, port = dist.get_rank(), os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        pids = [None, None, None]
        dist.all_gather_object(pids, os.getpid())
        if rank == 0:
            os._exit(0)
        while os.path.exists(f"/proc/{pids[0]}"):
            time.sleep(0.01)
        store = dist.TCPStore(host, port, is_master=False)
        store.set(f"at {rank}", "here")
        store.wait(["at 1", "at 2"])
        group = dist.new_group([1, 2], use_local_synchronization=True)
        ones = torch.ones(1)
        dist.all_reduce(ones, group=group)
        print("sum", ones.item())
    """
    done = launch("-n", 3, "--cpu", script(tmp_path, text), cwd=tmp_path)

    assert done.code == 0, done.err
    assert sorted(done.out.splitlines()) == ["[rank 1] sum 2.0", "[rank 2] sum 2.0"]
