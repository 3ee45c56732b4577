"""What is written is read back: to a file, over the wire, between processes."""

from __future__ import annotations

import copy
import json
import pickle
import string
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings as examples, strategies as st

from distrib.config import RunConfig, dump_config, from_wire, load_config, overridden, to_wire
from distrib.config.documents import dump, parse, plain
from distrib.config.schema import nested
from distrib.errors import ConfigError

WORDS = st.text(min_size=1).filter(lambda text: text.encode("utf-8", "ignore").decode() == text)
SECONDS = st.floats(min_value=0.001, max_value=1e9) | st.integers(1, 10**9)
COUNT = st.integers(1, 2**70)

SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "strategy": st.sampled_from(["auto", "ddp"]),
        "device": st.sampled_from(["auto", "cpu", "cuda", "mps", "xpu"]),
        "mixed_precision": st.sampled_from(["no", "bf16"]),
        "seed": st.none() | st.integers(0, 2**63 - 1),
        "global_batch_size": COUNT,
        "project_dir": WORDS,
        "mesh.replicate": COUNT | st.just(-1),
        "ddp.find_unused_parameters": st.booleans(),
        "data.tail": st.sampled_from(["exact", "pad", "drop"]),
        "checkpoint.dir": WORDS,
        "checkpoint.keep_last": st.none() | COUNT,
        "watch.stall_timeout_s": SECONDS,
        "launch.nproc_per_node": COUNT | st.just("auto"),
        "launch.master_port": st.integers(0, 65535),
        "launch.grace_s": SECONDS,
    },
)


def load_text(text: str, name: str = "run.yaml", **more: Any) -> RunConfig:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).write_text(text, encoding="utf-8", newline="")
        return load_config(name, env=more.pop("env", {}), cwd=Path(folder), **more)


@examples(max_examples=50, deadline=None)
@given(SETTINGS)
def test_load_after_dump_is_the_identity(settings: dict[str, Any]) -> None:
    first = load_text(json.dumps(nested(settings), ensure_ascii=False), "run.json")
    again = load_text(dump_config(first))
    assert again == first
    assert again.set_values() == first.set_values() == settings


@examples(max_examples=50, deadline=None)
@given(SETTINGS)
def test_json_with_escapes_and_yaml_give_the_same_values(settings: dict[str, Any]) -> None:
    as_json = load_text(json.dumps(nested(settings), indent="\t"), "run.json")
    assert as_json == load_text(dump(nested(settings)))


@examples(max_examples=50, deadline=None)
@given(SETTINGS, SETTINGS)
def test_the_wire_keeps_values_sources_and_what_lost(in_file: dict[str, Any], flags: dict[str, Any]) -> None:
    by_flag = {key: (value, f"--{key}") for key, value in flags.items() if not isinstance(value, str)}
    config = load_text(dump(nested(in_file)), flags=by_flag)
    received = from_wire(to_wire(config))
    assert received == config
    assert (received.file, received.set_values()) == (config.file, config.set_values())
    assert overridden(received) == overridden(config)
    assert all(received.source(key) == config.source(key) for key in config.set_values())


def test_the_wire_keeps_a_mapping_of_number_formats() -> None:
    config = load_text("mixed_precision: {compute: bf16, reduce: fp32}")
    received = from_wire(to_wire(config))
    assert received == config
    assert received.mixed_precision == config.mixed_precision


@examples(max_examples=50, deadline=None)
@given(
    st.dictionaries(st.text(string.ascii_letters, min_size=1), WORDS | st.text(string.digits + "-+.eox_:~"))
)
def test_every_text_survives_a_file(tree: dict[str, str]) -> None:
    read = parse(dump(tree), Path("x.yaml")).entries
    assert {name: plain(located) for name, located in read.items()} == tree


@pytest.mark.parametrize(
    "text",
    [
        *("", "{}", "[]", "null", '{"format":1}', '{"format":2,"file":null,"settings":[]}'),
        pytest.param("[" * 100_000, id="nested too deeply"),
        '{"format":1,"file":null,"settings":[[5,1,"flag","--seed"]]}',
        '{"format":1,"file":null,"settings":[["seed",1,"flag",5]]}',
        '{"format":1,"file":5,"settings":[]}',
    ],
)
def test_a_damaged_wire_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"D0109.*DISTRIB_CONFIG"):
        from_wire(text)


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))]
)
def test_a_copy_is_equal_and_keeps_its_sources(copied: Any) -> None:
    config = load_text("seed: 1")
    assert copied(config) == config
    assert copied(config).source("seed") == config.source("seed")


def test_an_error_survives_pickling() -> None:
    with pytest.raises(ConfigError) as caught:
        load_text("a: 1\nb: 2\n")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_importing_the_configuration_loads_neither_torch_nor_numpy() -> None:
    program = "import sys, distrib.config; print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    shown = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert shown.stdout.strip() == "[]"
