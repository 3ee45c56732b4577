"""The process's environment is read at the edges only, and each edge says that it is one."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.arch.sources import below, dotted, place, tree_of

READERS = ("environ", "environb", "getenv", "getenvb", "putenv", "unsetenv")
# also run as programs, whose edge they are: build-ops; health and check
PROGRAMS = {"distrib/strategies/deepspeed.py", "distrib/strategies/xla.py"}
REASON = re.compile(r"# noqa: TID251 \(.{5,}\)")


def readings(tree: ast.Module) -> Iterator[int]:
    """Yield the line of everything that touches the process's environment."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and dotted(node) in {f"os.{name}" for name in READERS}:
            yield node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            yield from (node.lineno for alias in node.names if alias.name in READERS)


def read_in(file: Path) -> list[str]:
    lines = file.read_text(encoding="utf-8").splitlines()
    return [lines[number - 1] for number in readings(tree_of(file))]


def test_every_reading_of_the_environment_says_why_it_may():
    found = [(place(file), line) for file in below("distrib/") for line in read_in(file)]
    assert found
    assert [each for each in found if not REASON.search(each[1])] == []


def test_configuration_topology_and_strategies_are_given_the_environment():
    inner = below(
        "distrib/config/", "distrib/topology/", "distrib/strategies/", "distrib/devices/", "distrib/data/"
    )
    assert {place(file) for file in inner if read_in(file)} == PROGRAMS


@pytest.mark.parametrize(
    "text", ["import os\nos.environ['A']", "import os\nos.getenv('A')", "from os import environ"]
)
def test_the_scan_sees_every_way_to_the_environment(text: str):
    assert len(list(readings(ast.parse(text)))) == 1
