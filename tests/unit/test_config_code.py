"""Values in code: a config built there, and a script against its launch."""

from __future__ import annotations

from pathlib import Path

import pytest

from distrib.config import RunConfig, load_config, with_code
from distrib.errors import ConfigError, NotBuiltError


class Integer:
    """Stands for a numpy integer."""

    def __index__(self) -> int:
        return 7


def launched(**flags: object) -> RunConfig:
    return load_config(
        env={}, read_cwd=False, flags={key: (value, f"--{key}") for key, value in flags.items()}
    )


def test_code_sets_what_the_launch_left_open() -> None:
    config = with_code(launched(seed=1), {"global_batch_size": 8}, "train.py:9")
    assert (config.seed, config.global_batch_size) == (1, 8)
    assert config.source("global_batch_size").where == "train.py:9"


def test_code_that_contradicts_the_launch_is_refused_with_both_places() -> None:
    with pytest.raises(ConfigError) as caught:
        with_code(launched(seed=1), {"seed": 2}, "train.py:9")
    assert str(caught.value).startswith(
        "error[D0108] train.py:9 (seed): the script sets 2, but --seed says 1"
    )


def test_code_that_repeats_the_launch_is_fine_and_the_launch_stays_the_source() -> None:
    config = with_code(launched(seed=1), {"seed": 1}, "train.py:9")
    assert config.source("seed").where == "--seed"


def test_what_code_adds_must_go_with_what_the_launch_set() -> None:
    with pytest.raises(ConfigError, match=r"D0107.*train\.py:9.*expected one of the two") as caught:
        with_code(launched(global_batch_size=8), {"gradient_accumulation_steps": 2}, "train.py:9")
    assert "--global_batch_size (global_batch_size)" in str(caught.value)


def test_all_problems_of_a_script_are_told_at_once() -> None:
    values = {"seed": 2, "sed": 1, "data": {"tail": "exakt"}, "watch.nonfinite": "raise"}
    with pytest.raises(ConfigError) as caught:
        with_code(launched(seed=1), values, "train.py:9")
    told = str(caught.value)
    assert [
        code for code in ("D0108", "D0105", "D0106", "D0901") if f"error[{code}] train.py:9 (" not in told
    ] == []


def test_two_values_in_code_contradict_each_other_too() -> None:
    with pytest.raises(ConfigError, match=r"D0108\] train\.py:9 \(seed\)"):
        with_code(RunConfig(seed=1), {"seed": 2}, "train.py:9")


def test_a_config_in_code_names_its_line() -> None:
    source = RunConfig(data={"tail": "pad"}).source("data.tail")
    assert source.kind == "code"
    assert source.where.startswith(f"{__file__}:")


def test_a_config_in_code_tells_all_its_problems() -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig(seed="x", sed=1)
    assert str(caught.value).count("error[") == 2


def test_a_config_in_code_refuses_what_is_not_built() -> None:
    with pytest.raises(NotBuiltError, match="on_signal"):
        RunConfig(checkpoint={"on_signal": False})


def test_paths_and_integers_of_other_types_are_taken() -> None:
    config = RunConfig(project_dir=Path("runs"), seed=Integer())
    assert config.set_values() == {"seed": 7, "project_dir": "runs"}


def test_configs_with_equal_values_are_equal_wherever_they_came_from() -> None:
    assert RunConfig(seed=1) == launched(seed=1)
    assert hash(RunConfig(seed=1)) == hash(launched(seed=1))
    assert RunConfig(seed=1) != RunConfig(seed=2)


@pytest.mark.parametrize(("part", "name"), [(RunConfig(), "seed"), (RunConfig().mesh, "replicate")])
def test_a_config_cannot_be_changed(part: object, name: str) -> None:
    with pytest.raises(ValueError, match="frozen"):
        setattr(part, name, 3)


def test_a_section_is_set_when_one_of_its_keys_is() -> None:
    config = RunConfig(mesh={"replicate": 2})
    assert (config.is_set("mesh"), config.is_set("mesh.replicate"), config.is_set("data")) == (
        True,
        True,
        False,
    )


def test_a_default_that_is_set_explicitly_counts_as_set() -> None:
    assert RunConfig(seed=None).is_set("seed")


def test_asking_for_the_source_of_an_unknown_key_is_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'seed'"):
        RunConfig().source("sede")


@pytest.mark.parametrize("value", [10**5000, [10**5000]], ids=["alone", "in a list"])
def test_an_integer_that_python_does_not_write_out_is_a_wrong_value(value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig(seed=value)
    assert caught.value.code == "D0106"
    assert "with more digits than can be shown" in str(caught.value)


def test_a_count_that_no_file_could_hold_is_refused() -> None:
    assert RunConfig(global_batch_size=10**999 - 1).global_batch_size == 10**999 - 1
    with pytest.raises(ConfigError, match=r"D0106.*at least 1, or null, with fewer than 1000 digits"):
        RunConfig(global_batch_size=10**999)


def test_a_wrong_value_of_several_lines_is_told_in_one() -> None:
    class Lines:
        def __repr__(self) -> str:
            return "Lines(\n  1\n)"

    with pytest.raises(ConfigError, match=r"got Lines\( 1 \); expected"):
        RunConfig(seed=Lines())
