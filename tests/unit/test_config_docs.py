"""The page of keys says what the schema says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distrib.config import not_built
from distrib.config.documents import parse_scalar
from distrib.config.schema import canonical, default_of, expected, is_valid, keys

PAGE = Path(__file__).parents[2] / "docs" / "config.md"


def rows() -> dict[str, list[str]]:
    """Return key -> [expected, default, built, meaning] of the table of keys."""
    lines = PAGE.read_text(encoding="utf-8").split("## Keys")[1].splitlines()
    cells = [
        [cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines if line.startswith("| `")
    ]
    return {key.strip("`"): rest for key, *rest in cells}


def built_in_words(key: str) -> str:
    if not not_built.is_built(key):
        return "no"
    values = not_built.BUILT_VALUES.get(key)
    return "yes" if values is None else ", ".join(str(value).lower() for value in values)


def test_the_page_has_exactly_the_keys_of_the_schema() -> None:
    assert list(rows()) == list(keys())


@pytest.mark.parametrize("key", list(keys()))
def test_the_page_and_the_schema_agree_about_a_key(key: str) -> None:
    words, default, built, meaning = rows()[key]
    stated = canonical(key, parse_scalar(default.strip("`")))
    assert (words, stated, built) == (expected(key), default_of(key), built_in_words(key))
    assert meaning.endswith(".")


def test_the_default_of_a_built_key_is_built() -> None:
    values = {key: built for key, built in not_built.BUILT_VALUES.items() if not_built.is_built(key)}
    assert {key: default_of(key) for key in values if default_of(key) not in values[key]} == {}


def test_the_table_of_unbuilt_keys_names_only_keys_and_sections() -> None:
    sections = {key.partition(".")[0] for key in keys()}
    assert not_built.KEYS - set(keys()) - sections == set()


@pytest.mark.parametrize(
    ("key", "value"), [(k, v) for k, values in not_built.BUILT_VALUES.items() for v in values]
)
def test_a_built_value_is_valid(key: str, value: Any) -> None:
    assert is_valid(key, value)
