"""Activation checkpointing and torch.compile under every strategy: the numbers of a plain loop, and what ranks may combine."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distrib import Accelerator, RunConfig
from distrib.testing import run_ranks
from tests.contract import plain, training
from tests.contract.test_same_run import STEPS, assert_same


class Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.wide, self.narrow = nn.Linear(width, 12), nn.Linear(12, width)

    def forward(self, x):
        return x + self.narrow(torch.tanh(self.wide(x)))


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Residual(plain.FEATURES) for _ in range(3)])
        self.head = nn.Linear(plain.FEATURES, plain.CLASSES)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def make_blocks(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return Blocks().to(dtype)


def train_blocks(settings: dict, *args, **options):
    """Run the loop of the contract on a model that has blocks."""
    model = make_blocks()
    training.make_model, training.settings_of = lambda _: model, lambda _: settings
    found = training.train("", *args, **options)
    assert any("forward" in vars(x) for x in model.modules())
    return found


def compiled(scope: str, backend: str = "eager") -> dict:
    return {"compile": {"scope": scope, "backend": backend}}


SIZES = {"single": 1, "ddp": 2, "fsdp": 2}
SHARED = ("ddp", "fsdp")
STATIC = {"ddp": {"static_graph": True}}
CASES = [
    *((s, {"activation_checkpointing": x}) for s in SHARED for x in ("full", "selective")),
    *((s, compiled("blocks")) for s in SHARED),
    ("single", compiled("model")),
    ("fsdp", {"activation_checkpointing": "full", **compiled("blocks", "aot_eager")}),
]
MORE = [
    *(("single", {"activation_checkpointing": x}) for x in ("full", "selective")),
    *((s, compiled("model")) for s in SHARED),
    ("single", compiled("blocks")),
    ("ddp", {"activation_checkpointing": "full", **STATIC}),
    ("fsdp", {"activation_checkpointing": "full", "fsdp": {"reshard_after_forward": False}}),
    *((s, compiled(x, "inductor")) for s in SIZES for x in ("blocks", "model")),
    *(
        (s, {"activation_checkpointing": x, **compiled(scope, "aot_eager")})
        for s in SIZES
        for x in ("full", "selective")
        for scope in ("blocks", "model")
    ),
    ("ddp", {"activation_checkpointing": "full", **compiled("model", "aot_eager"), **STATIC}),
]


@pytest.mark.timeout(300)  # inductor's first C++ compilation takes a minute
@pytest.mark.parametrize(
    ("strategy", "settings"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE if case not in CASES)],
    ids=str,
)
def test_parameters_equal_those_of_a_plain_loop(strategy, settings, monkeypatch):
    monkeypatch.setattr(plain, "make_model", make_blocks)
    n, micro, accumulation, world_size = 53, 2, 3, SIZES[strategy]
    expected = plain.train_plainly(
        n, micro * world_size * accumulation, STEPS, lambda _: list(range(n)), clip=0.3
    )
    settings = {"strategy": strategy, **settings}
    for found in run_ranks(
        train_blocks, world_size, settings, n, micro, accumulation, STEPS, clip=0.3, timeout_s=240
    ):
        assert_same(found, expected)


class Norms(nn.Module):
    """Blocks with what is easily lost in a second run: random numbers, float32 islands, running statistics."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([
            nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Dropout(0.5), nn.BatchNorm1d(8)) for _ in range(3)
        ])  # fmt: skip
        self.head = nn.Linear(8, 1)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def norms_after_two_steps(settings: dict) -> dict:
    accelerator = Accelerator(RunConfig(device="cpu", seed=3, **settings))
    torch.manual_seed(0)
    model = Norms()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    torch.manual_seed(accelerator.process_index)
    for _ in range(2):
        accelerator.backward(model(torch.randn(6, 8)).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    return {name: x.clone() for name, x in accelerator.get_state_dict(model).items()}


@pytest.mark.parametrize("setting", ["full", "selective"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_second_run_draws_rounds_and_normalizes_as_the_first(strategy, setting):
    islands = {"compute": "bf16", "fp32_modules": ("layers.*.1",)}
    settings = {"strategy": strategy, "mixed_precision": islands, "sync_batchnorm": True}
    expected = run_ranks(norms_after_two_steps, 2, settings)
    found = run_ranks(norms_after_two_steps, 2, {**settings, "activation_checkpointing": setting})
    for mine, true in zip(found, expected, strict=True):
        assert mine.keys() == true.keys()
        for name, value in true.items():
            torch.testing.assert_close(mine[name], value, rtol=0, atol=0, msg=name)


def saved_and_resumed(folder: str, settings: dict) -> tuple[list[str], dict, dict]:
    """Save under settings, load without them; return names and the two states after one more step."""

    def run(load: bool, **settings):
        accelerator = Accelerator(
            RunConfig(device="cpu", seed=3, project_dir=folder, strategy="fsdp", **settings)
        )
        model = make_blocks()
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
        for step in range(2):
            if step == 1 and load:
                accelerator.load_state()
            accelerator.backward(model(torch.ones(2, plain.FEATURES, dtype=torch.float64)).square().mean())
            optimizer.step()
            optimizer.zero_grad()
            if step == 0 and not load:
                accelerator.save_state()
        state = {name: x.clone() for name, x in accelerator.get_state_dict(model).items()}
        accelerator.free_memory()
        return state

    first = run(False, **settings)
    return list(first), first, run(True)


def test_a_checkpoint_of_a_compiled_run_loads_into_a_plain_one(tmp_path):
    for names, first, second in run_ranks(saved_and_resumed, 2, str(tmp_path), compiled("blocks")):
        assert names == list(make_blocks().state_dict())
        for name, value in first.items():
            torch.testing.assert_close(second[name], value, msg=name)


def hf_step(kind: str, settings: dict) -> dict:
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    accelerator = Accelerator(RunConfig(device="cpu", seed=3, **settings))
    sizes = {"vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16}
    torch.manual_seed(0)
    if kind == "llama":
        config = transformers.LlamaConfig(**sizes, intermediate_size=32, num_key_value_heads=2)
        model = transformers.LlamaForCausalLM(config).train()
    else:
        config = transformers.GPT2Config(**sizes, max_position_embeddings=32)
        model = transformers.GPT2LMHeadModel(config).train()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    torch.manual_seed(1)
    ids = torch.arange(24).view(2, 12)
    accelerator.backward(model(input_ids=ids, labels=ids).loss)
    optimizer.step()
    return {name: x.clone() for name, x in accelerator.get_state_dict(model).items()}


HF_SETTINGS = [
    {"activation_checkpointing": "full"},
    {"activation_checkpointing": "selective"},
    compiled("blocks"),
    compiled("model"),
    {"activation_checkpointing": "full", **compiled("blocks", "aot_eager")},
]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("strategy", list(SIZES))
def test_a_model_of_transformers_takes_the_step_that_it_takes_without(kind, strategy):
    pytest.importorskip("transformers", reason="pip install transformers")
    expected = run_ranks(hf_step, SIZES[strategy], kind, {"strategy": strategy})[0]
    for settings in HF_SETTINGS:
        found = run_ranks(hf_step, SIZES[strategy], kind, {"strategy": strategy, **settings})[0]
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7, msg=f"{settings} {name}")
