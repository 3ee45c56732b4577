"""A step costs no more collectives than by hand; counting tokens costs one scalar more."""

from __future__ import annotations

import pytest
import torch

from distrib import Accelerator
from distrib.strategies import STRATEGIES
from distrib.testing import run_ranks
from tests.contract.by_hand import BY_HAND, by_hand, counted, wide_model
from tests.contract.layouts import INSTALLED

# DeepSpeed starts slowly
by_strategy = pytest.mark.parametrize(
    "strategy",
    [pytest.param(x, marks=pytest.mark.slow if x == "deepspeed" else ()) for x in INSTALLED],
)


def with_distrib(strategy: str, accumulation: int, clip: bool, count: int | None) -> int:
    accelerator = Accelerator(strategy=strategy, cpu=True, gradient_accumulation_steps=accumulation)
    model = wide_model()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))

    def step():
        for _ in range(accumulation):
            with accelerator.accumulate(model):
                loss = model(torch.ones(2, 1000)).mean()
                accelerator.backward(loss, count=count)
                if clip:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()

    step()
    return counted(step)


def test_every_strategy_has_its_loop_by_hand():
    assert set(BY_HAND) == {name for name in STRATEGIES if "cpu" in STRATEGIES.get(name).capabilities.devices}


@by_strategy
@pytest.mark.parametrize(("accumulation", "clip"), [(1, False), (1, True), (3, True)])
def test_a_step_has_the_collectives_of_the_loop_by_hand(strategy, accumulation, clip):
    world_size = STRATEGIES.get(strategy).capabilities.max_world_size or 2
    expected = run_ranks(by_hand, world_size, strategy, accumulation, clip)
    assert run_ranks(with_distrib, world_size, strategy, accumulation, clip, None) == expected
    assert (expected[0] > 1) == (world_size > 1)


@by_strategy
@pytest.mark.parametrize("accumulation", [1, 3])
def test_counting_tokens_adds_one_collective_to_a_step(strategy, accumulation):
    world_size = STRATEGIES.get(strategy).capabilities.max_world_size or 2
    plain = run_ranks(with_distrib, world_size, strategy, accumulation, True, None)
    counting = run_ranks(with_distrib, world_size, strategy, accumulation, True, 2)
    extra = 1 if world_size > 1 else 0
    assert counting == [operations + extra for operations in plain]
