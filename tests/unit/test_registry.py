"""Registries: lazy, extended by entry points, and helpful about unknown names."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from distrib.devices import DEVICES
from distrib.errors import ConfigError
from distrib.registry import Registry
from distrib.strategies import STRATEGIES, Strategy
from distrib.topology.environments import ENVIRONMENTS

GROUP = "distrib.tests.colors"


def colors(**more: str) -> Registry[object]:
    return Registry("color", GROUP, {"red": "colors_red:RED", "green": "colors_green:GREEN", **more})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of modules that can be imported; what a test imports from it is forgotten afterwards."""
    (tmp_path / "colors_red.py").write_text("RED = 'r'\n")
    (tmp_path / "colors_green.py").write_text("class GREEN:\n    SHADE = 'g'\n")
    (tmp_path / "colors_blue.py").write_text("BLUE = 'b'\nRED = 'another red'\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("colors_red", "colors_green", "colors_blue"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


@pytest.fixture
def distribution(folder: Path) -> Path:
    """Another distribution, installed into that folder, that adds a color and tries to take over one of ours."""
    info = folder / "colorful-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: colorful\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\nblue = colors_blue:BLUE\nred = colors_blue:RED\n")
    importlib.invalidate_caches()
    return folder


def test_a_name_stands_for_the_attribute_of_its_module(folder: Path):
    assert colors().get("red") == "r"


def test_looking_a_name_up_imports_its_module_and_no_other(folder: Path):
    registry = colors()
    assert list(registry) == ["red", "green"]
    assert "red" in registry
    assert "colors_red" not in sys.modules
    registry.get("red")
    assert "colors_red" in sys.modules
    assert "colors_green" not in sys.modules


def test_names_come_in_the_order_of_the_table(folder: Path):
    assert colors(amber="colors_red:RED").names() == ("red", "green", "amber")


def test_the_table_is_the_registrys_own():
    table = {"red": "colors_red:RED"}
    registry: Registry[object] = Registry("color", GROUP, table)
    table["black"] = "colors_black:BLACK"
    assert registry.names() == ("red",)


def test_an_unknown_name_is_an_error_with_all_names_and_the_nearest():
    with pytest.raises(ConfigError) as refused:
        colors().get("gren")
    assert refused.value.code == "D0101"
    assert str(refused.value) == (
        "error[D0101] unknown color 'gren'; known: red, green; did you mean 'green'?\n"
        "  fix: use one of them, or install a package that adds 'gren' to the entry points 'distrib.tests.colors'"
    )


def test_no_name_is_proposed_when_none_is_near():
    with pytest.raises(ConfigError) as refused:
        colors().get("ultraviolet")
    assert "did you mean" not in str(refused.value)


@pytest.mark.parametrize("name", ["blue", 1, None, "RED"])
def test_other_names_are_not_in_the_registry(name: object):
    assert name not in colors()


def test_an_entry_point_adds_a_name_after_our_own(distribution: Path):
    assert colors().names() == ("red", "green", "blue")
    assert "blue" in colors()
    assert "colors_blue" not in sys.modules
    assert colors().get("blue") == "b"


def test_an_entry_point_does_not_take_over_a_name_of_ours(distribution: Path):
    assert colors().get("red") == "r"


def test_the_nearest_name_may_be_an_entry_points(distribution: Path):
    with pytest.raises(ConfigError, match="did you mean 'blue'"):
        colors().get("bleu")


def test_a_module_that_fails_to_import_raises_its_own_error(folder: Path):
    (folder / "colors_broken.py").write_text("raise OSError('out of paint')\n")
    with pytest.raises(OSError, match="out of paint"):
        colors(broken="colors_broken:X").get("broken")


@pytest.mark.parametrize("registry", [STRATEGIES, DEVICES, ENVIRONMENTS], ids=lambda registry: registry.kind)
def test_every_name_of_a_registry_can_be_resolved(registry: Registry[type]):
    for name in registry.builtin:
        assert isinstance(registry.get(name), type)


def test_every_strategy_fills_the_whole_seam():
    for name in STRATEGIES:
        cls = STRATEGIES.get(name)
        assert issubclass(cls, Strategy)
        assert cls.__abstractmethods__ == frozenset()
        assert set(cls.capabilities.devices) <= set(DEVICES)
