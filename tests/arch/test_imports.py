"""What must start fast loads neither torch nor numpy."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.arch.interpreter import HEAVY, ROOT, asked

LIGHT = ("distrib.config", "distrib.topology", "distrib.registry", "distrib.errors", "distrib.logging")

LOADED_AFTER_EACH = """
import importlib, json, sys
found = {}
for name in %r:
    importlib.import_module(name)
    found[name] = [heavy for heavy in %r if heavy in sys.modules]
print(json.dumps(found))
"""

LOADED_BY_COMMAND = """
import json, runpy, sys
sys.argv = ["distrib", *%r]
try:
    runpy.run_module("distrib", run_name="__main__", alter_sys=True)
except SystemExit as ended:
    code = ended.code
print()
print(json.dumps([code, [heavy for heavy in %r if heavy in sys.modules]]))
"""


def modules_below(folder: Path, package: str) -> list[str]:
    found = []
    for file in sorted(folder.rglob("*.py")):
        parts = [package, *file.relative_to(folder).with_suffix("").parts]
        if parts[-1] != "__main__":  # which runs the command line
            found.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return found


def loaded_after_each(names: list[str], cwd: Path) -> dict[str, list[str]]:
    """Import `names` one after the other in one fresh interpreter; return name -> heavy modules loaded by then."""
    found: dict[str, list[str]] = asked(LOADED_AFTER_EACH % (names, HEAVY), cwd)
    return found


def test_importing_distrib_loads_neither_torch_nor_numpy(tmp_path: Path):
    assert loaded_after_each(["distrib"], tmp_path) == {"distrib": []}


@pytest.mark.parametrize("root", LIGHT)
def test_a_light_part_loads_neither_torch_nor_numpy(tmp_path: Path, root: str):
    folder = ROOT.joinpath(*root.split("."))
    names = modules_below(folder, root) if folder.is_dir() else [root]
    assert loaded_after_each(names, tmp_path) == {name: [] for name in names}


def test_no_module_of_the_launcher_loads_torch_or_numpy(tmp_path: Path):
    names = modules_below(ROOT / "launcher" / "distrib_launcher", "distrib_launcher")
    assert "distrib_launcher.commands.launch" in names
    assert loaded_after_each(names, tmp_path) == {name: [] for name in names}


def test_public_errors_and_the_configuration_load_neither_torch_nor_numpy(tmp_path: Path):
    code = (
        "import json, sys\nfrom distrib import ConfigError, RunConfig, get_logger\nRunConfig(seed=1)\n"
        f"print(json.dumps([heavy for heavy in {HEAVY} if heavy in sys.modules]))"
    )
    assert asked(code, tmp_path) == []


def test_the_question_itself_sees_torch_where_it_is_loaded(tmp_path: Path):
    assert loaded_after_each(["distrib.precision"], tmp_path) == {"distrib.precision": list(HEAVY)}


@pytest.mark.parametrize(
    "words",
    [["--help"], ["launch", "--help"], ["launch", "--dry-run", "train.py"], ["launch", "--explain"]],
    ids=" ".join,
)
def test_a_command_that_starts_nothing_loads_neither_torch_nor_numpy(tmp_path: Path, words: list[str]):
    (tmp_path / "train.py").touch()
    assert asked(LOADED_BY_COMMAND % (words, HEAVY), tmp_path) == [0, []]
