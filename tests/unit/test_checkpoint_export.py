import json
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import load_file
from torch import nn

from distrib.checkpoint import export_model
from distrib.checkpoint.adapters import adapter_key
from distrib.checkpoint.companions import write_companions, write_model
from distrib.checkpoint.export import export_adapter
from distrib.checkpoint.storage import Storage
from distrib.errors import CheckpointError
from distrib.state import ShardedState
from distrib.strategies.slices import module_slices
from tests.unit.checkpointing import ALONE, interval, on_ranks, rows, sharded, slice_of, state_of

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


@pytest.mark.parametrize("little", [0, 2**20])
def test_what_few_ranks_hold_is_sent_by_them(tmp_path, monkeypatch, little):
    """The first tensor lies on rank 1, the second on ranks 0 and 2, the others on rank 2."""
    monkeypatch.setattr("distrib.checkpoint.export._LITTLE", little)
    places = dict.fromkeys(MODEL, (2,)) | dict(zip(MODEL, [(1,), (0, 2)], strict=False))

    def run(c):
        mine = {name: at.index(c.rank) for name, at in places.items() if c.rank in at}
        slices = {
            name: (slice_of(name, MODEL[name], interval(MODEL[name].shape, i, len(places[name]))),)
            for name, i in mine.items()
        }
        return export_model(tmp_path, ShardedState(slices), c)

    assert on_ranks(3, run) == [tmp_path] * 3
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


def test_a_function_chooses_what_is_exported(tmp_path):
    export_model(tmp_path, state_of(MODEL), ALONE, include=lambda name: name.endswith("bias"))
    assert_same(everything(tmp_path), {"a.bias": PLAIN["a.bias"]})


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("base_model.model.q.lora_A.default.weight", "base_model.model.q.lora_A.weight"),
        ("base_model.model.emb.lora_embedding_A.default", "base_model.model.emb.lora_embedding_A"),
        ("base_model.model.head.modules_to_save.default.weight", "base_model.model.head.weight"),
        ("base_model.model.q.lora_A.other.weight", None),
        ("base_model.model.head.modules_to_save.other.weight", None),
        ("base_model.model.head.original_module.weight", None),
        ("base_model.model.q.base_layer.weight", None),
        ("blocks.0.lora_A", "blocks.0.lora_A"),
        ("blocks.0.lora_down.weight", "blocks.0.lora_down.weight"),
        ("blocks.0.adapter.up.weight", "blocks.0.adapter.up.weight"),
        ("blocks.0.weight", None),
    ],
)
def test_an_adapter_s_tensors_are_told_by_their_names(name, key):
    assert adapter_key(name) == key


def test_an_adapter_is_one_file_of_its_tensors_only(tmp_path):
    weights = {"q.lora_A.default.weight": torch.randn(2, 3), "q.lora_A.other.weight": torch.randn(2, 3)}
    state = state_of({f"model/{name}": x for name, x in (weights | {"q.weight": torch.randn(3, 3)}).items()})
    export_adapter(tmp_path, state, ALONE)
    assert names(tmp_path) == ["adapter_model.safetensors"]
    assert_same(everything(tmp_path), {"q.lora_A.weight": weights["q.lora_A.default.weight"]})


def test_an_adapter_leaves_a_model_s_files_alone(tmp_path):
    export_model(tmp_path, state_of(MODEL), ALONE)
    export_adapter(tmp_path, state_of({"model/lora_A": torch.ones(2)}), ALONE)
    export_model(tmp_path, state_of(MODEL), ALONE)
    assert names(tmp_path) == ["adapter_model.safetensors", "model.safetensors"]


def test_a_model_without_an_adapter_has_none_to_export(tmp_path):
    with pytest.raises(CheckpointError) as raised:
        export_adapter(tmp_path, state_of(MODEL), ALONE)
    assert raised.value.code == "D0719"


class Settings:
    """What transformers' configurations and tokenizers have in common."""

    dtype = None

    def __init__(self, name, **values):
        self._name = name
        vars(self).update(values)

    def save_pretrained(self, directory):
        values = {key: x for key, x in vars(self).items() if key != "_name"}
        (Path(directory) / self._name).write_text(json.dumps(values))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.config = Settings("config.json", hidden_size=2)


def test_settings_say_the_class_and_the_dtype_of_the_file_and_the_model_s_own_stay(tmp_path):
    model = Model()
    assert write_companions(tmp_path, model, ALONE, dtype=torch.bfloat16) == ["config.json"]
    written = json.loads((tmp_path / "config.json").read_text())
    assert written == {"hidden_size": 2, "architectures": ["Model"], "dtype": "bfloat16"}
    assert not hasattr(model.config, "architectures")


def test_a_model_without_settings_has_no_such_files_and_a_tokenizer_is_saved_all_the_same(tmp_path):
    tokenizer = Settings("tokenizer.json", vocabulary=["a"])
    assert write_companions(tmp_path, nn.Linear(1, 1), ALONE, tokenizer=tokenizer) == ["tokenizer.json"]
    assert names(tmp_path) == ["tokenizer.json"]


def test_settings_that_are_none_of_transformers_are_left_alone(tmp_path):
    model = Model()
    model.config = {"hidden_size": 2}
    assert write_companions(tmp_path, model, ALONE) == []


def test_a_tokenizer_that_cannot_be_saved_is_an_error_on_every_rank_and_leaves_nothing(tmp_path):
    class Broken:
        def save_pretrained(self, directory):
            raise ValueError("no vocabulary")

    errors = on_ranks(2, lambda c: write_companions(tmp_path, Model(), c, tokenizer=Broken()))
    assert ["no vocabulary" in error.problem for error in errors] == [True, True]
    assert names(tmp_path) == []


def llama(**settings):
    transformers = pytest.importorskip("transformers", reason="needs Hugging Face's transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=40, num_key_value_heads=1, **sizes, **settings)
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_pretrained_loads_what_was_exported(tmp_path, tied, dtype):
    model = llama(tie_word_embeddings=tied)
    from transformers import AutoModelForCausalLM

    write_model(tmp_path, model, module_slices(model, "model/"), ALONE, max_shard_size=4000, dtype=dtype)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)

    assert type(loaded) is type(model)
    assert_same(loaded.state_dict(), {name: x.to(dtype) for name, x in model.state_dict().items()})


@pytest.mark.filterwarnings("default")
def test_peft_loads_an_adapter_that_was_exported(tmp_path):
    peft = pytest.importorskip("peft", reason="needs Hugging Face's peft")
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(llama(), settings)
    model.load_state_dict(
        {
            name: torch.randn_like(x) if "lora_" in name or "modules_to_save" in name else x
            for name, x in model.state_dict().items()
        }
    )
    write_model(tmp_path, model, module_slices(model, "model/"), ALONE, adapter="default")

    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path)

    tokens = torch.arange(6)[None]
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert not torch.equal(loaded(tokens).logits, llama()(tokens).logits)
