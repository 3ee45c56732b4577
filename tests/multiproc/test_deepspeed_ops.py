"""What DeepSpeed compiles: one process at a time, no lock of a dead process, and a clear word without a compiler."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from distrib.errors import StrategyError

if find_spec("deepspeed") is None:
    pytest.skip("pip install deepspeed==0.19.8", allow_module_level=True)

from distrib.strategies.deepspeed_ops import break_dead_lock, building, extensions_folder, telling_why

HOLDS = """
import sys
from pathlib import Path
from distrib.strategies.deepspeed_ops import building
root = Path(sys.argv[1])
with building("op", root, say=lambda text: None):
    lock = (root / "op" / "lock").open("w")
    print("in", flush=True)
    sys.stdin.read()
"""


def test_a_lock_that_no_process_has_open_is_removed(tmp_path):
    said: list[str] = []
    (tmp_path / "lock").touch()
    assert break_dead_lock(tmp_path, said.append)
    assert not (tmp_path / "lock").exists()
    assert "whose process has died" in said[0]


def test_a_lock_that_a_process_has_open_stays(tmp_path):
    with (tmp_path / "lock").open("w"):
        assert not break_dead_lock(tmp_path)
        assert (tmp_path / "lock").exists()


def test_a_killed_build_leaves_neither_its_right_nor_its_lock(tmp_path):
    said: list[str] = []
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "in\n"
        with (tmp_path / "op.building").open() as right, pytest.raises(BlockingIOError):
            fcntl.flock(right, fcntl.LOCK_EX | fcntl.LOCK_NB)
        child.kill()
        child.wait()
    with building("op", tmp_path, said.append):
        assert not (tmp_path / "op" / "lock").exists()
    assert [text.split(",")[0].split(" in ")[0] for text in said[1:]] == [
        f"deepspeed: compiling op into {tmp_path / 'op'}",
        "deepspeed: compiled op",
    ]


def test_what_is_compiled_already_needs_no_compiler_and_no_word(tmp_path, monkeypatch):
    said: list[str] = []
    (tmp_path / "op").mkdir()
    (tmp_path / "op" / "op.so").touch()
    monkeypatch.setenv("PATH", "")
    with building("op", tmp_path, said.append):
        pass
    assert said == []


def test_without_a_compiler_the_error_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(StrategyError, match=r"D0872.*no-such-compiler and ninja"), building("op", tmp_path):
        pass


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("Error building extension 'op': [1/3] c++ -c a.cpp\na.cpp:3:10: fatal error: b.h: No such file\n1 error"),
         "a.cpp:3:10: fatal error: b.h: No such file"),
        (RuntimeError("[3/3] c++ -o op.so\n/usr/bin/ld: cannot find -laio: No such file"), "cannot find -laio"),
        (subprocess.CalledProcessError(1, ["/bin/false", "-v"]), "'/bin/false', '-v'"),
        (ImportError("op.so: undefined symbol: io_submit"), "undefined symbol: io_submit"),
    ],
)  # fmt: skip
def test_a_build_that_fails_is_told_by_the_line_that_says_why(tmp_path, error, reason):
    with pytest.raises(StrategyError, match="D0954") as caught, telling_why("op", tmp_path):
        raise error
    assert reason in caught.value.problem
    assert caught.value.__cause__ is error


def test_an_import_of_deepspeed_that_fails_is_told():
    code = "from distrib.strategies.deepspeed_ops import load_deepspeed\nimport os\nload_deepspeed(os.environ, 'cpu')"
    env = {**os.environ, "DS_ACCELERATOR": "abacus"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert (
        "error[D0955] DeepSpeed cannot be imported: ValueError: DS_ACCELERATOR must be one of" in done.stderr
    )


def test_the_folder_of_compiled_operations_is_the_user_s(tmp_path):
    found = extensions_folder({"XDG_CACHE_HOME": str(tmp_path)})
    assert found.is_relative_to(tmp_path / "distrib" / "deepspeed")
    assert extensions_folder({"XDG_CACHE_HOME": str(tmp_path)}) == found


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "distrib.strategies.deepspeed", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])


def test_the_command_names_an_operation_that_does_not_exist():
    done = run("build-ops", "NoSuchBuilder")
    assert done.returncode == 1
    assert "error[D0873]" in done.stderr
    assert "NoSuchBuilder" in done.stderr


def test_the_command_says_how_it_is_used():
    done = run()
    assert (done.returncode, done.stderr.split()[0]) == (2, "usage:")
