"""A launched program sees what it sees under plain `python`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.faults.launching import environment, launch, script

LOOK = """
    import json, multiprocessing, os, pickle, sys, __main__

    class Thing:
        pass

    def square(x):
        return x * x

    if __name__ == "__main__":
        spec = __spec__ and [__spec__.name, __spec__.origin]
        squares = None
        if not (__spec__ and __spec__.name.endswith("__main__")):  # which Python does not import in a spawned process
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                squares = pool.map(square, [1, 2])
        print(json.dumps({
            "argv": sys.argv, "path0": sys.path[0], "file": __file__, "spec": spec, "package": __package__,
            "loader": type(__loader__).__name__, "name": __name__, "names": sorted(set(globals()) - {"__annotations__"}),
            "same": __main__.Thing is Thing, "pickled": type(pickle.loads(pickle.dumps(Thing()))) is Thing,
            "squares": squares, "orig": [a for a in sys.orig_argv[1:]], "doc": __doc__,
            "frames": sys._getframe().f_code.co_filename,
        }))
"""


def plain(*words: str, cwd: Path) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return json.loads(done.stdout)


def package(folder: Path) -> None:
    (folder / "pkg" / "sub").mkdir(parents=True)
    (folder / "pkg" / "__init__.py").touch()
    (folder / "pkg" / "sub" / "__init__.py").touch()
    script(folder / "pkg", LOOK, "look.py")
    script(folder / "pkg" / "sub", LOOK, "__main__.py")


@pytest.mark.parametrize(
    "words", [["look.py", "--lr", "3", "--", "-n"], ["./look.py"], ["folder/../look.py", "-m"]]
)
def test_a_script_sees_what_plain_python_shows_it(tmp_path: Path, words: list[str]) -> None:
    (tmp_path / "folder").mkdir()
    script(tmp_path, LOOK, "look.py")

    done = launch(*words, cwd=tmp_path)

    assert json.loads(done.out) == plain(*words, cwd=tmp_path)


def test_a_script_behind_a_link_finds_its_neighbours_as_under_plain_python(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    script(tmp_path / "real", LOOK, "look.py")
    (tmp_path / "link.py").symlink_to("real/look.py")

    assert json.loads(launch("link.py", cwd=tmp_path).out) == plain("link.py", cwd=tmp_path)


@pytest.mark.parametrize("module", ["pkg.look", "pkg.sub"])
def test_a_module_sees_what_plain_python_shows_it(tmp_path: Path, module: str) -> None:
    package(tmp_path)

    done = launch("-m", module, "--lr", "3", cwd=tmp_path)

    assert json.loads(done.out) == plain("-m", module, "--lr", "3", cwd=tmp_path)


def test_a_directory_or_archive_with_a_main_module_runs(tmp_path: Path) -> None:
    script(tmp_path, "print('from', __file__.rpartition('/')[2])", "__main__.py")
    with zipfile.ZipFile(tmp_path / "app.pyz", "w") as archive:
        archive.write(tmp_path / "__main__.py", "__main__.py")

    shown = [launch(program, cwd=tmp_path).out for program in (tmp_path, "app.pyz")]

    assert shown == ["from __main__.py\n"] * 2


def test_a_command_runs_without_python(tmp_path: Path) -> None:
    done = launch("--no-python", "sh", "-c", 'echo "$RANK of $WORLD_SIZE"; exit 4', cwd=tmp_path)

    assert (done.code, done.out) == (4, "0 of 1\n")


def test_each_rank_gets_its_variables_and_nothing_private(tmp_path: Path) -> None:
    text = "import json, os; print(json.dumps(dict(os.environ)))"
    done = launch(
        "-n", 2, script(tmp_path, text), cwd=tmp_path, TORCHELASTIC_RUN_ID="outer", GROUP_WORLD_SIZE="3"
    )
    seen = {line[:8]: json.loads(line[9:]) for line in done.out.splitlines()}
    rank_1 = seen["[rank 1]"]

    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "MASTER_ADDR")
    assert [rank_1[name] for name in names] == ["1", "2", "1", "2", "0", "0", "127.0.0.1"]
    assert rank_1["GROUP_WORLD_SIZE"] == "1"
    assert rank_1["MASTER_PORT"] == seen["[rank 0]"]["MASTER_PORT"]
    of_torch = {name: value for name, value in rank_1.items() if name.startswith("TORCHELASTIC_")}
    assert of_torch == {
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def test_threads_are_divided_unless_the_user_set_them(tmp_path: Path) -> None:
    looks = script(tmp_path, "import os; print(os.environ['OMP_NUM_THREADS'])")
    cores = len(os.sched_getaffinity(0))

    assert launch(looks, cwd=tmp_path, OMP_NUM_THREADS="3").out == "3\n"
    assert int(launch(looks, cwd=tmp_path, OMP_NUM_THREADS="").out) <= cores


def test_stdout_and_stderr_stay_apart_and_lines_whole(tmp_path: Path) -> None:
    text = """
        import os, sys
        rank = os.environ["RANK"]
        for i in range(3000):
            print(f"{rank} {i} " + "x" * (i % 700))
            print(f"e{rank} {i}", file=sys.stderr)
        sys.stdout.write("no line end")
    """
    done = launch("-n", 3, script(tmp_path, text), cwd=tmp_path)

    expected = [f"[rank {r}] {r} {i} " + "x" * (i % 700) for r in range(3) for i in range(3000)]
    assert sorted(done.out.splitlines()) == sorted(expected + [f"[rank {r}] no line end" for r in range(3)])
    assert sorted(line for line in done.err.splitlines() if line.startswith("[")) == sorted(
        f"[rank {r}] e{r} {i}" for r in range(3) for i in range(3000)
    )


def test_lines_before_a_sigkill_are_shown(tmp_path: Path) -> None:
    text = "import os, signal\nprint('last words')\nos.kill(os.getpid(), signal.SIGKILL)"
    done = launch("-n", 2, script(tmp_path, text), cwd=tmp_path)

    assert "last words" in done.out


def test_one_rank_has_the_launchers_own_streams(tmp_path: Path) -> None:
    assert launch(script(tmp_path, "print('plain')"), cwd=tmp_path).out == "plain\n"


def test_the_report_comes_after_all_output(tmp_path: Path) -> None:
    text = "import sys\nfor i in range(5000): print('line', i, file=sys.stderr)\nraise ValueError('end')"
    done = launch("-n", 2, script(tmp_path, text), cwd=tmp_path)

    lines = done.err.splitlines()
    report = next(i for i, line in enumerate(lines) if line.startswith("distrib: rank"))
    assert not [line for line in lines[report:] if line.startswith("[rank")]


def test_a_script_s_own_excepthook_is_called(tmp_path: Path) -> None:
    text = "import sys\nsys.excepthook = lambda t, v, tb: print('hook got', v, tb.tb_lineno)\nraise ValueError('it')"
    done = launch(script(tmp_path, text), cwd=tmp_path)

    assert (done.code, done.out) == (1, "hook got it 3\n")


def test_a_forked_child_that_fails_is_not_the_rank(tmp_path: Path) -> None:
    text = """
        import os
        if os.fork() == 0:
            raise ValueError("only the child")
        os.wait()
    """
    assert launch(script(tmp_path, text), cwd=tmp_path).code == 0


def test_multiprocessing_can_terminate_a_forked_child(tmp_path: Path) -> None:
    text = """
        import multiprocessing, signal, time
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
        child.terminate()
        child.join()
        print(child.exitcode == -signal.SIGTERM)
    """
    assert launch(script(tmp_path, text), cwd=tmp_path).out == "True\n"


def test_the_first_rank_reads_standard_input(tmp_path: Path) -> None:
    program = script(tmp_path, "import sys; print(repr(sys.stdin.read()))")
    done = subprocess.run(
        [sys.executable, "-m", "distrib", "launch", "-n", "2", str(program)],
        cwd=tmp_path, env=environment(), input="typed", capture_output=True, text=True, timeout=60,
    )  # fmt: skip

    assert sorted(done.stdout.splitlines()) == ["[rank 0] 'typed'", "[rank 1] ''"]


def test_a_library_s_own_error_keeps_its_exit_code(tmp_path: Path) -> None:
    text = "from distrib.errors import ConfigError\nraise ConfigError('D0101', 'wrong', fix='mend it')"
    done = launch(script(tmp_path, text), cwd=tmp_path)

    assert done.code == 2
    assert "  fix: mend it" in "\n".join(done.report)
