"""The truth: a plain single-process loop over the same global batches, and the model and data that all contract tests share."""

from __future__ import annotations

import hashlib

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

FEATURES, CLASSES = 6, 3


class Samples(Dataset):
    """n samples; item i is (i, features, target), a function of i alone."""

    def __init__(self, n: int, dtype: torch.dtype = torch.float64):
        generator = torch.Generator().manual_seed(n)
        self.x = torch.randn(n, FEATURES, generator=generator, dtype=torch.float64).to(dtype)
        self.y = torch.randint(CLASSES, (n,), generator=generator)
        self.tokens = torch.randint(1, 8, (n,), generator=generator)

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        return {"id": i, "x": self.x[i], "y": self.y[i], "tokens": self.tokens[i]}


def make_model(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, CLASSES)).to(dtype)


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.05)


def per_sample_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def global_batches(n: int, size: int, epochs: int, order_of_epoch, *, drop: bool = False):
    for epoch in range(epochs):
        order = order_of_epoch(epoch)
        for start in range(0, n, size):
            if not drop or start + size <= n:
                yield order[start : start + size]


def train_plainly(
    n, size, steps, order_of_epoch, *, counted=False, clip=None, dtype=torch.float64, drop=False
):
    """Return the parameters and losses after `steps` steps, each on one whole global batch."""
    data, model = Samples(n, dtype), make_model(dtype)
    optimizer = make_optimizer(model)
    losses, taken = [], []
    for indices in global_batches(n, size, 10**6, order_of_epoch, drop=drop):
        if len(losses) == steps:
            break
        batch = torch.utils.data.default_collate([data[i] for i in indices])
        losses_of = per_sample_loss(model, batch)
        weights = batch["tokens"].to(dtype) if counted else torch.ones_like(losses_of)
        loss = (losses_of * weights).sum() / weights.sum()
        optimizer.zero_grad()
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        losses.append(loss.item())
        taken.append(sorted(indices))
    return {name: value.detach().clone() for name, value in model.state_dict().items()}, losses, taken


def loader_for(n, micro, *, shuffle=False, dtype=torch.float64, **options):
    return DataLoader(Samples(n, dtype), batch_size=micro, shuffle=shuffle, **options)


def digest(ids) -> str:
    return hashlib.sha256(repr(ids).encode()).hexdigest()
