"""Activation checkpointing and torch.compile as settings: what is computed again, what is kept, what a model can still do."""

from __future__ import annotations

import copy
import pickle
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from distrib import Accelerator, RunConfig, StrategyError
from distrib.collectives.single import SingleCollectives
from distrib.errors import ConfigError
from distrib.strategies.blocks import Forwards
from distrib.strategies.context import ContextParallel

# torch 2.13 reads `.grad` of a block's input while it traces; outside of pytest its own filters hide this.
pytestmark = [
    pytest.mark.usefixtures("plain_process"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]
X = torch.linspace(-1, 1, 32).view(4, 8)


class Block(nn.Module):
    """Counts its forwards; draws random numbers, has attention and running statistics."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.calls = 0
        self.qkv = nn.Linear(8, 24)
        self.wide, self.narrow = nn.Linear(8, 32), nn.Linear(32, 8)
        self.norm = nn.BatchNorm1d(8)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, *, scale=1.0):
        if not torch.compiler.is_compiling():
            self.calls += 1
        q, k, v = self.qkv(x).view(1, 1, -1, 3, 8).unbind(3)
        x = x + nn.functional.scaled_dot_product_attention(q, k, v).view(-1, 8)
        return self.norm(x + scale * self.dropout(self.narrow(torch.tanh(self.wide(x)))))


class Net(nn.Module):
    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.inside = nn.Linear(8, 8)
        self.layers = nn.ModuleList([Block(dropout) for _ in range(3)])
        self.head = nn.Linear(8, 1)

    def forward(self, x):
        x = self.inside(x)
        for layer in self.layers:
            x = layer(x, scale=0.5)
        return self.head(x)


def net(dropout: float = 0.0, **options) -> Net:
    torch.manual_seed(0)
    model = Net(dropout)
    replace(model, **options)
    return model


def replace(model: nn.Module, scope: str = "none", backend: str = "eager", **options) -> None:
    compiled = {
        "scope": scope,
        "backend": backend,
        "mode": "default",
        "dynamic": options.pop("dynamic", None),
    }
    Forwards({"compile": compiled, **options}, ContextParallel(SingleCollectives()), say=True).replace(model)


def gradients(model: nn.Module) -> dict:
    torch.manual_seed(1)
    model(X).square().mean().backward()
    return {name: x.grad for name, x in model.named_parameters()}


def state_after_a_step(model: nn.Module) -> tuple[dict, dict, torch.Tensor]:
    found = gradients(model)
    return found, dict(model.named_buffers()), torch.get_rng_state()


def assert_same(found, expected) -> None:
    for mine, true in zip(found[:2], expected[:2], strict=True):
        assert mine.keys() == true.keys()
        for name, value in true.items():
            torch.testing.assert_close(mine[name], value, rtol=0, atol=0, msg=name)
    assert torch.equal(found[2], expected[2])


BOTH = pytest.mark.parametrize("setting", ["full", "selective"])


@BOTH
def test_recomputing_changes_no_gradient_no_statistic_and_no_random_state(setting):
    expected = state_after_a_step(net(0.5))
    assert_same(state_after_a_step(net(0.5, activation_checkpointing=setting)), expected)


@BOTH
def test_recomputing_under_autocast_changes_no_gradient(setting):
    def under(model):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(X).square().mean()
        loss.backward()  # outside, where autocast is off
        return {name: x.grad for name, x in model.named_parameters()}, {}, torch.get_rng_state()

    assert_same(under(net(activation_checkpointing=setting)), under(net()))


@BOTH
def test_every_block_runs_twice_per_step_and_once_without_gradients(setting):
    model = net(activation_checkpointing=setting)
    gradients(model)
    assert [layer.calls for layer in model.layers] == [2, 2, 2]
    with torch.no_grad():
        model(X)
    assert [layer.calls for layer in model.layers] == [3, 3, 3]


class Operations(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.counts[op.name().partition("::")[2].partition(".")[0]] += 1
        return op(*args, **(kwargs or {}))


def operations(model: nn.Module) -> Counter:
    with Operations() as seen:
        gradients(model)
    return seen.counts


def test_selective_computes_no_product_and_no_attention_twice_but_all_else():
    plain, full, selective = (
        operations(net(activation_checkpointing=x)) for x in ("none", "full", "selective")
    )
    (attention,) = [x for x in plain if "attention" in x and "backward" not in x]
    assert full["addmm"] == plain["addmm"] + 9
    assert full[attention] == plain[attention] + 3
    assert selective["addmm"] == plain["addmm"]
    assert selective[attention] == plain[attention]
    assert selective["tanh"] == full["tanh"] == plain["tanh"] + 3


def kept_bytes(model: nn.Module) -> int:
    """Return bytes of all activations that a forward leaves behind: what autograd saves, and what blocks are given."""
    kept = {}

    def keep(x):
        if x.dtype != torch.uint8:  # a state of the random generator, of the same size for every model
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    for layer in model.layers:
        layer.register_forward_pre_hook(lambda _, args: [keep(x) for x in args] and None)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model(X)
    weights = {x.untyped_storage().data_ptr() for x in model.parameters()}
    return sum(storage.nbytes() for address, storage in kept.items() if address not in weights)


def test_full_keeps_only_what_blocks_are_given_and_what_is_outside_of_them():
    row = X.nbytes
    # the input, what the three blocks are given, and what the head is given
    assert kept_bytes(net(activation_checkpointing="full")) == 5 * row
    assert kept_bytes(net()) > 5 * row * 5


@pytest.mark.parametrize(
    "options", [{"activation_checkpointing": "full"}, {"scope": "blocks"}, {"scope": "model"}]
)
def test_names_and_classes_stay_and_hooks_run_once(options):
    plain, model = net(), net(**options)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    assert [type(x) for x in model.modules()] == [type(x) for x in plain.modules()]
    seen = []
    model.layers[1].register_forward_hook(lambda *_: seen.append(1))
    gradients(model)
    assert seen == [1]


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize(
    "options",
    [
        {"activation_checkpointing": "full"},
        {"scope": "model"},
        {"scope": "blocks", "backend": "aot_eager", "activation_checkpointing": "full"},
    ],
)
def test_a_copy_computes_with_weights_of_its_own(options, how):
    torch._dynamo.reset()
    model = net(**options)
    twin = how(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(twin(X), net()(X))


@pytest.mark.parametrize(
    ("scope", "setting"),
    [
        ("blocks", "none"),
        ("blocks", "selective"),
        ("model", "full"),
        *(
            pytest.param(*x, marks=pytest.mark.slow)
            for x in (("model", "none"), ("blocks", "full"), ("model", "selective"))
        ),
    ],
)
def test_compiling_changes_no_gradient_and_no_statistic(scope, setting):
    torch._dynamo.reset()
    backend = "eager" if setting == "none" else "aot_eager"
    found = state_after_a_step(net(0.5, scope=scope, backend=backend, activation_checkpointing=setting))
    expected = state_after_a_step(net(0.5))
    assert found[0].keys() == expected[0].keys()
    for mine, true in zip(found[:2], expected[:2], strict=True):
        for name, value in true.items():
            torch.testing.assert_close(mine[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_equal_blocks_are_compiled_once():
    torch._dynamo.reset()
    from torch._dynamo.utils import counters

    counters.clear()
    gradients(net(scope="blocks"))
    assert counters["stats"]["unique_graphs"] == 1


def test_a_step_that_is_compiled_and_recomputed_keeps_less():
    torch._dynamo.reset()
    settings = {"scope": "blocks", "backend": "aot_eager"}
    assert kept_bytes(net(**settings, activation_checkpointing="full")) < 0.6 * kept_bytes(net(**settings))


@pytest.mark.parametrize("compiled", ["torch.compile", "in place", "a block"])
def test_a_model_that_is_compiled_already_is_not_compiled_again(compiled, capsys):
    torch._dynamo.reset()
    model = net()
    if compiled == "torch.compile":
        given = torch.compile(model, backend="aot_eager")
    elif compiled == "in place":
        model.compile(backend="aot_eager")
        given = model
    else:
        model.layers[0].compile(backend="aot_eager")
        given = model
    replace(given, scope="model", activation_checkpointing="full")
    assert "compiled already" in capsys.readouterr().err
    assert "forward" not in vars(model)
    expected = gradients(net())
    for name, value in gradients(given).items():
        torch.testing.assert_close(value, expected[name.replace("_orig_mod.", "")], rtol=1e-5, atol=1e-6)


def compile_many(dynamic: bool | None, rows: range) -> None:
    torch._dynamo.reset()
    model = net(scope="blocks", dynamic=dynamic)
    for n in rows:
        model(torch.ones(n, 8)).sum().backward()


def test_a_forward_that_is_compiled_for_each_batch_size_is_told_of_once(capsys):
    with torch._dynamo.config.patch(recompile_limit=20):
        compile_many(False, range(3, 14))
    told = [line for line in capsys.readouterr().err.splitlines() if "was compiled" in line]
    assert len(told) == 1
    assert "layers.0 (Block) was compiled 8 times" in told[0]
    assert "x was (3, 8), (4, 8), (5, 8), (6, 8) and 4 more" in told[0]
    assert "compile.dynamic: true" in told[0]
    assert "data.tail pad or drop" in told[0]


def test_a_ragged_last_batch_is_nothing_to_tell_of(capsys):
    compile_many(None, range(3, 20))
    assert "was compiled" not in capsys.readouterr().err


def test_a_model_without_blocks_is_told_of_and_left_alone(capsys):
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    replace(model, scope="blocks", activation_checkpointing="full")
    said = capsys.readouterr().err
    assert "activation_checkpointing full: nothing of Sequential (no repeated blocks)" in said
    assert "compile: nothing of Sequential (no repeated blocks)" in said
    assert all("forward" not in vars(x) for x in model.modules())


def test_replacing_twice_is_replacing_once():
    model = net(scope="blocks", activation_checkpointing="full")
    before = [layer.forward.__func__ for layer in model.layers]
    replace(model, scope="blocks", activation_checkpointing="full")
    assert [layer.forward.__func__ for layer in model.layers] == before


def test_a_forward_that_the_instance_has_is_the_one_that_is_recomputed():
    model, plain = net(), net()
    for x in (model, plain):
        for layer in x.layers:
            layer.forward = lambda x, scale, own=layer: type(own).forward(own, x, scale=2 * scale)
    replace(model, activation_checkpointing="full")
    assert_same(state_after_a_step(model), state_after_a_step(plain))
    assert [layer.calls for layer in model.layers] == [2, 2, 2]


def test_a_backend_that_torch_lacks_is_refused_with_the_nearest():
    with pytest.raises(StrategyError, match=r"(?s)D0850.*'indctor'.*did you mean 'inductor'"):
        net(scope="model", backend="indctor")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"compile": {"backend": "inductor"}}, "compile.scope is not set"),
        ({"compile": {"scope": "none", "dynamic": True}}, "compile.scope is none"),
        ({"compile": {"scope": "model", "backend": "eager", "mode": "max-autotune"}}, "only the backend inductor"),
        ({"compile": {"scope": "model", "backend": "eager"}, "activation_checkpointing": "full"}, "random numbers"),
    ],
)  # fmt: skip
def test_settings_that_would_do_nothing_or_harm_are_refused(settings, words):
    with pytest.raises(ConfigError, match=f"(?s)D0107.*{words}"):
        RunConfig(**settings)


def test_unwrap_takes_the_precision_off_and_nothing_else():
    torch._dynamo.reset()
    settings = {"compile": {"scope": "model", "backend": "aot_eager"}, "activation_checkpointing": "full"}
    accelerator = Accelerator(RunConfig(device="cpu", strategy="single", mixed_precision="bf16", **settings))
    model = accelerator.prepare(net())
    below = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    assert below is model
    assert getattr(model.forward, "_distrib_compiled", False)
    assert all(getattr(layer.forward, "_distrib_recomputes", False) for layer in model.layers)
    assert_same((gradients(model), {}, X), (gradients(net()), {}, X))


def hf_model(kind: str):
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "hidden_size": 16}
    if kind == "llama":
        config = transformers.LlamaConfig(**sizes, intermediate_size=32, num_key_value_heads=2)
        return transformers.LlamaForCausalLM(config).train()
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, max_position_embeddings=32)).train()


def hf_gradients(model):
    ids = torch.arange(24).view(2, 12)
    torch.manual_seed(1)
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: x.grad for name, x in model.named_parameters()}


HF = pytest.mark.parametrize("kind", ["llama", "gpt2"])


@HF
@BOTH
def test_a_model_of_transformers_recomputes_although_it_makes_a_cache(kind, setting):
    model = hf_model(kind)
    replace(model, activation_checkpointing=setting)
    expected = hf_gradients(hf_model(kind))
    for name, value in hf_gradients(model).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7, msg=name)


@HF
def test_the_blocks_of_a_model_of_transformers_are_compiled_once(kind):
    torch._dynamo.reset()
    from torch._dynamo.utils import counters

    model = hf_model(kind)
    replace(model, scope="blocks")
    counters.clear()
    found, expected = hf_gradients(model), hf_gradients(hf_model(kind))
    assert counters["stats"]["unique_graphs"] == 1
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7, msg=name)


@HF
def test_generation_fills_its_cache_under_recomputing(kind):
    model, plain = hf_model(kind).eval(), hf_model(kind).eval()
    replace(model, activation_checkpointing="full")
    ids = torch.arange(6).view(1, 6)
    with torch.enable_grad():  # as in tuning by a generated text
        cache = model(input_ids=ids).past_key_values
    assert cache.get_seq_length() == 6
    tokens = [x.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0) for x in (model, plain)]
    assert torch.equal(*tokens)


@HF
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_model_of_transformers_that_checkpoints_itself_does_so_alone(kind, when, capsys):
    model = hf_model(kind)
    calls = Counter()
    block = (model.model.layers if kind == "llama" else model.transformer.h)[1]
    block.mlp.register_forward_pre_hook(lambda *_: calls.update(["mlp"]))
    if when == "before":
        model.activation_checkpointing_enable()
    replace(model, activation_checkpointing="full")
    if when == "after":
        model.activation_checkpointing_enable()
    hf_gradients(model)
    assert calls["mlp"] == 2
    assert ("checkpoints of its own" in capsys.readouterr().err) == (when == "before")


@pytest.mark.parametrize("undo", [False, True])
def test_a_deep_copy_of_a_compiled_bf16_model_computes_with_weights_of_its_own(undo):
    torch._dynamo.reset()
    settings = {"compile": {"scope": "model", "backend": "eager"}}
    accelerator = Accelerator(RunConfig(device="cpu", strategy="single", mixed_precision="bf16", **settings))
    model = accelerator.prepare(net())
    expected = model(X)
    twin = copy.deepcopy(model)
    if undo:
        twin, expected = accelerator.unwrap_model(twin, keep_fp32_wrapper=False), net()(X)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(twin(X), expected)
