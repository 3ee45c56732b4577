"""The first argument of an Accelerator, and `cpu`: what they may be, and what they may not contradict."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from distrib import Accelerator, RunConfig
from distrib.config import load_config, to_wire
from distrib.errors import ConfigError
from distrib.startup import read_config


@pytest.fixture(autouse=True)
def plain_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DISTRIB_CONFIG", raising=False)


def read(given: object = None, env: Mapping[str, str] | None = None, **arguments: Any) -> RunConfig:
    return read_config(given, arguments, env or {}, "train.py:9")


def launched_on_the_cpu() -> dict[str, str]:
    return {"DISTRIB_CONFIG": to_wire(load_config(env={}, flags={"device": ("cpu", "--cpu")}))}


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("", "''"),
        ({}, "{}"),
        ({"seed": 1}, "{'seed': 1}"),
        (False, "false"),
        (5, "5"),
        (["run.yaml"], "['run.yaml']"),
        (b"run.yaml", "b'run.yaml'"),
        (RunConfig, "<class 'distrib.config.run_config.RunConfig'>"),
    ],
)
def test_what_is_neither_a_config_nor_a_path_is_refused_with_its_place(given: Any, shown: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Accelerator(given)

    assert caught.value.code == "D0106"
    assert caught.value.where is not None
    assert caught.value.where.startswith(f"{__file__}:")
    assert caught.value.problem.startswith(f"got {shown}; expected a RunConfig, or the path of")


def test_a_path_that_no_file_can_have_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"D0102.*null"):
        Accelerator("a\0b")


@pytest.mark.parametrize("as_path", [str, Path])
def test_a_file_may_be_named_as_text_or_path(tmp_path: Path, as_path: Any) -> None:
    (tmp_path / "run.yaml").write_text("seed: 3\n")

    assert read(as_path("run.yaml")).seed == 3


@pytest.mark.parametrize("cpu", ["no", 1, 0, "cpu"])
def test_cpu_is_a_boolean(cpu: Any) -> None:
    with pytest.raises(ConfigError, match=r"D0106.*\(cpu\): got .*; expected True, False or None"):
        Accelerator(cpu=cpu)


def test_cpu_means_the_device_cpu() -> None:
    config = read(cpu=True)

    assert (config.device, config.source("device").where) == ("cpu", "train.py:9")


def test_cpu_false_leaves_the_device_to_others() -> None:
    assert not read(cpu=False).is_set("device")
    assert read(cpu=False, env={"DISTRIB_DEVICE": "cuda"}).device == "cuda"
