"""`make test-tpu` with a Python that only notes what it is asked: its environment is built once, whole, and by one."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = """\
#!/bin/sh
# Stands in for python3: makes environments of which `python` is itself, and fails to install while there is a file "broken".
case "$*" in
    -VV) echo "Python 3.11.7" ;;
    "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
    *"pip "*) echo install >> "$NOTES"; [ ! -e broken ] || exit 1; [ ! -p slow ] || cat slow ;;
    *"compileall "*) ;;
    *) echo "$* with PJRT_DEVICE=$PJRT_DEVICE PYTHONPATH=$PYTHONPATH" >> "$NOTES" ;;
esac
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    folder = tmp_path / "clone"
    folder.mkdir()
    for name in ("Makefile", "constraints-tpu.txt", "setup.cfg"):
        shutil.copy(ROOT / name, folder)
    (folder / "python").write_text(PYTHON)
    (folder / "python").chmod(0o755)
    return folder


def environment(clone: Path) -> dict[str, str]:
    own = {"XDG_CACHE_HOME": str(clone.parent / "cache"), "NOTES": str(clone.parent / "notes")}
    return {"PATH": os.environ["PATH"], **own}


WORDS = ("make", "--silent", "test-tpu", "PYTHON=./python")


def make(clone: Path) -> int:
    done = subprocess.run(WORDS, cwd=clone, env=environment(clone), capture_output=True, timeout=30)
    return done.returncode


def notes(clone: Path) -> list[str]:
    return (clone.parent / "notes").read_text().splitlines()


def environments(clone: Path) -> list[Path]:
    return [each for each in (clone.parent / "cache/distrib").iterdir() if each.is_dir()]


def test_the_environment_is_made_once_and_runs_the_clones_own_sources(clone: Path) -> None:
    assert (make(clone), make(clone)) == (0, 0)

    run = f"-m pytest tests/tpu with PJRT_DEVICE=CPU PYTHONPATH={clone}:{clone}/launcher"
    assert notes(clone) == ["install", run, run]


def test_what_a_failed_installation_leaves_is_made_anew(clone: Path) -> None:
    (clone / "broken").touch()
    assert make(clone) != 0
    (built,) = environments(clone)
    (built / "left over").touch()
    (clone / "broken").unlink()

    assert make(clone) == 0

    assert environments(clone) == [built]
    assert not (built / "left over").exists()
    assert notes(clone)[:2] == ["install", "install"]


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("constraints-tpu.txt", "torch==2.9.0", "torch==2.9.1"),
        ("setup.cfg", "    click>=8.1\n", "    click>=8.2\n"),
        ("python", "3.11.7", "3.12.1"),
    ],
)
def test_other_versions_have_another_environment(clone: Path, name: str, old: str, new: str) -> None:
    make(clone)
    text = (clone / name).read_text()
    assert old in text
    (clone / name).write_text(text.replace(old, new))

    make(clone)

    assert len(environments(clone)) == 2
    assert notes(clone).count("install") == 2


def test_other_parts_of_setup_cfg_change_nothing(clone: Path) -> None:
    make(clone)
    text = (clone / "setup.cfg").read_text()
    (clone / "setup.cfg").write_text(text.replace("version = ", "version = 9"))

    make(clone)

    assert notes(clone).count("install") == 1


def test_of_two_at_once_one_builds_and_the_other_waits(clone: Path) -> None:
    os.mkfifo(clone / "slow")
    both = [
        subprocess.Popen(WORDS, cwd=clone, env=environment(clone), stdout=subprocess.DEVNULL)
        for _ in range(2)
    ]
    with (clone / "slow").open("w"):  # opens once the one that installs reads from it
        (clone / "slow").unlink()
        (clone / "slow").touch()
        assert notes(clone) == ["install"]

    assert [each.wait(30) for each in both] == [0, 0]
    assert notes(clone).count("install") == 1
