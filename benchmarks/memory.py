"""What a rank holds, and what training takes at its peak, in every layout of one decoder on 2 ranks; raw is one process."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import MEGA, OURS, RAW, Row, give_back_memory, peak_mb, quiet, resident_mb
from distrib.testing import run_ranks

WIDTH, LAYERS, HEADS, TOKENS, BATCH, VOCABULARY = 512, 8, 8, 512, 4, 256  # 25 M parameters
LAYOUTS: dict[str, dict[str, Any]] = {
    "ddp": {"strategy": "ddp"},
    "fsdp, gradients only": {"strategy": "fsdp", "fsdp": {"reshard_after_forward": False}},
    "fsdp": {"strategy": "fsdp"},
    "fsdp, activation_checkpointing full": {"strategy": "fsdp", "activation_checkpointing": "full"},
    "fsdp, mesh.context 2": {"strategy": "fsdp", "mesh": {"context": 2}},
    "fsdp, mesh.tensor 2": {"strategy": "fsdp", "mesh": {"tensor": 2}},
    "fsdp, mesh.tensor 2, sequence": {
        "strategy": "fsdp",
        "mesh": {"tensor": 2},
        "tensor_parallel": {"sequence": True},
    },
}


class Block(nn.Module):
    """A decoder's: attention and a wide layer, each added to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.mlp = Mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Attention(nn.Module):
    """Causal, over heads."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            f(x).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2)
            for f in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers around a non-linearity."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Decoder(nn.Module):
    """Reads bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(TOKENS, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(LAYERS)])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.tokens(x) + self.places.weight
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(self.norm(hidden))


def run() -> list[Row]:
    alone = run_ranks(megabytes, 1, {"strategy": "single"})[0]
    rows = []
    for name, settings in LAYOUTS.items():
        held, peak = run_ranks(megabytes, 2, settings, timeout_s=300)[0]
        rows.append(Row(f"{name}: held", "MB", {RAW: [alone[0]], OURS: [held]}))
        rows.append(Row(f"{name}: peak in a step", "MB", {RAW: [alone[1]], OURS: [peak]}))
    return rows


def megabytes(settings: dict[str, Any]) -> tuple[float, float]:
    """Return the size of parameters and optimizer state, counted, and how far a step takes memory above what it was before.

    All layouts take the same global batch: ranks that read different samples have half of it each.
    """
    from distrib import Accelerator, RunConfig

    with quiet():
        accelerator = Accelerator(RunConfig(device="cpu", seed=0, **settings))
        give_back_memory()
        before = resident_mb()
        model = Decoder()
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
        rows = BATCH // accelerator.mesh.data_parallel_size
        x = torch.randint(VOCABULARY, (rows, TOKENS), generator=torch.Generator().manual_seed(0))

        def step() -> None:
            logits = model(x)
            accelerator.backward(F.cross_entropy(logits.transpose(1, 2), x))
            optimizer.step()
            optimizer.zero_grad()

        step()
        peak = peak_mb(step, above=before)
    states = [x for values in optimizer.state.values() for x in values.values() if isinstance(x, Tensor)]
    return sum(map(_own_bytes, [*model.parameters(), *states])) / MEGA, peak


def _own_bytes(tensor: Any) -> int:
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.nbytes
