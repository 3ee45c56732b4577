"""The distributed counterpart of `plain`: runs inside the ranks."""

from __future__ import annotations

import torch

from distrib import Accelerator, RunConfig
from distrib.data.order import Permutation
from distrib.seeding import derive
from tests.contract.layouts import settings_of
from tests.contract.plain import loader_for, make_model, make_optimizer, per_sample_loss


def shuffled_order(n: int, seed: int):
    import numpy as np

    return lambda epoch: Permutation(n, derive(seed, "order", epoch))(np.arange(n)).tolist()


def train(
    layout, n, micro, accumulation, steps, *, counted=False, clip=None, shuffle=False, tail="exact",
    dtype=torch.float64, workers=0, global_batch=None, zero_grad="end", seed=11, device="cpu",
):  # fmt: skip
    """Train for `steps` optimizer steps; return (parameters, losses of global batches, ids per step).

    `layout` is one of `layouts`, or settings.
    """
    options = (
        {"global_batch_size": global_batch} if global_batch else {"gradient_accumulation_steps": accumulation}
    )
    settings = settings_of(layout) if isinstance(layout, str) else layout
    accelerator = Accelerator(RunConfig(seed=seed, device=device, **settings, **options))
    model = make_model(dtype)
    loader = loader_for(n, micro, shuffle=shuffle, dtype=dtype, num_workers=workers, drop_last=tail == "drop")
    model, optimizer, loader = accelerator.prepare(model, make_optimizer(model), loader)
    losses, ids, window_losses, window_ids = [], [], [], []
    while len(losses) < steps:
        for batch in loader:
            with accelerator.accumulate(model):
                if zero_grad == "start":
                    optimizer.zero_grad()
                rows = per_sample_loss(model, batch)
                tokens = batch["tokens"].to(dtype)
                if counted:
                    accelerator.backward((rows * tokens).sum(), count=int(batch["tokens"].sum()))
                else:
                    accelerator.backward(rows.mean())
                if clip is not None:
                    accelerator.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                if zero_grad == "end":
                    optimizer.zero_grad()
            weight = tokens if counted else torch.ones_like(tokens)
            found = accelerator.gather_for_metrics(
                {"id": batch["id"], "loss": (rows * weight).detach(), "w": weight}
            )
            window_ids += found["id"].tolist()
            window_losses.append((found["loss"].sum(), found["w"].sum()))
            if accelerator.sync_gradients:
                total, weights = (sum(x) for x in zip(*window_losses, strict=True))
                losses.append(float(total / weights))
                ids.append(sorted(window_ids))
                window_losses, window_ids = [], []
                if len(losses) == steps:
                    break
    return (
        {name: value.detach().clone() for name, value in accelerator.get_state_dict(model).items()},
        losses,
        ids,
    )
