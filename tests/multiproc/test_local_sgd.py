"""Ranks that step by themselves, and averages of models."""

from __future__ import annotations

from functools import partial

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


PAPER = partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)


def train_with_outer_steps(
    strategy: str, outer, folder: str | None = None, start: int = 0, stop: int = 7
) -> dict:
    """Train from one step to another, two local steps a round; save where ranks agree, and go on from there."""
    accelerator = Accelerator(RunConfig(strategy=strategy, device="cpu", seed=1, project_dir=folder or "."))
    model = model_of()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    local = LocalSGD(accelerator, model, local_sgd_steps=2, outer_optimizer=outer)
    accelerator.register_for_checkpointing(local)
    if start:
        accelerator.load_state()
    with local:
        for step in range(start, stop):
            accelerator.backward(model(batch(step, accelerator.process_index)).square().mean())
            optimizer.step()
            optimizer.zero_grad()
            local.step()
            if folder and not start and local.in_sync:
                accelerator.save_state()
    accelerator.check_in_sync(model)
    return {name: x.clone() for name, x in accelerator.get_state_dict(model).items()}


def outer_steps_by_hand(ranks: int, steps: int, lr: float, momentum: float) -> dict:
    """SGD with Nesterov momentum, spelled out, on what `ranks` models have changed since they last agreed."""
    models = [model_of() for _ in range(ranks)]
    agreed = [x.detach().clone() for x in models[0].parameters()]
    velocity = [torch.zeros_like(x) for x in agreed]
    for step in range(steps):
        for rank, model in enumerate(models):
            model.zero_grad()
            model(batch(step, rank)).square().mean().backward()
            torch.optim.SGD(model.parameters(), lr=0.1).step()
        if step % 2 == 1 or step == steps - 1:
            with torch.no_grad():
                for i, parts in enumerate(zip(*(model.parameters() for model in models), strict=True)):
                    change = agreed[i] - sum(parts) / ranks
                    velocity[i] = momentum * velocity[i] + change
                    agreed[i] = agreed[i] - lr * (change + momentum * velocity[i])
                    for part in parts:
                        part.copy_(agreed[i])
    return models[0].state_dict()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_an_outer_optimizer_steps_by_the_averaged_change(world_size):
    expected = outer_steps_by_hand(world_size, 7, lr=0.7, momentum=0.9)
    strategy = "ddp" if world_size > 1 else "single"
    for found in run_ranks(train_with_outer_steps, world_size, strategy, PAPER):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-14)


def test_an_outer_step_of_the_whole_change_is_the_average():
    (averaged, _), (stepped, _) = (
        run_ranks(train_with_outer_steps, 2, "ddp", outer)
        for outer in (None, partial(torch.optim.SGD, lr=1.0, momentum=0.0))
    )
    for name, value in averaged.items():
        torch.testing.assert_close(stepped[name], value, rtol=1e-12, atol=1e-14)


def test_a_run_with_an_outer_optimizer_goes_on_from_a_checkpoint(tmp_path):
    whole = run_ranks(train_with_outer_steps, 2, "ddp", PAPER)[0]
    run_ranks(train_with_outer_steps, 2, "ddp", PAPER, str(tmp_path), 0, 5)  # the last save is after step 4
    resumed = run_ranks(train_with_outer_steps, 2, "ddp", PAPER, str(tmp_path), 4)[0]
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


def given_an_optimizer() -> None:
    accelerator = Accelerator(RunConfig(device="cpu"))
    model = accelerator.prepare(nn.Linear(3, 2))
    LocalSGD(accelerator, model, 2, outer_optimizer=torch.optim.SGD(model.parameters(), lr=0.7))


def test_an_outer_optimizer_that_is_made_already_is_refused():
    with pytest.raises(Exception, match=r"(?s)D0858.*is a SGD; expected a function"):
        run_ranks(given_an_optimizer, 1)


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
