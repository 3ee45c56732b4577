"""mesh.context: ranks share sequences, and the same script trains the same model."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from distrib import Accelerator, RunConfig, StrategyError
from distrib.testing import RanksFailed, run_ranks

LENGTH, VOCABULARY, SAMPLES = 12, 23, 10
LAYOUTS = [
    ("ddp", {"context": 2}, 2),
    ("fsdp", {"context": 2}, 2),
    ("fsdp", {"context": 3, "shard": 1}, 3),
    ("ddp", {"context": 2}, 4),
    ("fsdp", {"context": 2}, 4),
    ("fsdp", {"context": 2, "replicate": 2, "shard": 1}, 4),
    ("fsdp", {"context": 2, "tensor": 2}, 4),
]


class Block(nn.Module):
    def __init__(self, width: int = 24, heads: int = 12, key_heads: int = 12, dropout: float = 0.0):
        super().__init__()
        self.width, self.key_heads = width // heads, key_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q_proj, self.o_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.k_proj, self.v_proj = (nn.Linear(width, key_heads * self.width) for _ in range(2))
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, mask=None):
        y = self.norm1(x)
        q, k, v = (
            f(y).unflatten(-1, (-1, self.width)).transpose(1, 2)
            for f in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)
        x = x + self.dropout(self.o_proj(y.transpose(1, 2).flatten(2)))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Decoder(nn.Module):
    """A model that gives its blocks a mask of some kind: none, of tokens, or one for each head."""

    def __init__(self, mask: str = "none", **options):
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, 24), nn.Embedding(LENGTH, 24)
        self.blocks = nn.ModuleList(Block(**options) for _ in range(3))
        self.norm, self.head, self.mask = nn.LayerNorm(24), nn.Linear(24, VOCABULARY), mask

    def forward(self, x):
        length = x.shape[1]
        hidden, mask = self.tokens(x) + self.places.weight[:length], None
        if self.mask != "none":
            mask = torch.ones(length, length, dtype=torch.bool).tril().expand(len(x), 1, -1, -1)
            mask = mask & (x != 0)[:, None, None, :] | torch.eye(length, dtype=torch.bool)
        if self.mask == "heads":
            mask = torch.where(mask, 0.0, float("-inf")).to(hidden.dtype).expand(-1, 12, -1, -1)
            mask = mask + torch.arange(12, dtype=hidden.dtype)[:, None, None] / 7
        for block in self.blocks:
            hidden = block(hidden, mask)
        return self.head(self.norm(hidden))


def sentences() -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, VOCABULARY, (SAMPLES, LENGTH + 1), generator=generator)


def train(settings, options, dtype=torch.float64, steps=5, length=LENGTH):
    """Train on token sums; return losses, parameters, an evaluation and whether attention was called on parts."""
    accelerator = Accelerator(RunConfig(seed=3, device="cpu", global_batch_size=4, **settings))
    torch.manual_seed(1)
    model = Decoder(**options).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loader = DataLoader(TensorDataset(sentences()[:, : length + 1]), batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses: list[float] = []
    while len(losses) < steps:
        for (batch,) in loader:
            with accelerator.accumulate(model):
                x, y = batch[:, :-1], batch[:, 1:]
                logits = model(x).float() if dtype is torch.bfloat16 else model(x)
                kept = y % 3 > 0  # sentences count differently
                loss = (F.cross_entropy(logits.transpose(1, 2), y, reduction="none") * kept).sum()
                accelerator.backward(loss, count=int(kept.sum()))
                norm = accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                losses.append(float(norm))
                if len(losses) == steps:
                    break
    model.eval()
    with torch.no_grad():  # the second length divides by nothing
        evaluated = [float(model(sentences()[:, :n]).double().logsumexp(-1).mean()) for n in (length, 7)]
    return losses, dict(accelerator.get_state_dict(model)), evaluated


def agree(found, expected, tolerance):
    for one, other in zip(found[0] + found[2], expected[0] + expected[2], strict=True):
        assert one == pytest.approx(other, rel=tolerance)
    assert found[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        torch.testing.assert_close(found[1][name], value, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("strategy", "mesh", "ranks"), LAYOUTS)
def test_every_layout_trains_as_one_process(strategy, mesh, ranks):
    found = run_ranks(train, ranks, {"strategy": strategy, "mesh": mesh}, {})
    agree(found[-1], train({}, {}), 1e-9)


@pytest.mark.parametrize(
    "options",
    [
        {"mask": "tokens"},
        {"mask": "heads"},
        {"key_heads": 6},
        {"key_heads": 1},
        {"key_heads": 4, "mask": "heads"},
    ],
    ids=str,
)
def test_masks_of_whole_sequences_and_shared_key_heads_are_right(options):
    found = run_ranks(train, 3, {"strategy": "ddp", "mesh": {"context": 3}}, options)
    agree(found[0], train({}, options), 1e-9)


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_blocks_that_run_again_in_the_backward_are_right(recompute):
    settings = {"strategy": "fsdp", "mesh": {"context": 2}, "activation_checkpointing": recompute}
    agree(run_ranks(train, 2, settings, {})[0], train({}, {}), 1e-9)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_bf16_is_near_float32(strategy):
    settings = {"strategy": strategy, "mesh": {"context": 2}, "mixed_precision": "bf16"}
    found = run_ranks(train, 2, settings, {}, dtype=torch.float32, steps=2)[0]
    expected = train({}, {}, dtype=torch.float32, steps=2)
    assert found[0] == pytest.approx(expected[0], rel=0.03)


def test_fp16_decides_on_overflows_together():
    settings = {"strategy": "fsdp", "mesh": {"context": 2}, "mixed_precision": "fp16"}
    found = run_ranks(train, 2, settings, {}, dtype=torch.float32, steps=3)
    assert found[0][0] == found[1][0]
    expected = train({"mixed_precision": "fp16"}, {}, dtype=torch.float32, steps=3)
    assert found[0][0] == pytest.approx(expected[0], rel=0.03)


def _bytes_kept(mesh):
    accelerator = Accelerator(RunConfig(seed=3, device="cpu", strategy="ddp", mesh=mesh))
    model = accelerator.prepare(Decoder())
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    block = accelerator.unwrap_model(model).blocks[1]
    contexts = []
    block.register_forward_pre_hook(
        lambda *_: (
            contexts.append(torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x))
            or contexts[0].__enter__()
        )
    )
    block.register_forward_hook(lambda *_: contexts[0].__exit__())
    model(sentences()[:, :-1])
    parameters = {x.untyped_storage().data_ptr() for x in model.parameters()}
    return sum(size for pointer, size in kept.items() if pointer not in parameters)


def test_a_block_keeps_its_share_of_the_activations():
    whole, halves = run_ranks(_bytes_kept, 2, {})[0], run_ranks(_bytes_kept, 2, {"context": 2})[0]
    assert halves < 0.56 * whole


class Other(Block):
    """Blocks whose tokens meet otherwise, or that count positions themselves."""

    how = "softmax"

    def forward(self, x, mask=None):
        if self.how == "convolution":
            return x + x.roll(1, 1) * 0.1
        if self.how == "positions":
            return super().forward(x + torch.arange(x.shape[1]).to(x.dtype)[:, None] / 50, mask)
        if self.how == "mask":
            return super().forward(x, torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril())
        scores = (self.q_proj(x) @ self.k_proj(x).mT).softmax(-1)
        return x + scores @ self.v_proj(x)


def _first_step(how, settings, length=LENGTH, heads=12):
    accelerator = Accelerator(RunConfig(seed=3, device="cpu", **settings))
    model = Decoder(heads=heads, key_heads=heads)
    if how:
        for block in model.blocks:
            block.__class__ = Other
            block.how = how
    model = accelerator.prepare(model)
    accelerator.backward(model(sentences()[:, :length]).sum())


def _error_of_first_step(*args):
    with pytest.raises(StrategyError) as refused:
        _first_step(*args)
    return str(refused.value)


@pytest.mark.parametrize(
    ("how", "strategy", "code"),
    [
        ("softmax", "ddp", "D0847"),
        ("softmax", "fsdp", "D0847"),
        ("convolution", "ddp", "D0847"),
        ("positions", "ddp", "D0847"),
        ("mask", "ddp", "D0848"),
    ],
)
def test_a_block_that_would_be_wrong_on_parts_is_named_on_every_rank_in_the_first_step(how, strategy, code):
    told = run_ranks(_error_of_first_step, 2, how, {"strategy": strategy, "mesh": {"context": 2}})
    assert all(code in each for each in told)
    assert code != "D0847" or all("blocks.0" in each for each in told)


@pytest.mark.parametrize(
    ("settings", "options", "parts"),
    [
        ({}, {"length": 11}, ("D0846", "11 tokens", "mesh.context (2)", "pad")),
        ({}, {"heads": 3}, ("D0846", "3 heads", "mesh.context (2)")),
        ({"compile": {"scope": "blocks"}}, {}, ("D0107", "compile.scope", "mesh.context")),
        ({"context_parallel": {"attention": "ring"}}, {}, ("D0849", "cuda", "ulysses")),
    ],
)
def test_what_does_not_fit_is_refused_with_its_reason(settings, options, parts):
    with pytest.raises(RanksFailed) as failed:
        run_ranks(_first_step, 2, "", {"strategy": "ddp", "mesh": {"context": 2}, **settings}, **options)
    for part in parts:
        assert part in str(failed.value)


def test_settings_of_an_axis_with_one_rank_are_refused():
    with pytest.raises(RanksFailed, match="D0107"):
        run_ranks(_first_step, 2, "", {"strategy": "ddp", "context_parallel": {"attention": "ring"}})


def _copies(_):
    accelerator = Accelerator(RunConfig(seed=3, device="cpu", strategy="ddp", mesh={"context": 2}))
    model = accelerator.prepare(Decoder())
    plain = accelerator.unwrap_model(model)
    twin = copy.deepcopy(plain)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(2)
    x = sentences()[:, :-1]
    changed = copy.deepcopy(plain)
    changed.load_state_dict(twin.state_dict())
    return float(plain(x).sum()), float(twin(x).sum()), float(changed(x).sum())


def test_a_copy_computes_with_its_own_parameters():
    plain, twin, changed = run_ranks(_copies, 2, None)[0]
    assert twin == changed
    assert twin != plain


def _encoder(settings):
    accelerator = Accelerator(RunConfig(seed=3, device="cpu", **settings))
    torch.manual_seed(2)
    layer = nn.TransformerEncoderLayer(8, 4, 16, dropout=0.0, batch_first=True, dtype=torch.float64)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    model = accelerator.prepare(model)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 6, 8, generator=generator, dtype=torch.float64)
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2, [False] * 5 + [True]])
    made = model(x, src_key_padding_mask=padding)
    accelerator.backward((made * x).sum())
    gradients = [p.grad.clone() for p in model.parameters()]
    model.eval()
    with torch.no_grad():
        return made.detach(), gradients, model(x)


def test_torchs_own_encoder_trains_and_evaluates_with_padding():
    found, expected = run_ranks(_encoder, 2, {"strategy": "ddp", "mesh": {"context": 2}})[0], _encoder({})
    for one, other in zip(
        (found[0], found[2], *found[1]), (expected[0], expected[2], *expected[1]), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def transformer(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 64,
    }  # fmt: skip
    no_dropout = {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
    model: nn.Module
    if kind.startswith("Llama"):
        how = kind.partition(" ")[2] or "sdpa"
        config = transformers.LlamaConfig(**sizes, num_key_value_heads=2, attn_implementation=how)
        model = transformers.LlamaForCausalLM(config)
    elif kind == "Qwen2":
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes, num_key_value_heads=2))
    elif kind == "GPTNeoX":
        config = transformers.GPTNeoXConfig(**sizes, hidden_dropout=0, attention_dropout=0)
        model = transformers.GPTNeoXForCausalLM(config)
    elif kind == "Bert":
        model = transformers.BertForMaskedLM(transformers.BertConfig(**sizes, **no_dropout))
    elif kind == "T5":
        config = transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
        model = transformers.T5ForConditionalGeneration(config)
    else:
        config = transformers.GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=4)
        config.update({"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0})
        model = transformers.GPT2LMHeadModel(config)
    return model.double()


def _train_transformer(settings, kind, padding):
    accelerator = Accelerator(RunConfig(seed=1, device="cpu", **settings))
    model = transformer(kind)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    generator = torch.Generator().manual_seed(3)
    found = []
    for _ in range(3):
        x = torch.randint(1, 64, (2, 16), generator=generator)
        mask = torch.ones_like(x)
        mask[0, :3] = 0 if padding else 1
        accelerator.backward(model(input_ids=x, attention_mask=mask, labels=x).loss)
        found.append(float(accelerator.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        found.append(float(model(input_ids=x, labels=x).loss))
        if kind != "Bert":
            plain = accelerator.unwrap_model(model)
            written = plain.generate(x[:, :8], max_new_tokens=5, do_sample=False, pad_token_id=0)
            found.append(float((written * torch.arange(written.shape[1])).sum()))
    return found


@pytest.mark.parametrize("padding", [False, True], ids=["whole", "padded on the left"])
@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "GPT2", "GPTNeoX", "Bert"])
def test_models_of_transformers_train_evaluate_and_write_as_in_one_process(kind, padding):
    pytest.importorskip("transformers", reason="pip install transformers")
    strategy = "ddp" if padding else "fsdp"
    found = run_ranks(_train_transformer, 2, {"strategy": strategy, "mesh": {"context": 2}}, kind, padding)
    assert found[0] == pytest.approx(_train_transformer({}, kind, padding), rel=1e-9)


@pytest.mark.parametrize(("kind", "code"), [("Llama eager", "D0847"), ("T5", "D0848")])
def test_models_of_transformers_whose_blocks_cannot_work_on_parts_are_refused(kind, code):
    pytest.importorskip("transformers", reason="pip install transformers")
    with pytest.raises(RanksFailed, match=code):
        run_ranks(_train_transformer, 2, {"strategy": "ddp", "mesh": {"context": 2}}, kind, padding=False)
