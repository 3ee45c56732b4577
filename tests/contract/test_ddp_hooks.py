"""Compressed gradients: what arrives is the average within a stated tolerance, the same on every rank and every time."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import pytest
import torch
from torch import nn

from distrib import Accelerator, RunConfig, StrategyError
from distrib.strategies import ddp_hooks
from distrib.testing import RanksFailed, run_ranks
from tests.contract.by_hand import counted, wide_model

ROUNDING = {"fp16": 2.0**-11, "bf16": 2.0**-8}  # relative error of one rounding to the nearest, at most


def started(hook="none", folder=".", **ddp) -> Accelerator:
    return Accelerator(
        RunConfig(strategy="ddp", device="cpu", seed=3, project_dir=folder, ddp={"comm_hook": hook, **ddp})
    )


def made(dtype=torch.float32, width=8) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), nn.Linear(width, 1)).to(
        dtype
    )


def batches(rank, steps, dtype=torch.float32, width=8):
    draw = torch.Generator().manual_seed(rank)
    return [torch.randn(4, width, generator=draw).to(dtype) for _ in range(steps)]


def gradients(hook, dtype=torch.float32):
    """Return the gradients of one step."""
    accelerator = started(hook)
    model = accelerator.prepare(made(dtype))
    for x in batches(accelerator.process_index, 1, dtype):
        accelerator.backward(model(x).square().mean())
    return {name: p.grad.clone() for name, p in model.module.named_parameters()}


def own_gradients(rank):
    model = made()
    model(batches(rank, 1)[0]).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("hook", ROUNDING)
@pytest.mark.parametrize("world_size", [2, 3])
def test_a_compressed_average_is_within_the_roundings_of_its_format(hook, world_size):
    shares = [own_gradients(rank) for rank in range(world_size)]
    for found in run_ranks(gradients, world_size, hook):
        for name, value in found.items():
            exact = sum(share[name].double() for share in shares) / world_size
            largest = sum(share[name].double().abs() for share in shares) / world_size
            # each share is rounded once, and so is each of the sums, of which none exceeds `largest`
            allowed = ROUNDING[hook] * largest * world_size * 1.01 + 1e-7
            assert ((value.double() - exact).abs() <= allowed).all(), name
            assert not torch.equal(value.double(), exact)


@pytest.mark.parametrize("hook", ROUNDING)
def test_a_compressed_average_is_the_same_on_every_rank_and_every_time(hook):
    first, *others = [*run_ranks(gradients, 3, hook), *run_ranks(gradients, 3, hook)]
    for found in others:
        assert all(torch.equal(found[name], first[name]) for name in first)


def trained(hook, steps=20, **ddp):
    accelerator = started(hook, **ddp)
    model = made()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.05))
    for x in batches(accelerator.process_index, steps):
        accelerator.backward((model(x) - x.sum(1, keepdim=True)).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in model.module.named_parameters()}


@pytest.mark.parametrize(("hook", "atol"), [("fp16", 2e-4), ("bf16", 2e-3)])
def test_twenty_steps_stay_near_the_run_without_compression(hook, atol):
    expected = run_ranks(trained, 2, "none")[0]
    for found in run_ranks(trained, 2, hook):
        for name, value in expected.items():
            torch.testing.assert_close(
                found[name], value, rtol=0, atol=atol
            )  # 20 steps x lr x rounding x gradient


class Parts(nn.Module):
    """float64, bfloat16 and sparse gradients beside one that is compressed."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(4, 4, sparse=True)
        self.plain, self.wide, self.low = (
            nn.Linear(4, 4),
            nn.Linear(4, 4).double(),
            nn.Linear(4, 1).bfloat16(),
        )

    def forward(self, x):
        return self.low(self.wide(self.plain(self.embed(x)).double()).bfloat16())


def of_several_formats(hook):
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        accelerator = started(hook)
        model = accelerator.prepare(Parts())
        accelerator.prepare(Parts())
    accelerator.backward(model(torch.tensor([0, accelerator.process_index])).float().square().sum())
    found = {name: p.grad for name, p in model.module.named_parameters()}
    return {name: x.to_dense() if x.is_sparse else x for name, x in found.items()}, said.getvalue()


@pytest.mark.parametrize("hook", ROUNDING)
def test_only_dense_float32_gradients_are_compressed_and_the_others_are_named_once(hook):
    for rank, ((found, said), (true, _)) in enumerate(
        zip(run_ranks(of_several_formats, 2, hook), run_ranks(of_several_formats, 2, "none"), strict=True)
    ):
        changed = {name for name in found if not torch.equal(found[name], true[name])}
        assert changed <= {"plain.weight", "plain.bias"}
        assert "plain.weight" in changed
        names = "embed.weight, wide.weight, wide.bias, low.weight, low.bias"
        notice = f"ddp.comm_hook {hook}: only dense float32 gradients are compressed, not those of {names}"
        assert said.count(notice) == (rank == 0)


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.used, self.unused = nn.Linear(8, 1), nn.Linear(8, 1)

    def forward(self, x):
        return self.used(x)


def with_unused(hook):
    accelerator = started(hook)
    model = Unused()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    for x in batches(accelerator.process_index, 3):
        accelerator.backward(model(x).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    return {
        name: p.detach().clone() for name, p in model.module.named_parameters()
    }, model.find_unused_parameters


@pytest.mark.parametrize("hook", ROUNDING)
def test_compression_goes_on_when_auto_looks_for_unused_parameters(hook):
    before = Unused().state_dict()
    true = run_ranks(with_unused, 2, "none")[0][0]
    for found, looks in run_ranks(with_unused, 2, hook):
        assert looks
        assert torch.equal(found["unused.weight"], before["unused.weight"])
        assert not torch.equal(found["used.weight"], true["used.weight"])


def operations(hook):
    accelerator = started(hook)
    model = wide_model()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))

    def step():
        accelerator.backward(model(torch.ones(2, 1000)).mean())
        optimizer.step()
        optimizer.zero_grad()

    step()
    return counted(step)


def test_compression_costs_no_more_operations():
    plain, compressed = run_ranks(operations, 2, "none"), run_ranks(operations, 2, "bf16")
    assert plain == compressed
    assert plain[0] > 1


# PowerSGD


def power_sgd(steps, folder=None, start=3, load=None, save=None, hook="powersgd", width=16):
    """Train; return the gradients of each step, its step counter, and whether it holds what it left out."""
    ddp_hooks.POWERSGD_START = start
    accelerator = started(hook, folder or ".")
    model = made(width=width)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.05))
    if load:
        accelerator.load_state(Path(folder) / load)
    found = []
    for x in batches(accelerator.process_index, steps, width=width):
        accelerator.backward((model(x) - x.sum(1, keepdim=True)).square().mean())
        found.append(model.module[0].weight.grad.clone())
        optimizer.step()
        optimizer.zero_grad()
    if save:
        accelerator.save_state(Path(folder) / save)
    state = accelerator._strategy._power_sgd.get(model)
    return found, state and state.iter, bool(state and state.error_dict)


def ranks_of(matrices):
    return [int(torch.linalg.matrix_rank(x.double(), rtol=1e-5)) for x in matrices]


def test_powersgd_averages_in_full_at_first_and_by_matrices_of_rank_1_then():
    plain, _, _ = run_ranks(power_sgd, 2, 6, hook="none")[0]
    first, second = run_ranks(power_sgd, 2, 6)
    for gradients_, steps, _ in (first, second):
        assert steps == 6
        assert ranks_of(gradients_[3:]) == [1, 1, 1]
        for found, true in zip(gradients_[:3], plain[:3], strict=True):
            torch.testing.assert_close(found, true, rtol=1e-6, atol=1e-6)  # divided before it is added up
    assert min(ranks_of(plain)) > 1
    assert all(torch.equal(x, y) for x, y in zip(first[0], second[0], strict=True))


def test_powersgd_goes_on_at_its_step_after_a_resume_with_two_steps_in_full(tmp_path):
    run_ranks(power_sgd, 2, 5, tmp_path, save="s")
    for found, steps, holds in run_ranks(power_sgd, 2, 4, tmp_path, load="s"):
        assert [rank > 1 for rank in ranks_of(found)] == [True, True, False, False]
        assert steps == 9
        assert holds


def test_powersgd_stays_in_full_after_a_resume_before_its_start(tmp_path):
    run_ranks(power_sgd, 2, 2, tmp_path, start=9, save="s")
    for found, steps, holds in run_ranks(power_sgd, 2, 4, tmp_path, start=9, load="s"):
        assert min(ranks_of(found)) > 1
        assert steps == 6
        assert not holds


@pytest.mark.parametrize(("before", "after"), [("powersgd", "none"), ("none", "powersgd")])
def test_a_checkpoint_fits_with_and_without_powersgd(tmp_path, before, after):
    run_ranks(power_sgd, 2, 4, tmp_path, save="s", hook=before)
    for found, steps, _ in run_ranks(power_sgd, 2, 2, tmp_path, load="s", hook=after):
        assert min(ranks_of(found)) > 1
        assert steps == (2 if after == "powersgd" else None)


def gradients_of_zero():
    ddp_hooks.POWERSGD_START = 2
    accelerator = started("powersgd")
    model = accelerator.prepare(made())
    for x in batches(accelerator.process_index, 5):
        model.zero_grad()
        accelerator.backward(model(x).square().mean() * 0)
    return all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters())


def test_powersgd_leaves_a_gradient_of_zeros_zero():
    assert run_ranks(gradients_of_zero, 2) == [True, True]


def many_buckets():
    ddp_hooks.POWERSGD_START = 2
    accelerator = started("powersgd")
    model = wide_model()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.01))
    for _ in range(6):
        accelerator.backward(model(torch.ones(2, 1000) * (1 + accelerator.process_index)).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    mine = torch.stack([p.detach().double().sum() for p in model.parameters()])
    everyone = accelerator.gather(mine[None])
    return all(torch.equal(x, mine) for x in everyone)


def test_powersgd_keeps_the_order_of_many_buckets():
    assert run_ranks(many_buckets, 2) == [True, True]


def test_powersgd_refuses_sparse_gradients():
    with pytest.raises(RanksFailed, match=r"(?s)D0809.*sparse gradients of embed\n.*sparse=False"):
        run_ranks(of_several_formats, 2, "powersgd")


def alone():
    accelerator = started("powersgd")
    model = accelerator.prepare(Parts())
    try:
        return type(model).__name__
    except StrategyError as error:
        return str(error)


def test_one_process_has_nothing_to_compress():
    assert run_ranks(alone, 1) == ["Parts"]
