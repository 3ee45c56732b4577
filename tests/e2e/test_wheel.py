"""A wheel of the repository, installed where nothing else is, has the command and both packages."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import distrib

ROOT = Path(__file__).parents[2]
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv*", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis", "runs"
)
PLACES = """
import json, distrib, distrib_launcher
print(json.dumps([distrib.__file__, distrib_launcher.__file__, distrib.__version__]))
"""


def run(*words: object, cwd: Path) -> str:
    """Run a program in a clean environment, away from the repository; return what it printed."""
    hidden = ("PYTHON", "DISTRIB_", "VIRTUAL_ENV", "PIP_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    done = subprocess.run(
        [*map(str, words)], cwd=cwd, env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build from a copy, so that what lies around in the repository is neither used nor touched."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = shutil.copytree(ROOT, folder / "copy", ignore=LEFT_OUT)
    run(
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        folder / "out",
        copy,
        cwd=folder,
    )
    (built,) = (folder / "out").iterdir()
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel into an empty environment that sees the dependencies of this one; return its folder."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", folder / "bin" / "python")
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=folder.parent)
    where = "import importlib.util; print(importlib.util.find_spec('distrib').origin)"
    assert Path(run(folder / "bin" / "python", "-c", where, cwd=folder.parent).strip()).is_relative_to(folder)
    # A folder that a .pth file adds is searched last, and its own .pth files (our editable install) are not read.
    site = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
    (Path(site) / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return folder


def contents(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_the_wheel_holds_both_packages_and_nothing_else_at_top_level(wheel: Path):
    info = f"distrib-{distrib.__version__}.dist-info"
    assert {name.partition("/")[0] for name in contents(wheel)} == {"distrib", "distrib_launcher", info}


def test_the_wheel_holds_the_type_markers_and_the_licence(wheel: Path):
    info = f"distrib-{distrib.__version__}.dist-info"
    wanted = {"distrib/py.typed", "distrib_launcher/py.typed", f"{info}/licenses/LICENSE"}
    assert wanted <= set(contents(wheel))


def test_the_wheel_holds_every_module_of_the_repository(wheel: Path):
    sources = {
        file.relative_to(folder).as_posix()
        for folder, package in ((ROOT, "distrib"), (ROOT / "launcher", "distrib_launcher"))
        for file in (folder / package).rglob("*.py")
    }
    assert {name for name in contents(wheel) if name.endswith(".py")} == sources


def test_the_wheel_does_not_depend_on_python_or_platform(wheel: Path):
    assert wheel.name == f"distrib-{distrib.__version__}-py3-none-any.whl"


def test_both_packages_come_from_the_wheel(installed: Path, tmp_path: Path):
    found = json.loads(run(installed / "bin" / "python", "-c", PLACES, cwd=tmp_path))
    for file in found[:2]:
        assert Path(file).is_relative_to(installed)
    assert found[2] == distrib.__version__


def test_the_command_shows_its_help(installed: Path, tmp_path: Path):
    shown = run(installed / "bin" / "distrib", "--help", cwd=tmp_path)
    assert "launch Run a program on one or more processes." in " ".join(shown.split())


def test_the_command_plans_a_launch(installed: Path, tmp_path: Path):
    (tmp_path / "train.py").touch()
    shown = run(installed / "bin" / "distrib", "launch", "-n", "2", "--dry-run", "train.py", cwd=tmp_path)
    assert "command: python train.py" in shown
    assert "processes: 2" in shown


def test_the_wheel_declares_the_core_dependencies(installed: Path, tmp_path: Path):
    code = "from importlib.metadata import requires; print('\\n'.join(requires('distrib')))"
    lines = run(installed / "bin" / "python", "-c", code, cwd=tmp_path).splitlines()
    core = {line.partition(">")[0] for line in lines if "extra ==" not in line}
    assert core == {
        "torch", "numpy", "psutil", "safetensors", "xxhash", "pydantic", "PyYAML", "click", "rich", "cloudpickle",
    }  # fmt: skip
