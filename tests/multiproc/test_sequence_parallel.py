"""Hidden states divided along the sequence between matrix products: the same run as on one rank, for less memory."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distrib import Accelerator, RunConfig, StrategyError
from distrib.testing import run_ranks

PLAN = ("*.attention.[qkv]=colwise", "*.attention.out=rowwise", "*.mlp.0=colwise", "*.mlp.2=rowwise")
SINGLE = {"strategy": "single"}


def divided(*, sequence: bool = True, plan=PLAN, **settings) -> dict:
    tensor_parallel = {"sequence": sequence, **({"plan": plan} if plan else {})}
    return {"strategy": "fsdp", "mesh": {"tensor": 2}, "tensor_parallel": tensor_parallel, **settings}


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.head_size = width // heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.scale = nn.Parameter(torch.ones(self.head_size))  # whole, and works on the rank's heads

    def forward(self, x):
        batch, length, _ = x.shape
        q, k, v = (
            part(x).view(batch, length, -1, self.head_size).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q * self.scale, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, -1))


class Block(nn.Module):
    def __init__(self, width: int = 16, heads: int = 4, dropout: float = 0.0):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.gain = nn.Parameter(torch.ones(width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.mlp(self.norm2(x))) * self.gain


class Gpt(nn.Module):
    def __init__(self, block=Block, width: int = 16, layers: int = 3, **options):
        super().__init__()
        self.tokens, self.places = nn.Embedding(50, width), nn.Embedding(64, width)
        self.blocks = nn.Sequential(*(block(width, **options) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 50)

    def forward(self, x):
        return self.head(self.norm(self.blocks(self.tokens(x) + self.places(torch.arange(x.shape[1])))))


def tokens_of(step: int, length: int = 8) -> torch.Tensor:
    return torch.randint(50, (4, length), generator=torch.Generator().manual_seed(step))


def train(settings: dict, accumulation: int = 1, dtype: torch.dtype = torch.float64) -> tuple:
    accelerator = Accelerator(
        RunConfig(device="cpu", seed=1, gradient_accumulation_steps=accumulation, **settings)
    )
    torch.manual_seed(0)
    model = Gpt().to(dtype)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    losses = []
    for step in range(4 * accumulation):
        with accelerator.split_between_processes(tokens_of(step)) as mine, accelerator.accumulate(model):
            loss = F.cross_entropy(model(mine)[:, :-1].flatten(0, 1), mine[:, 1:].flatten())
            accelerator.backward(loss)
            norm = accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        losses.append((float(accelerator.reduce(loss.detach(), "mean")), float(norm)))
    return losses, {name: x.clone() for name, x in accelerator.get_state_dict(model).items()}


def assert_same(found: tuple, expected: tuple, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(
        torch.tensor(found[0]), torch.tensor(expected[0]), rtol=max(rtol, 1e-6), atol=1e-6
    )
    for name, value in expected[1].items():
        torch.testing.assert_close(
            found[1][name], value, rtol=rtol, atol=rtol / 100, msg=lambda x, name=name: f"{name}: {x}"
        )


@pytest.mark.parametrize(
    ("settings", "world_size", "accumulation"),
    [
        (divided(activation_checkpointing="full"), 2, 1),
        (divided(), 4, 2),
        pytest.param(divided(), 2, 1, marks=pytest.mark.slow),
        pytest.param(divided(mesh={"tensor": 4}), 4, 1, marks=pytest.mark.slow),
        pytest.param(divided(activation_checkpointing="selective"), 4, 1, marks=pytest.mark.slow),
        pytest.param(divided(fsdp={"wrap": ("Block", "LayerNorm")}), 4, 1, marks=pytest.mark.slow),
        pytest.param(divided(mesh={"replicate": 2, "shard": 1, "tensor": 2}), 4, 2, marks=pytest.mark.slow),
    ],
)
def test_a_gpt_trains_as_on_one_rank(settings, world_size, accumulation):
    expected = run_ranks(train, 1, SINGLE, accumulation)[0]
    for found in run_ranks(train, world_size, settings, accumulation):
        assert_same(found, expected)


def llama(settings: dict, attention: str) -> tuple[list[float], dict]:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=100, attn_implementation=attention, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    accelerator = Accelerator(RunConfig(device="cpu", seed=1, **settings))
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).double()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    losses = []
    for step in range(3):
        mask = torch.ones(4, 8, dtype=torch.long)
        mask[1, 5:] = 0
        batch = {"ids": tokens_of(step), "mask": mask}
        with accelerator.split_between_processes(batch) as mine:
            loss = model(input_ids=mine["ids"], attention_mask=mine["mask"], labels=mine["ids"]).loss
            accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(accelerator.reduce(loss.detach(), "mean")))
    return losses, {name: x.clone() for name, x in accelerator.get_state_dict(model).items()}


@pytest.mark.parametrize(
    ("attention", "world_size", "checkpointing"),
    [
        ("eager", 2, "full"),
        pytest.param("eager", 4, "full", marks=pytest.mark.slow),
        pytest.param("sdpa", 2, "none", marks=pytest.mark.slow),
        pytest.param("sdpa", 2, "full", marks=pytest.mark.slow),
    ],
)
def test_a_llama_trains_as_on_one_rank(attention, world_size, checkpointing):
    pytest.importorskip("transformers", reason="needs Hugging Face's transformers")
    expected = run_ranks(llama, 1, SINGLE, attention)[0]
    settings = divided(plan=None, activation_checkpointing=checkpointing)
    for found in run_ranks(llama, world_size, settings, attention):
        assert found[0] == pytest.approx(expected[0], abs=1e-6)
        for name, value in expected[1].items():
            torch.testing.assert_close(found[1][name], value, rtol=1e-7, atol=1e-9, msg=name)


def test_in_bf16_losses_are_those_of_one_rank_up_to_the_format():
    settings = {"mixed_precision": {"compute": "bf16", "fp32_modules": ("*norm*",)}}
    expected, _ = run_ranks(train, 1, {**SINGLE, **settings}, 1, torch.float32)[0]
    for losses, _ in run_ranks(train, 4, divided(**settings), 1, torch.float32):
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=2e-2, atol=1e-2)


def kept_bytes(settings: dict) -> int:
    """Return how many bytes autograd keeps of one forward, parameters aside."""
    accelerator = Accelerator(RunConfig(device="cpu", seed=1, **settings))
    model = accelerator.prepare(Gpt(layers=4, dropout=0.1))
    model(tokens_of(0, 32))  # the first forward looks whether blocks may be divided
    own = {x.untyped_storage().data_ptr() for x in map(local, model.parameters())}
    kept: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = local(x).untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model(tokens_of(0, 32)).square().mean()
    accelerator.backward(loss)
    return sum(kept.values())


def local(x: torch.Tensor) -> torch.Tensor:
    return x.to_local() if isinstance(x, torch.distributed.tensor.DTensor) else x


def test_a_forward_keeps_less_for_the_backward():
    with_it, without = (run_ranks(kept_bytes, 2, divided(sequence=x))[0] for x in (True, False))
    assert with_it < 0.85 * without


def refusals(settings: dict, cases: list[tuple[str, int]]) -> list[str]:
    accelerator = Accelerator(RunConfig(device="cpu", seed=1, **settings))
    said = []
    for kind, length in cases:
        model = accelerator.prepare(KINDS[kind]())
        try:
            model(tokens_of(0, length))
        except StrategyError as error:
            said.append(str(error))
    return said


class MixesPositions(Block):
    def forward(self, x):
        return super().forward(x - 0.5 * x.mean(1, keepdim=True))


class Flattens(Attention):
    def forward(self, x):
        q = F.gelu(self.q(x)).flatten(0, 1)
        return self.out(q).view(x.shape)


class WithFlattening(Block):
    def __init__(self, *args):
        super().__init__(*args)
        self.attention = Flattens(16, 4)


class Biased(Gpt):
    """Gives each block, beside the hidden states, what is learned outside of the blocks."""

    def __init__(self):
        super().__init__(TakesBias)

    def forward(self, x):
        hidden = self.tokens(x)
        for block in self.blocks:
            hidden = block(hidden, self.places.weight[0])
        return self.head(hidden)


class TakesBias(Block):
    def forward(self, x, bias):
        return super().forward(x + bias)


class Flat(Gpt):
    def forward(self, x):
        return self.blocks(self.tokens(x).flatten(0, 1))


class Backwards(Gpt):
    def forward(self, x):
        hidden = self.tokens(x)
        for block in reversed(self.blocks):
            hidden = block(hidden)
        return hidden


class Leaving(Gpt):
    def forward(self, x):
        return self.blocks[:2](self.tokens(x))


KINDS = {
    "gpt": Gpt,
    "mixing": lambda: Gpt(MixesPositions),
    "flattening": lambda: Gpt(WithFlattening),
    "biased": Biased,
    "backwards": Backwards,
    "leaving": Leaving,
    "flat": Flat,
}


def test_what_cannot_be_divided_along_the_sequence_is_found_out_in_the_first_forward():
    expected = {
        ("gpt", 7): r"D0852.*have 7 positions.*mesh.tensor \(2\)",
        ("mixing", 8): r"D0854.*blocks.0 \(MixesPositions\).*differ by \d+%",
        ("flattening", 8): r"D0853.*blocks.0.attention.out gets a tensor of shape \(32, 8\)",
        ("biased", 8): r"D0855.*blocks.0 gets a tensor of shape \(16,\)",
        ("backwards", 8): r"D0853.*blocks.2 comes before blocks.0",
        ("leaving", 8): r"D0853.*blocks.2, the last of its list, was not called",
        ("flat", 8): r"D0853.*blocks.0 gets a tensor of shape \(32, 16\)",
    }
    for said in run_ranks(refusals, 2, divided(), list(expected)):
        assert len(said) == len(expected)
        for words, message in zip(expected.values(), said, strict=True):
            assert re.search(words, message), message


def with_context() -> None:
    accelerator = Accelerator(RunConfig(device="cpu", **divided(mesh={"tensor": 2, "context": 2})))
    accelerator.prepare(Gpt())


def test_sequences_that_are_divided_already_are_refused():
    with pytest.raises(Exception, match=r"(?s)D0851.*mesh.context is 2, which divides them already"):
        run_ranks(with_context, 4)


class Gain(nn.Module):
    """Held whole, outside of the blocks, where it works on what the plan has divided."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return torch.tanh(x) * self.gain


def with_a_wrong_head() -> None:
    plan = (*PLAN, "head.0=colwise", "head.2=rowwise")
    accelerator = Accelerator(RunConfig(device="cpu", seed=1, **divided(plan=plan)))
    model = Gpt()
    model.head = nn.Sequential(nn.Linear(16, 32), Gain(), nn.Linear(32, 50))
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    accelerator.backward(model(tokens_of(0)).square().mean())
    optimizer.step()


def test_replicas_that_would_part_outside_of_blocks_are_found_out_in_the_first_step():
    with pytest.raises(Exception, match=r"(?s)D0835.*different gradients of head.1.gain, which"):
        run_ranks(with_a_wrong_head, 2)


def generated(settings: dict) -> list[list[int]]:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=100, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    accelerator = Accelerator(RunConfig(device="cpu", seed=1, **settings))
    torch.manual_seed(0)
    model = accelerator.prepare(transformers.LlamaForCausalLM(config).double())
    accelerator.backward(model(input_ids=tokens_of(0), labels=tokens_of(0)).loss)
    with accelerator.gathered(model) as whole:
        made = whole.eval().generate(tokens_of(0, 3), max_new_tokens=4, do_sample=False)
    model.train()
    accelerator.backward(model(input_ids=tokens_of(0), labels=tokens_of(0)).loss)  # and divided again
    return made.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_inside_of_gathered_a_model_generates_at_any_length(world_size):
    pytest.importorskip("transformers", reason="needs Hugging Face's transformers")
    expected = run_ranks(generated, 1, SINGLE)[0]
    assert run_ranks(generated, world_size, divided(plan=None)) == [expected] * world_size


@pytest.mark.slow
def test_compiled_blocks_train_as_on_one_rank():
    expected = run_ranks(train, 1, SINGLE)[0]
    for found in run_ranks(train, 2, divided(compile={"scope": "blocks", "backend": "aot_eager"})):
        assert_same(found, expected)
