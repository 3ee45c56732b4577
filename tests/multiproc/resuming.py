"""A training run that can be killed and resumed, for tests: every sample id and loss it saw goes to a file per rank."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import torch
from torch import nn

from distrib import Accelerator
from tests.contract.plain import loader_for, make_optimizer, per_sample_loss


class Counter:
    """A user's own object."""

    def __init__(self):
        self.seen = 0

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


def make_model(dropout: float, dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 3)).to(dtype)


def run(
    folder: Path, stop: int, *, save_at: tuple[int, ...] = (), kill_at: int | None = None, n=53, micro=2,
    global_batch=None, accumulation=None, workers=0, dropout=0.0, dtype=torch.float64, save_first=False,
):  # fmt: skip
    """Train up to optimizer step `stop`; return (first step, [(step, ids, loss)], parameters, counter)."""
    accelerator = Accelerator(
        seed=7,
        cpu=True,
        project_dir=folder,
        global_batch_size=global_batch,
        gradient_accumulation_steps=accumulation,
    )
    model = make_model(dropout, dtype)
    optimizer = make_optimizer(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5, gamma=0.5)
    loader = loader_for(n, micro, shuffle=True, dtype=dtype, num_workers=workers)
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
    counter = Counter()
    accelerator.register_for_checkpointing(counter)
    accelerator.load_state()
    step = first = optimizer.num_steps
    history, ids, losses = [], [], []
    while step < stop:
        for batch in loader:
            with accelerator.accumulate(model):
                rows = per_sample_loss(model, batch)
                accelerator.backward(rows.mean())
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            found = accelerator.gather_for_metrics({"id": batch["id"], "loss": rows.detach()})
            ids += found["id"].tolist()
            losses += found["loss"].tolist()
            if not accelerator.sync_gradients:
                continue
            step += 1
            counter.seen += len(ids)
            history.append((step, sorted(ids), sum(losses) / len(losses), optimizer.param_groups[0]["lr"]))
            ids, losses = [], []
            if step in save_at:
                accelerator.save_state()
            if step == kill_at and accelerator.is_last_process:
                (folder / "killed.json").write_text(json.dumps(history))
                os.kill(os.getpid(), signal.SIGKILL)
            if step == stop:
                break
    plain = accelerator.unwrap_model(model)
    return first, history, {name: x.clone() for name, x in plain.state_dict().items()}, counter.seen
