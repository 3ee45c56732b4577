"""Ranks that step by themselves, and averages of models."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from distrib import Accelerator, LocalSGD, RunConfig
from distrib.testing import run_ranks


def batch(step: int, rank: int) -> torch.Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(10 * step + rank), dtype=torch.float64)


def model_of() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2).double()


def train_locally(strategy: str, enabled: bool, accumulation: int) -> tuple[list[bool], dict]:
    accelerator = Accelerator(
        RunConfig(strategy=strategy, device="cpu", seed=1, gradient_accumulation_steps=accumulation)
    )
    model = model_of()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    together = []
    with LocalSGD(accelerator, model, local_sgd_steps=2, enabled=enabled) as local:
        for step in range(5 * accumulation):
            with accelerator.accumulate(model):
                accelerator.backward(model(batch(step, accelerator.process_index)).square().mean())
                optimizer.step()
                optimizer.zero_grad()
                local.step()
            if accelerator.sync_gradients:
                weights = accelerator.gather(accelerator.unwrap_model(model).weight.detach()[None])
                together.append(bool((weights == weights[0]).all()))
    accelerator.check_in_sync(model)
    return together, {name: x.clone() for name, x in accelerator.get_state_dict(model).items()}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_parameters_part_and_are_averaged_every_few_steps_and_at_the_end(accumulation):
    models = [model_of() for _ in range(2)]
    for step in range(5):
        for rank, model in enumerate(models):
            model.zero_grad()
            for micro in range(accumulation):
                loss = model(batch(step * accumulation + micro, rank)).square().mean() / accumulation
                loss.backward()
            torch.optim.SGD(model.parameters(), lr=0.1).step()
        if step in (1, 3, 4):
            with torch.no_grad():
                for a, b in zip(*(model.parameters() for model in models), strict=True):
                    mean = (a + b) / 2
                    a.copy_(mean)
                    b.copy_(mean)
    for together, state in run_ranks(train_locally, 2, "ddp", True, accumulation):
        assert together == [False, True, False, True, False]
        for name, value in models[0].state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=1e-12, atol=1e-14)


def test_switched_off_it_trains_as_without_it():
    assert run_ranks(train_locally, 2, "ddp", False, 1)[0][0] == [True] * 5
    assert run_ranks(train_locally, 1, "single", True, 1)[0][0] == [True] * 5


def refused(settings: dict, steps: int) -> None:
    accelerator = Accelerator(RunConfig(device="cpu", **settings))
    LocalSGD(accelerator, accelerator.prepare(nn.Linear(3, 2)), steps)


@pytest.mark.parametrize(
    ("settings", "steps", "words"),
    [
        ({"strategy": "fsdp"}, 2, "divides parameters"),
        ({"mixed_precision": "fp16"}, 2, "one loss scale"),
        ({}, 0, "expected at least 1"),
    ],
)
def test_what_cannot_step_alone_is_refused(settings, steps, words):
    with pytest.raises(Exception, match=f"(?s)D0840.*{words}"):
        run_ranks(refused, 2, settings, steps)


def averaged(strategy: str, folder: str) -> tuple[dict, dict]:
    """Return an exponential average after four steps, and after it was saved, spoiled and loaded."""
    accelerator = Accelerator(RunConfig(strategy=strategy, device="cpu", seed=1, project_dir=folder))
    model = model_of()
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    model, ema, optimizer = accelerator.prepare(model, ema, torch.optim.SGD(model.parameters(), lr=0.1))
    for step in range(4):
        accelerator.backward(model(batch(step, 0)).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        ema.update_parameters(model)
    found = {name: x.clone() for name, x in accelerator.get_state_dict(ema).items()}
    accelerator.save_state()
    ema.update_parameters(model)
    accelerator.load_state()
    return found, {name: x.clone() for name, x in accelerator.get_state_dict(ema).items()}


@pytest.mark.parametrize(("strategy", "world_size"), [("single", 1), ("ddp", 2), ("fsdp", 2)])
def test_an_average_of_a_model_is_prepared_sharded_and_in_checkpoints(strategy, world_size, tmp_path):
    model = model_of()
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(4):
        optimizer.zero_grad()
        model(batch(step, 0)).square().mean().backward()
        optimizer.step()
        ema.update_parameters(model)
    for found, loaded in run_ranks(averaged, world_size, strategy, str(tmp_path)):
        for name, value in ema.state_dict().items():
            torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-14, msg=name)
            assert torch.equal(loaded[name], found[name])
