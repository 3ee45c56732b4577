"""Training in fp16: one scale for all ranks, steps that all skip or all take, gradients as in float32."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from distrib import Accelerator
from distrib.errors import StrategyError, TrainingError
from distrib.testing import ranks, run_ranks


def prepared(accumulation=1, **options):
    accelerator = Accelerator(
        cpu=True, mixed_precision="fp16", seed=0, gradient_accumulation_steps=accumulation, **options
    )
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    return accelerator, *accelerator.prepare(model, optimizer, schedule)


def inputs(rank: int = 0) -> torch.Tensor:
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(rank))


def weights(model) -> list[float]:
    return torch.cat([x.detach().flatten() for x in model.parameters()]).tolist()


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("counted", [False, True])
@ranks(1, 2, 3)
def test_an_overflow_on_one_rank_skips_the_step_on_all(bad: float, counted: bool):
    accelerator, model, optimizer, schedule = prepared()
    last = accelerator.num_processes - 1
    before, scale = weights(model), accelerator.scaler.scale
    for factor in (bad if accelerator.process_index == last else 1.0, 1.0):
        rows = model(inputs(accelerator.process_index)).square() * factor
        if counted:
            accelerator.backward(rows.sum(), count=8)
        else:
            accelerator.backward(rows.mean())
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if optimizer.num_steps == 0:
            assert accelerator.optimizer_step_was_skipped
            assert weights(model) == before
            assert accelerator.scaler.scale == scale / 2
            assert optimizer.param_groups[0]["lr"] == 0.1
    assert not accelerator.optimizer_step_was_skipped
    assert optimizer.num_steps == 1
    assert optimizer.param_groups[0]["lr"] == 0.05
    everyone = accelerator.gather_object((weights(model), accelerator.scaler.scale))
    assert all(each == everyone[0] for each in everyone)
    assert weights(model) != before


@pytest.mark.parametrize("at", [0, 2])
@ranks(2)
def test_an_overflow_in_one_micro_step_skips_the_whole_window(at: int):
    accelerator, model, optimizer, _ = prepared(accumulation=3)
    before = weights(model)
    for window in range(2):
        for micro_step in range(3):
            with accelerator.accumulate(model):
                loss = model(inputs(micro_step)).square().mean()
                overflows = (window, micro_step, accelerator.process_index) == (0, at, 1)
                accelerator.backward(loss * (float("inf") if overflows else 1.0))
                optimizer.step()
                optimizer.zero_grad()
        assert (weights(model) == before) == (window == 0)
    assert optimizer.num_steps == 1


@ranks(1, 2)
def test_ten_steps_without_finite_gradients_are_an_error_that_names_step_and_parameter():
    accelerator, model, optimizer, _ = prepared()
    for x in [inputs()] * 3:
        accelerator.backward(model(x).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    with pytest.raises(
        TrainingError, match=r"(?s)D0606.*last 10 steps.*step 4 was not taken.*\d\.(weight|bias)"
    ):
        for _ in range(10):
            accelerator.backward((model(inputs()) * float("nan")).mean())
            optimizer.step()
            optimizer.zero_grad()
    assert all(map(torch.isfinite, map(torch.tensor, weights(model))))


def norms(precision: str, accumulation: int, counted: bool) -> list[float]:
    accelerator = Accelerator(
        cpu=True, mixed_precision=precision, seed=0, gradient_accumulation_steps=accumulation
    )
    if accelerator.scaler is not None:
        accelerator.scaler.scale = 64.0  # no overflow
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loader = DataLoader(TensorDataset(inputs(0), inputs(1)), batch_size=1)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    found = []
    for x, y in loader:
        with accelerator.accumulate(model):
            rows = (model(x) - y.sum(1, keepdim=True)).square()
            if counted:
                accelerator.backward(rows.sum(), count=len(rows))
            else:
                accelerator.backward(rows.mean())
            if accelerator.sync_gradients:
                found.append(float(accelerator.clip_grad_norm_(model.parameters(), 0.5)))
                gradients = (
                    accelerator.unwrap_model(model).weight.grad,
                    accelerator.unwrap_model(model).bias.grad,
                )
                found.append(float(torch.cat([g.flatten() for g in gradients]).norm()))
            optimizer.step()
            optimizer.zero_grad()
    return found


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 1), (1, 3), (2, 2)])
def test_norms_are_those_of_float32_whatever_the_scale(world_size: int, accumulation: int, counted: bool):
    expected = run_ranks(norms, 1, "no", world_size * accumulation, counted)[0]
    for found in run_ranks(norms, world_size, "fp16", accumulation, counted):
        assert found == pytest.approx(expected, rel=5e-3)


@ranks(2)
def test_two_optimizers_skip_on_their_own():
    accelerator = Accelerator(cpu=True, mixed_precision="fp16", seed=0)
    good, bad = nn.Linear(4, 1), nn.Linear(4, 1)
    optimizers = [torch.optim.SGD(x.parameters(), lr=0.1) for x in (good, bad)]
    good, bad, of_good, of_bad = accelerator.prepare(good, bad, *optimizers)
    for model, optimizer, factor in ((bad, of_bad, float("inf")), (good, of_good, 1.0)):
        accelerator.backward(model(inputs()).mean() * factor)
        optimizer.step()
        optimizer.zero_grad()
    assert (of_bad.num_steps, of_good.num_steps) == (0, 1)


@ranks(1, 2)
def test_half_precision_parameters_cannot_be_trained_with_a_loss_scale():
    accelerator = Accelerator(cpu=True, mixed_precision="fp16")
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1).half())
    with pytest.raises(StrategyError, match=r"D0814.*1\.weight"):
        accelerator.prepare(model)


def scales(folder: str, stop: int | None) -> list[tuple[float, list[float]]]:
    accelerator, model, optimizer, schedule = prepared(project_dir=folder)
    loader = accelerator.prepare(DataLoader(TensorDataset(torch.arange(12.0)), batch_size=1))
    accelerator.load_state()
    found = []
    for number, (x,) in enumerate(loader):
        bad = float(x[0]) in (2.0, 3.0, 9.0)
        accelerator.backward(model(inputs()).mean() * (float("inf") if bad else 1.0))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        found.append((accelerator.scaler.scale, weights(model)))
        if number == stop:
            accelerator.save_state()
            break
    return found


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_resume_goes_on_with_scale_and_weights_bitwise(tmp_path, world_size: int):
    whole = run_ranks(scales, world_size, str(tmp_path / "whole"), None)[0]
    first = run_ranks(scales, world_size, str(tmp_path / "parts"), 3)[0]
    rest = run_ranks(scales, world_size, str(tmp_path / "parts"), None)[0]
    assert first + rest == whole
