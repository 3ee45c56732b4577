"""`docs/errors.md` has a row for every error code that the sources raise, and no other."""

from __future__ import annotations

import re
from pathlib import Path

from tests.arch.sources import source_files

PAGE = Path(__file__).parents[2] / "docs" / "errors.md"
CODE = re.compile(r"\bD0[0-9]{3}\b")
ROW = re.compile(r"^\| (D0[0-9]{3}) \| *\S", re.MULTILINE)


def raised() -> set[str]:
    return {code for file in source_files() for code in CODE.findall(file.read_text(encoding="utf-8"))}


def rows() -> list[str]:
    return ROW.findall(PAGE.read_text(encoding="utf-8"))


def test_every_code_of_the_sources_has_a_row():
    assert raised() - set(rows()) == set()


def test_every_row_has_a_code_in_the_sources():
    assert set(rows()) - raised() == set()


def test_each_code_has_one_row_and_the_rows_are_in_order():
    assert rows() == sorted(set(rows()))
