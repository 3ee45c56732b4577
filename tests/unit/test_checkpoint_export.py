import json

import pytest
import safetensors
import torch
from safetensors.torch import load_file

from distrib.checkpoint import export_model
from distrib.checkpoint.storage import Storage
from distrib.errors import CheckpointError
from distrib.state import ShardedState
from tests.unit.checkpointing import ALONE, interval, on_ranks, rows, sharded, state_of

MODEL = {
    "model/a.weight": torch.randn(6, 5),
    "model/a.bias": torch.randn(6).bfloat16(),
    "model/n": torch.arange(9),
}
PLAIN = {name.removeprefix("model/"): x for name, x in MODEL.items()}


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def everything(directory):
    return {name: x for path in directory.glob("*.safetensors") for name, x in load_file(path).items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert all(
        x.dtype is expected[name].dtype and torch.equal(x, expected[name]) for name, x in found.items()
    )


def test_a_small_model_is_one_file_that_says_pt(tmp_path):
    export_model(tmp_path / "hf", state_of(MODEL | {"optimizer/exp_avg.a": torch.ones(3)}), ALONE)
    assert names(tmp_path / "hf") == ["model.safetensors"]
    assert_same(everything(tmp_path / "hf"), PLAIN)
    with safetensors.safe_open(tmp_path / "hf/model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_large_model_is_cut_into_files_with_an_index(tmp_path):
    export_model(tmp_path, state_of(MODEL), ALONE, max_shard_size=132)
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert names(tmp_path) == [*shards, "model.safetensors.index.json"]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 6 * 5 * 4 + 6 * 2 + 9 * 8
    assert index["weight_map"] == {"a.weight": shards[0], "a.bias": shards[0], "n": shards[1]}
    assert_same(everything(tmp_path), PLAIN)


def test_tied_tensors_are_stored_once(tmp_path):
    export_model(tmp_path, state_of(MODEL, aliases={"model/head": "model/a.weight"}), ALONE)
    assert_same(everything(tmp_path), PLAIN)


@pytest.mark.parametrize("layout", [rows, interval])
def test_a_sharded_model_is_gathered(tmp_path, layout):
    on_ranks(3, lambda c: export_model(tmp_path, sharded(MODEL, c.rank, 3, layout), c, max_shard_size=100))
    assert_same(everything(tmp_path), PLAIN)


def test_a_replicated_model_is_written_without_communication(tmp_path):
    def run(c):
        c.gather = None
        return export_model(tmp_path, state_of(MODEL), c)

    assert on_ranks(2, run) == [tmp_path] * 2
    assert_same(everything(tmp_path), PLAIN)


def test_only_floating_point_tensors_are_converted(tmp_path):
    export_model(tmp_path, state_of(MODEL), ALONE, dtype=torch.float16)
    assert_same(everything(tmp_path), {n: x.half() if x.is_floating_point() else x for n, x in PLAIN.items()})


def test_patterns_choose_what_is_exported(tmp_path):
    export_model(tmp_path, state_of(MODEL), ALONE, include=["a.*"])
    assert everything(tmp_path).keys() == {"a.weight", "a.bias"}


def test_a_new_export_removes_the_files_of_the_old_one_and_no_others(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model_card.safetensors").write_text("mine")
    export_model(tmp_path, state_of(MODEL), ALONE, max_shard_size=1)
    export_model(tmp_path, state_of(MODEL), ALONE)
    assert names(tmp_path) == ["config.json", "model.safetensors", "model_card.safetensors"]


@pytest.mark.parametrize("size", ["5", "-1GB", "five GB", 0, ""])
def test_a_size_that_is_none_is_refused(tmp_path, size):
    with pytest.raises(CheckpointError, match="max_shard_size is"):
        export_model(tmp_path, state_of(MODEL), ALONE, max_shard_size=size)


@pytest.mark.parametrize(("size", "files"), [("0.2KB", 2), ("1KiB", 1), ("72b", 3)])
def test_sizes_are_written_as_hugging_face_does(tmp_path, size, files):
    export_model(tmp_path, state_of(MODEL), ALONE, max_shard_size=size)
    assert len(list(tmp_path.glob("*.safetensors"))) == files


def test_nothing_to_export_is_an_error(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        export_model(tmp_path, ShardedState({}), ALONE)
    assert caught.value.code == "D0719"


def test_a_disk_error_on_rank_0_is_raised_everywhere_and_leaves_the_old_export(tmp_path):
    class Broken(Storage):
        def write(self, file, data):
            raise OSError(28, "No space left on device")

    export_model(tmp_path, state_of(MODEL), ALONE)
    other = {name: torch.zeros_like(x) for name, x in MODEL.items()}
    errors = on_ranks(
        2, lambda c: export_model(tmp_path, sharded(other, c.rank, 2, rows), c, storage=Broken())
    )
    assert [e.problem for e in errors] == ["rank 0: writing the export failed: No space left on device"] * 2
    assert names(tmp_path) == ["model.safetensors"]
    assert_same(everything(tmp_path), PLAIN)
