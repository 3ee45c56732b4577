"""Loading: precedence, sources, and how every mistake is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distrib.config import RunConfig, load_config, overridden
from distrib.errors import ConfigError, NotBuiltError


@pytest.fixture
def load(tmp_path: Path) -> Any:
    """Load a text as `run.yaml` of an empty folder."""

    def from_text(text: str, name: str = "run.yaml", **more: Any) -> RunConfig:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return load_config(name, env=more.pop("env", {}), cwd=tmp_path, **more)

    return from_text


def message_of(load: Any, text: str, *arguments: Any, **more: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(text, *arguments, **more)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_without_any_setting_all_values_are_defaults(tmp_path: Path) -> None:
    config = load_config(env={}, cwd=tmp_path)
    assert (config.set_values(), config.file, config.source("seed").kind) == ({}, None, "default")


def test_a_flag_wins_over_a_variable_over_the_file(load: Any) -> None:
    text = "seed: 1\nproject_dir: a\ndata: {tail: pad}\n"
    env = {"DISTRIB_SEED": "2", "DISTRIB_PROJECT_DIR": "b"}
    config = load(text, env=env, flags={"seed": ("3", "--seed")})
    assert (config.seed, config.project_dir, config.data.tail) == (3, "b", "pad")


def test_each_value_knows_its_source(load: Any) -> None:
    config = load("\nseed: 1\n", env={"DISTRIB_DATA__TAIL": "pad"}, flags={"strategy": ("ddp", "--strategy")})
    found = [(config.source(key).kind, config.source(key).where) for key in ("seed", "data.tail", "strategy")]
    assert found == [("file", "run.yaml:2"), ("env", "DISTRIB_DATA__TAIL"), ("flag", "--strategy")]


def test_what_lost_is_remembered(load: Any) -> None:
    (lost,) = overridden(load("seed: 1", flags={"seed": (2, "--seed")}))
    assert str(lost) == "seed = 2 (--seed) overrides 1 (run.yaml:1)"


def test_a_bare_no_is_the_precision_no(load: Any) -> None:
    assert load("mixed_precision: no").mixed_precision == "no"


def test_all_problems_are_told_at_once(load: Any) -> None:
    told = message_of(load, "sed: 1\nseed: x\nmesh:\n  replicate: 0\n", env={"DISTRIB_LAUNCH__GRACE_S": "-1"})
    assert told.count("error[") == 4
    for place in (
        "run.yaml:1 (sed)",
        "run.yaml:2 (seed)",
        "run.yaml:4 (mesh.replicate)",
        "DISTRIB_LAUNCH__GRACE_S",
    ):
        assert place in told


def test_an_unbuilt_default_is_refused_when_it_is_set(load: Any) -> None:
    with pytest.raises(NotBuiltError, match=r"launch\.max_restarts"):
        load("launch: {max_restarts: 0}")
