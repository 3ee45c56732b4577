"""Loading: precedence, sources, and how every mistake is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distrib.config import RunConfig, load_config, overridden
from distrib.config.not_built import is_built
from distrib.config.schema import default_of, keys
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
    with pytest.raises(NotBuiltError, match=r"launch\.preempt_grace_s"):
        load("launch: {preempt_grace_s: 300}")


def test_the_file_of_the_variable_is_read(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("seed: 1", encoding="utf-8")
    config = load_config(env={"DISTRIB_CONFIG_FILE": "mine.yaml"}, cwd=tmp_path)
    assert (config.seed, config.file) == (1, Path("mine.yaml"))


def test_a_named_file_is_read_instead_of_that_of_the_variable(load: Any) -> None:
    assert load("seed: 1", env={"DISTRIB_CONFIG_FILE": "absent.yaml"}).seed == 1


def test_the_folders_own_file_is_read_only_if_asked_for(tmp_path: Path) -> None:
    (tmp_path / "distrib.yaml").write_text("seed: 1", encoding="utf-8")
    read = load_config(env={}, cwd=tmp_path)
    not_read = load_config(env={}, cwd=tmp_path, read_cwd=False)
    assert (read.seed, read.source("seed").where, not_read.seed) == (1, "distrib.yaml:1", None)


def test_a_missing_file_is_named_with_the_variable_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"D0102\] absent\.yaml: .*No such file.*DISTRIB_CONFIG_FILE"):
        load_config(env={"DISTRIB_CONFIG_FILE": "absent.yaml"}, cwd=tmp_path)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Is a directory"):
        load_config(tmp_path, env={})


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"seed: \xff")
    with pytest.raises(ConfigError, match=r"D0102.*UTF-8"):
        load_config("run.yaml", env={}, cwd=tmp_path)


@pytest.mark.parametrize("text", ["", "# nothing\n", "null", "mesh:\ndata: {}\n"])
def test_a_file_that_says_nothing_sets_nothing(load: Any, text: str) -> None:
    assert load(text).set_values() == {}


def test_a_file_that_starts_with_a_byte_order_mark_is_read(load: Any) -> None:
    assert load("\ufeffseed: 1").seed == 1


@pytest.mark.parametrize("text", ["- seed", "seed"])
def test_a_file_without_keys_is_refused(load: Any, text: str) -> None:
    assert "expected keys with values" in message_of(load, text)


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ("seed: 1\n\tdata: 2\n", "run.yaml:2", "spaces"),
        ("seed: 1\ndata: [\n", "run.yaml:3", "not YAML"),
        ("seed: 1\n---\nseed: 2\n", "run.yaml:2", "not YAML"),
        ("seed: &a 1\nglobal_batch_size: *a\n", "run.yaml:2", "aliases"),
        ("seed: 1\nproject_dir: !!python/object/apply:os.getcwd []\n", "run.yaml:2", "tag"),
        ("seed: !!int x\n", "run.yaml:1", "tag"),
        ("? [a]\n: 1\n", "run.yaml:1", "a key must be a name"),
        ("seed: \x00", "run.yaml", "not YAML"),
        ("[" * 600, "run.yaml", "too deeply"),
    ],
)
def test_what_cannot_be_understood_is_named_with_its_line(
    load: Any, text: str, place: str, words: str
) -> None:
    told = message_of(load, text)
    assert told.startswith(f"error[D0103] {place}:")
    assert words in told


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('{\n"seed": 1,\n}', "run.json:3"),
        ("seed: 1", "run.json:1"),
        ('{"seed": NaN}', "run.json"),
        ("[" * 99999, "run.json"),
    ],
)
def test_a_json_file_must_be_json(load: Any, text: str, place: str) -> None:
    assert message_of(load, text, "run.json").startswith(f"error[D0103] {place}: not JSON")


def test_a_json_file_has_lines_too(load: Any) -> None:
    config = load('{\n\t"data": {\n\t\t"tail": "pad"\n\t}\n}', "run.json")
    assert config.source("data.tail").where == "run.json:3"


@pytest.mark.parametrize("name", ["run.yaml", "run.json"])
def test_a_key_that_stands_twice_is_refused_with_both_lines(load: Any, name: str) -> None:
    told = message_of(load, '{"seed": 1,\n"data": {"tail": "pad"},\n"seed": 1}', name)
    assert told.startswith(f"error[D0104] {name}:3: key 'seed' stands here again; it was given at line 1")


def test_a_key_in_two_spellings_is_refused(load: Any) -> None:
    told = message_of(load, "mesh: {replicate: 2}\nmesh.replicate: 2\n")
    assert told.startswith("error[D0104] run.yaml:2 (mesh.replicate)")
    assert "run.yaml:1 sets it too" in told


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("sed: 1", "did you mean 'seed'?"),
        ("launch: {nproc_per_nod: 2}", "did you mean 'launch.nproc_per_node'?"),
        ("nproc_per_node: 2", "did you mean 'launch.nproc_per_node'?"),
        ("lanch: {nnodes: 1}", "did you mean 'launch'?"),
        ("qqqq: 1", "unknown key 'qqqq'\n"),
        ("1: 1", "unknown key '1'"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_one(load: Any, text: str, near: str) -> None:
    told = message_of(load, text)
    assert told.startswith("error[D0105] run.yaml:1")
    assert near in told


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("num_processes: 2", "ours is launch.nproc_per_node"),
        ("fsdp_config: {fsdp_offload_params: true}", "ours is a section `fsdp:`"),
        ("compute_environment: LOCAL_MACHINE", "leave it out"),
    ],
)
def test_a_key_of_accelerates_file_is_refused_with_what_says_it_here(load: Any, text: str, said: str) -> None:
    told = message_of(load, text)
    assert told.startswith("error[D0105] run.yaml:1")
    assert f"key of Accelerate's file; {said}" in told


@pytest.mark.parametrize(
    ("variable", "near"), [("DISTRIB_SED", "DISTRIB_SEED"), ("DISTRIB_NNODES", "DISTRIB_LAUNCH__NNODES")]
)
def test_an_unknown_variable_is_refused_with_the_nearest_one(load: Any, variable: str, near: str) -> None:
    told = message_of(load, "", env={variable: "1"})
    assert told.startswith(f"error[D0105] {variable}")
    assert f"did you mean {near!r}?" in told


def test_an_unknown_key_of_a_flag_is_refused(load: Any) -> None:
    assert message_of(load, "", flags={"sed": ("1", "--set sed")}).startswith(
        "error[D0105] --set sed (sed): "
    )


@pytest.mark.parametrize("word", ["yes", "no", "on", "off"])
def test_yes_and_on_are_no_booleans_and_the_fix_says_what_is(load: Any, word: str) -> None:
    told = message_of(load, f"ddp:\n  find_unused_parameters: {word}\n")
    meant = "true" if word in ("yes", "on") else "false"
    assert told.startswith(
        f"error[D0106] run.yaml:2 (ddp.find_unused_parameters): got {word!r}; expected true"
    )
    assert f"fix: write {meant}" in told


def test_a_boolean_precision_is_told_to_write_no(load: Any) -> None:
    assert "fix: write no" in message_of(load, "mixed_precision: false")


def test_a_misspelt_value_is_told_the_nearest_one(load: Any) -> None:
    assert "got 'exakt'; expected exact, pad or drop; did you mean 'exact'?" in message_of(
        load, "data: {tail: exakt}"
    )


@pytest.mark.parametrize(
    "text",
    [
        "seed: -1", "seed: 9223372036854775808", "seed: 1.0", "seed: true", "seed: '1'", "seed: [1]", "seed: {a: 1}",
        "global_batch_size: 0", "gradient_accumulation_steps: 0", "strategy: dp", "strategy: 1", "device: cuda:0",
        "mixed_precision: fp31", "project_dir: ''", "project_dir: 3", "mesh.replicate: 0", "mesh.replicate: -2",
        "mesh: 3", "mesh: [2]", "checkpoint.keep_last: 0", "watch.stall_timeout_s: 0", "watch.stall_timeout_s: .inf", "watch.stall_timeout_s: 2e9",
        "watch.stall_timeout_s: .nan", "watch.stall_timeout_s: 1e999", f"watch.stall_timeout_s: 1{'0' * 400}",
        f"seed: {'1' * 5000}", "launch.master_port: 65536", "launch.nnodes: 0", "launch.nnodes: '4'", "launch.nnodes: 2-4",
        "launch.nproc_per_node: 0", "launch.nproc_per_node: two", "launch.grace_s: -1", "launch.rdzv_timeout_s: 1_0",
    ],
)  # fmt: skip
def test_a_value_of_a_wrong_type_or_out_of_bounds_is_refused(load: Any, text: str) -> None:
    told = message_of(load, text)
    assert told.startswith("error[D0106] run.yaml:1 (")
    assert "expected" in told
    assert "fix:" in told


def test_numbers_are_read_by_the_rules_of_yaml_1_2(load: Any) -> None:
    config = load("seed: 012\nwatch: {stall_timeout_s: 1e3}\nlaunch: {master_port: 0x50}\n")
    assert (config.seed, config.watch.stall_timeout_s, config.launch.master_port) == (12, 1000.0, 80)


def test_a_text_from_a_variable_stays_text_where_only_text_is_possible(load: Any) -> None:
    config = load("", env={"DISTRIB_PROJECT_DIR": "3", "DISTRIB_CHECKPOINT__DIR": "a: b"})
    assert (config.project_dir, config.checkpoint.dir) == ("3", "a: b")


def test_a_variable_may_hold_a_section(load: Any) -> None:
    config = load("", env={"DISTRIB_MESH": "{replicate: 2}"})
    assert (config.mesh.replicate, config.source("mesh.replicate").where) == (2, "DISTRIB_MESH")


def test_an_empty_variable_and_a_flag_that_was_not_given_set_nothing(load: Any) -> None:
    assert load("", env={"DISTRIB_SEED": ""}, flags={"seed": (None, "--seed")}).set_values() == {}


def test_other_variables_and_the_workers_own_are_left_alone(load: Any) -> None:
    assert load("", env={"SEED": "1", "DISTRIB_CONFIG": "{}", "_DISTRIB_RUN": "x"}).set_values() == {}


def test_a_flag_takes_a_value_or_its_text(load: Any) -> None:
    assert load("", flags={"seed": (3, "--seed")}) == load("", flags={"seed": ("3", "--seed")})


def test_a_global_batch_size_and_accumulation_contradict_each_other(load: Any) -> None:
    told = message_of(load, "global_batch_size: 8", flags={"gradient_accumulation_steps": ("2", "--steps")})
    assert told.startswith("error[D0107] run.yaml:1 (global_batch_size): ")
    assert "gradient_accumulation_steps is 2 at --steps" in told


def test_a_batch_size_set_to_null_leaves_accumulation_free(load: Any) -> None:
    flags = {
        "gradient_accumulation_steps": (2, "-g"),
        "global_batch_size": ("null", "--set global_batch_size"),
    }
    assert load("global_batch_size: 8", flags=flags).gradient_accumulation_steps == 2


def test_options_of_another_strategy_are_refused(load: Any) -> None:
    told = message_of(load, "strategy: single\nddp: {find_unused_parameters: true}\n")
    assert told.startswith("error[D0107] run.yaml:2 (ddp.find_unused_parameters): ")
    assert "strategy is single at run.yaml:1" in told


def test_a_flag_may_leave_the_options_of_the_files_strategy_idle(load: Any) -> None:
    text = "strategy: ddp\nddp: {find_unused_parameters: true}\n"
    assert load(text, flags={"strategy": ("single", "--strategy")}).strategy == "single"


@pytest.mark.parametrize(
    ("text", "available"),
    [
        ("launch: {backend: slurm}", "local, tpu"),
        ("launch: {nnodes: 2}", "1"),
        ("launch: {nnodes: 1:4}", "1"),
    ],
)
def test_an_unbuilt_value_is_refused_with_those_that_are_built(load: Any, text: str, available: str) -> None:
    with pytest.raises(NotBuiltError, match=f"does not have that yet; it has {available}\n") as caught:
        load(text)
    assert caught.value.code == "D0901"


@pytest.mark.parametrize("key", sorted(key for key in keys() if not is_built(key)))
def test_an_unbuilt_key_is_refused_even_with_its_default(load: Any, key: str) -> None:
    default = default_of(key)
    with pytest.raises(NotBuiltError, match=f"this version does not have {key} yet"):
        load(f"{key}: {json.dumps(default)}")


def test_several_unbuilt_settings_are_one_error_of_that_kind(load: Any) -> None:
    with pytest.raises(NotBuiltError, match=r"(?s)watch\.nonfinite.*tracking\.log_with"):
        load("tracking: {log_with: wandb}\nwatch: {nonfinite: raise}\n")


def test_an_unbuilt_value_that_a_flag_replaces_does_no_harm(load: Any) -> None:
    assert load("mixed_precision: fp16", flags={"mixed_precision": ("no", "-p")}).mixed_precision == "no"


@pytest.mark.parametrize(
    "number",
    ["0x" + "f" * 6000, "0o" + "7" * 6000, "9" * 5000, "-" + "9" * 5000],
    ids=["hex", "octal", "decimal", "negative"],
)
@pytest.mark.parametrize("key", ["seed", "global_batch_size"])
def test_a_number_of_thousands_of_digits_is_a_wrong_value(load: Any, key: str, number: str) -> None:
    told = message_of(load, f"{key}: {number}")

    assert told.startswith(f"error[D0106] run.yaml:1 ({key}): got '{number[:20]}")


def test_a_number_that_is_too_long_is_not_made_one_by_a_tag(load: Any) -> None:
    assert message_of(load, f"seed: !!int 0x{'f' * 6000}").startswith("error[D0103] run.yaml:1: ")


@pytest.mark.parametrize("number", ["0x" + "f" * 999, "9" * 999], ids=["hex", "decimal"])
def test_the_longest_number_that_is_read_can_be_refused(load: Any, number: str) -> None:
    assert "error[D0106] run.yaml:1 (seed)" in message_of(load, f"seed: {number}")


@pytest.mark.parametrize("file", ["", "a\0b.yaml", "\ud800.yaml"], ids=["empty", "NUL", "surrogate"])
def test_a_name_that_no_file_can_have_is_refused(tmp_path: Path, file: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(file, env={}, cwd=tmp_path)

    assert str(caught.value).startswith("error[D0102] ")
    assert str(caught.value).replace("\n", "").isprintable()
