"""Two networks in one loop: each optimizer steps with its own gradients, wherever `zero_grad` stands."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from distrib import Accelerator
from distrib.testing import ranks

GLOBAL, SAMPLES = 12, 30  # two whole global batches, and one of six samples
ORDERS = ["each before its own loss", "all first", "all last"]


def networks() -> tuple[nn.Module, nn.Module, Any, Any]:
    torch.manual_seed(0)
    generator, critic = nn.Linear(2, 2).double(), nn.Linear(2, 1).double()
    return (
        generator,
        critic,
        torch.optim.SGD(generator.parameters(), lr=0.1, momentum=0.9),
        torch.optim.Adam(critic.parameters(), lr=0.01),
    )


def samples() -> Tensor:
    return torch.randn(SAMPLES, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def critic_loss(generator: Any, critic: Any, x: Tensor) -> Tensor:
    return (critic(generator(x).detach()) - critic(x)).square().mean(dim=1)


def generator_loss(generator: Any, x: Tensor) -> Tensor:
    return (generator(x) - x.flip(1)).square().mean(dim=1)


def by_hand() -> list[Tensor]:
    generator, critic, g_opt, c_opt = networks()
    for x in samples().split(GLOBAL):
        c_opt.zero_grad()
        critic_loss(generator, critic, x).mean().backward()
        c_opt.step()
        g_opt.zero_grad()
        generator_loss(generator, x).mean().backward()
        g_opt.step()
    return [*generator.parameters(), *critic.parameters()]


def with_distrib(order: str, accumulation: int, *, counts: bool, scopes: bool) -> list[Tensor]:
    accelerator = Accelerator(cpu=True, seed=0, gradient_accumulation_steps=accumulation)
    generator, critic, g_opt, c_opt = networks()
    loader = DataLoader(TensorDataset(samples()), GLOBAL // accumulation // accelerator.num_processes)
    generator, critic, g_opt, c_opt, loader = accelerator.prepare(generator, critic, g_opt, c_opt, loader)

    def backward(losses: Tensor) -> None:
        if counts:
            accelerator.backward(losses.sum(), count=len(losses) if accelerator.sample_mask.all() else 0)
        else:
            accelerator.backward(losses.mean())

    def critic_part(x: Tensor) -> None:
        if order == ORDERS[0]:
            c_opt.zero_grad()
        backward(critic_loss(generator, critic, x))
        c_opt.step()

    def generator_part(x: Tensor) -> None:
        if order == ORDERS[0]:
            g_opt.zero_grad()
        backward(generator_loss(generator, x))
        g_opt.step()

    def clear(when: str) -> None:
        if order == when:
            c_opt.zero_grad()
            g_opt.zero_grad()

    for (x,) in loader:
        clear("all first")
        if scopes:
            with accelerator.accumulate(critic):
                critic_part(x)
            with accelerator.accumulate(generator):
                generator_part(x)
        else:
            with accelerator.accumulate(generator, critic):
                critic_part(x)
                generator_part(x)
        clear("all last")
    models = [accelerator.unwrap_model(model) for model in (generator, critic)]
    return [parameter for model in models for parameter in model.parameters()]


@pytest.mark.parametrize("scopes", [False, True], ids=["one scope", "two scopes"])
@pytest.mark.parametrize("order", ORDERS)
@ranks(1, 2)
def test_two_networks_train_as_by_hand_with_a_window_each(order: str, scopes: bool):
    for accumulation in (1, 2, 3):
        for counts in (False, True):
            found = with_distrib(order, accumulation, counts=counts, scopes=scopes)
            for mine, expected in zip(found, by_hand(), strict=True):
                torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)
