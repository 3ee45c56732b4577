"""What `setup.cfg` packages is what lies on the disk."""

from __future__ import annotations

import configparser
from pathlib import Path

import distrib

ROOT = Path(__file__).parents[2]
TOPS = {"distrib": ROOT / "distrib", "distrib_launcher": ROOT / "launcher" / "distrib_launcher"}


def settings() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def listed(section: str, key: str) -> list[str]:
    return [line for line in settings()[section][key].splitlines() if line]


def files(top: str) -> list[Path]:
    return [x for x in TOPS[top].rglob("*") if x.is_file() and "__pycache__" not in x.parts]


def package_of(top: str, file: Path) -> str:
    return ".".join([top, *file.parent.relative_to(TOPS[top]).parts])


def on_disk() -> set[str]:
    return {package_of(top, file) for top in TOPS for file in files(top) if file.suffix == ".py"}


def test_the_package_list_is_what_lies_on_the_disk():
    packages = listed("options", "packages")
    assert packages == sorted(on_disk())


def test_every_folder_of_modules_is_a_package():
    with_init = {package_of(top, x) for top in TOPS for x in files(top) if x.name == "__init__.py"}
    assert with_init == on_disk()


def test_every_other_file_is_package_data_of_its_top_package():
    others = {(top, str(x.relative_to(TOPS[top]))) for top in TOPS for x in files(top) if x.suffix != ".py"}
    named = {
        (top, name) for top, names in settings()["options.package_data"].items() for name in names.split(",")
    }
    assert others == named


def test_both_packages_are_marked_as_typed():
    for top, folder in TOPS.items():
        assert settings()["options.package_data"][top] == "py.typed"
        assert (folder / "py.typed").is_file()


def test_the_folders_of_the_top_packages_are_where_setup_cfg_says():
    pairs = dict(line.split(" = ") for line in listed("options", "package_dir"))
    assert {top: ROOT / folder for top, folder in pairs.items()} == TOPS


def test_the_version_stands_in_one_way_in_both_places():
    assert distrib.__version__ == settings()["metadata"]["version"]
