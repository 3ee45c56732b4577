"""DeepSpeed's stages with this library's semantics: several engines, windows, gradients, precision, whole parameters.

A rank takes seconds to start DeepSpeed, so each stage runs once, looks at everything, and the tests ask what it saw.
"""

from __future__ import annotations

import functools
import subprocess
import sys
import warnings
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distrib import Accelerator, RunConfig, StrategyError
from distrib.testing import run_ranks

if find_spec("deepspeed") is None:  # importing it here would come before the environment that distrib sets
    pytest.skip("pip install deepspeed==0.19.8", allow_module_level=True)

STAGES = (0, 1, 2, 3)
RANKS = 2
at_every_stage = pytest.mark.parametrize("stage", STAGES)
CLOSE = {"rtol": 0.0, "atol": 2e-6}  # float32, whose sums run in another order


class Net(nn.Module):
    """Tied weights, a buffer, a frozen parameter, a layer that is never used; no size divides by the ranks."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(13, 7)
        self.layers = nn.ModuleList([nn.Linear(7, 7) for _ in range(2)])
        self.norm = nn.LayerNorm(7)
        self.norm.bias.requires_grad_(False)
        self.head = nn.Linear(7, 13, bias=False)
        self.head.weight = self.embedding.weight
        self.unused = nn.Linear(3, 1)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 7))

    def forward(self, tokens):
        h = self.embedding(tokens) * self.scale
        for layer in self.layers:
            h = h + torch.tanh(layer(h))
        return self.head(self.norm(h))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def tokens(rank: int) -> torch.Tensor:
    return torch.arange(6).view(2, 3) * (rank + 2) % 13


def loss_of(model: nn.Module, rank: int, weight: float = 1.0) -> torch.Tensor:
    return nn.functional.cross_entropy(model(tokens(rank)).flatten(0, 1), tokens(rank).flatten()) * weight


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD((x for x in model.parameters() if x.requires_grad), lr=0.5, momentum=0.9)


def started(stage: int, model: nn.Module | None = None, **settings: Any) -> tuple[Accelerator, Any, Any]:
    accelerator = Accelerator(
        RunConfig(strategy="deepspeed", device="cpu", seed=3, deepspeed={"zero_stage": stage}, **settings)
    )
    model = net() if model is None else model
    return accelerator, *accelerator.prepare(model, sgd(model))


def whole(accelerator: Accelerator, model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: x.clone() for name, x in accelerator.get_state_dict(model).items()}


# What a stage does, and beside it what one process does


def plainly(weights: tuple[float, ...] = (1.0,), steps: int = 2, clip: float | None = None, value=None):
    """Return the parameters and norms of a plain loop whose loss is the mean over both ranks' losses."""
    model = net()
    optimizer = sgd(model)
    norms = []
    for _ in range(steps):
        optimizer.zero_grad()
        sum(loss_of(model, rank, w) / RANKS for rank in range(RANKS) for w in weights).backward()
        if clip is not None:
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), clip)))
        if value is not None:
            nn.utils.clip_grad_value_(model.parameters(), value)
        optimizer.step()
    return {name: x.detach().clone() for name, x in model.state_dict().items()}, norms


def two_losses_in_a_micro_step(stage: int) -> Any:
    accelerator, model, optimizer = started(stage)
    for _ in range(2):
        losses = [loss_of(model, accelerator.process_index, weight) for weight in (1.0, 0.5)]
        for loss in losses:
            accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    return whole(accelerator, model)


def clipped(stage: int) -> Any:
    accelerator, model, optimizer = started(stage)
    norms = []
    for _ in range(2):
        accelerator.backward(loss_of(model, accelerator.process_index))
        norms.append(float(accelerator.clip_grad_norm_(model.parameters(), 0.1)))
        optimizer.step()
        optimizer.zero_grad()
    return whole(accelerator, model), norms


def clipped_by_value(stage: int) -> Any:
    accelerator, model, optimizer = started(stage)
    for _ in range(2):
        accelerator.backward(loss_of(model, accelerator.process_index))
        accelerator.clip_grad_value_(model.parameters(), 0.01)
        optimizer.step()
        optimizer.zero_grad()
    return whole(accelerator, model)


def cleared(stage: int) -> Any:
    accelerator, model, optimizer = started(stage)
    for _ in range(2):
        accelerator.backward(loss_of(model, 0, 100.0))
        optimizer.zero_grad()
        accelerator.backward(loss_of(model, accelerator.process_index))
        optimizer.step()
    return whole(accelerator, model)


def scheduled(stage: int) -> Any:
    """Return the learning rates and the parameters after two steps, the second of which is at a rate of 0."""
    model = net()
    optimizer = sgd(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step == 0))
    accelerator = Accelerator(
        RunConfig(strategy="deepspeed", device="cpu", seed=3, deepspeed={"zero_stage": stage})
    )
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    rates = []
    for _ in range(2):
        rates.append(optimizer.param_groups[0]["lr"])
        accelerator.backward(loss_of(model, accelerator.process_index))
        optimizer.step()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            schedule.step()
        optimizer.zero_grad()
    return rates, whole(accelerator, model)


def networks() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return nn.Linear(2, 3), nn.Linear(3, 1)


def adversaries(maker: Any, judge: Any, x: torch.Tensor) -> tuple[Any, Any]:
    """Return the losses of two networks, each of which is computed when it is called for."""
    return (
        lambda: (judge(maker(x).detach()) - 1).square().mean(),
        lambda: judge(maker(x)).square().mean(),
    )


def two_engines(stage: int) -> Any:
    accelerator = Accelerator(
        RunConfig(strategy="deepspeed", device="cpu", seed=3, deepspeed={"zero_stage": stage})
    )
    maker, judge = networks()
    m_opt, j_opt = torch.optim.AdamW(maker.parameters(), lr=0.1), torch.optim.SGD(judge.parameters(), lr=0.1)
    maker, judge, m_opt, j_opt = accelerator.prepare(maker, judge, m_opt, j_opt)
    x = torch.arange(4.0).view(2, 2) + accelerator.process_index
    for _ in range(3):
        judge_loss, maker_loss = adversaries(maker, judge, x)
        with accelerator.accumulate(judge):
            accelerator.backward(judge_loss())
            j_opt.step()
            j_opt.zero_grad()
        with accelerator.accumulate(maker):
            accelerator.backward(maker_loss())
            m_opt.step()
            m_opt.zero_grad()
        j_opt.zero_grad()
    return [whole(accelerator, model) for model in (maker, judge)]


def two_engines_plainly() -> Any:
    maker, judge = networks()
    m_opt, j_opt = torch.optim.AdamW(maker.parameters(), lr=0.1), torch.optim.SGD(judge.parameters(), lr=0.1)
    x = torch.cat([torch.arange(4.0).view(2, 2) + rank for rank in range(RANKS)])
    for _ in range(3):
        judge_loss, maker_loss = adversaries(maker, judge, x)
        j_opt.zero_grad()
        judge_loss().backward()
        j_opt.step()
        m_opt.zero_grad()
        maker_loss().backward()
        m_opt.step()
    return [dict(model.state_dict()) for model in (maker, judge)]


def gathered(stage: int) -> Any:
    """Return what was wrong with whole parameters, after they were read, used and changed."""
    accelerator, model, optimizer = started(stage)
    before, wrong = whole(accelerator, model), []
    with accelerator.gathered(model) as plain:
        if {n: x.shape for n, x in plain.named_parameters()} != {
            n: x.shape for n, x in net().named_parameters()
        }:
            wrong.append("shapes")
        with torch.no_grad():
            plain.layers[1].weight.mul_(2)
            plain.norm.bias.add_(1)
            inside = plain(tokens(0))
            plain.embedding.weight[5] = 7
    after = whole(accelerator, model)
    before["layers.1.weight"] *= 2
    before["norm.bias"] += 1
    before["embedding.weight"][5] = before["head.weight"][5] = 7
    wrong += [name for name, x in before.items() if not torch.equal(after[name], x)]
    accelerator.backward(loss_of(model, accelerator.process_index))
    optimizer.step()
    wrong += (
        []
        if not torch.equal(whole(accelerator, model)["layers.1.weight"], before["layers.1.weight"])
        else ["step"]
    )
    accelerator.check_in_sync(model)
    return wrong, inside


def overflowing(stage: int) -> Any:
    accelerator, model, optimizer = started(stage, mixed_precision="fp16")
    before, scale = whole(accelerator, model), accelerator.scaler.scale
    loss = loss_of(model, accelerator.process_index)
    accelerator.backward(loss * (float("inf") if accelerator.process_index == 1 else 1))
    optimizer.step()
    optimizer.zero_grad()
    skipped, after = accelerator.optimizer_step_was_skipped, whole(accelerator, model)
    accelerator.backward(loss_of(model, accelerator.process_index))
    optimizer.step()
    return {
        "scale": accelerator.scaler.scale / scale,
        "skipped": skipped,
        "unchanged": all(torch.equal(after[name], x) for name, x in before.items()),
        "then": not accelerator.optimizer_step_was_skipped,
        "moved": not torch.equal(whole(accelerator, model)["layers.0.weight"], before["layers.0.weight"]),
    }


def narrow(stage: int, precision: str) -> Any:
    """Return the output's and the state's formats, and the parameters after three steps with accumulation."""
    accelerator, model, optimizer = started(stage, mixed_precision=precision, gradient_accumulation_steps=2)
    if accelerator.scaler is not None:
        accelerator.scaler.scale = 1024.0
    for _ in range(6):
        with accelerator.accumulate(model):
            loss = loss_of(model, accelerator.process_index)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    state = whole(accelerator, model)
    state.pop("norm.bias")  # frozen: it has no master, and stays in the format that is computed in
    return model(tokens(0)).dtype, {x.dtype for x in state.values()}, state, optimizer.num_steps


class Branches(nn.Module):
    """Which branch is used depends on the rank."""

    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList([nn.Linear(4, 4) for _ in range(RANKS)])
        self.head = nn.Linear(4, 1)

    def forward(self, x, branch):
        return self.head(self.branches[branch](x))


def branching(stage: int) -> Any:
    torch.manual_seed(0)
    accelerator, model, optimizer = started(stage, Branches())
    accelerator.backward(model(torch.ones(2, 4), accelerator.process_index).mean())
    optimizer.step()
    return whole(accelerator, model)


def teacher(stage: int) -> Any:
    """Return whether a model that is never trained is whole, and rank 0's, on every rank."""
    accelerator, *_ = started(stage)
    torch.manual_seed(accelerator.process_index)
    judged = accelerator.prepare_model(nn.Linear(3, 2), evaluation_mode=True)
    torch.manual_seed(0)
    return torch.equal(judged.weight, nn.Linear(3, 2).weight)


def backward_after_clipping(accelerator: Accelerator, model: Any) -> None:
    accelerator.backward(loss_of(model, accelerator.process_index))
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    accelerator.backward(loss_of(model, accelerator.process_index))


def refusals(stage: int) -> list[str]:
    """Return the codes of what is refused, in order."""
    accelerator, model, optimizer = started(stage)
    codes = []

    def refused(work) -> None:
        try:
            work()
        except StrategyError as error:
            codes.append(error.code)
        else:
            codes.append("not refused")

    other, stepped = nn.Linear(2, 2), nn.Linear(2, 2)
    refused(lambda: accelerator.prepare(torch.optim.SGD(other.parameters(), lr=1)))
    both = [nn.Linear(2, 2), nn.Linear(2, 2)]
    joint = torch.optim.SGD([x for m in both for x in m.parameters()], lr=1)
    refused(lambda: accelerator.prepare(*both, joint))
    old = torch.optim.SGD(stepped.parameters(), lr=1, momentum=0.9)
    stepped(torch.ones(1, 2)).sum().backward()
    old.step()
    refused(lambda: accelerator.prepare(stepped, old))
    refused(lambda: backward_after_clipping(accelerator, model))
    optimizer.zero_grad()
    wide = nn.Linear(2, 2).double()
    refused(lambda: accelerator.prepare(wide, torch.optim.SGD(wide.parameters(), lr=1)))
    optimizer.add_param_group({"params": list(nn.Linear(2, 2).parameters())})
    accelerator.backward(loss_of(model, accelerator.process_index))
    refused(optimizer.step)
    return codes


@contextmanager
def float16_parameters():
    """Let DeepSpeed keep float16 on processors that have no instructions for it: torch computes all the same."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    accelerator.is_fp16_supported = lambda: True
    yield
    del accelerator.is_fp16_supported


def in_sixteen_bits_with_batchnorm(stage: int) -> str:
    try:
        started(stage, nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), mixed_precision="bf16")
    except StrategyError as error:
        return error.code
    return "taken"


def observed(stage: int, folder: str) -> dict[str, Any]:
    """Look at everything in one process."""
    seen: dict[str, Any] = {}
    for look in (
        two_losses_in_a_micro_step, clipped, clipped_by_value, cleared, scheduled, two_engines, gathered, overflowing, teacher, refusals,
    ):  # fmt: skip
        seen[look.__name__] = look(stage)
    seen["bf16"], seen["fp16 by autocast"] = narrow(stage, "bf16"), narrow(stage, "fp16")
    with float16_parameters():
        seen["fp16"], seen["overflowing in fp16"] = narrow(stage, "fp16"), overflowing(stage)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that each rank has statistics of its own
        seen["batchnorm"] = in_sixteen_bits_with_batchnorm(stage)
    if stage < 2:
        seen["branching"] = branching(stage)
    accelerator, model, _ = started(stage)
    accelerator.save_model(model, folder)
    seen["described"] = accelerator._strategy.describe()
    return seen


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    @functools.cache
    def of(stage: int) -> tuple[list[dict[str, Any]], Path]:
        folder = tmp_path_factory.mktemp(f"stage{stage}")
        return run_ranks(observed, RANKS, stage, str(folder), timeout_s=110), folder

    return of


def assert_close(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], **tolerances: float
) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **(tolerances or CLOSE), msg=name)


@at_every_stage
def test_several_losses_in_one_micro_step_are_added(seen, stage):
    for rank in seen(stage)[0]:
        assert_close(rank["two_losses_in_a_micro_step"], plainly(weights=(1.0, 0.5))[0])


@at_every_stage
def test_clipping_returns_the_true_norm_of_all_ranks_and_scales_to_it(seen, stage):
    expected, norms = plainly(clip=0.1)
    for rank in seen(stage)[0]:
        found, of_rank = rank["clipped"]
        assert of_rank == pytest.approx(norms, rel=1e-5)
        assert_close(found, expected)


@at_every_stage
def test_clipping_by_value_clamps_what_is_averaged(seen, stage):
    for rank in seen(stage)[0]:
        assert_close(rank["clipped_by_value"], plainly(value=0.01)[0])


@at_every_stage
def test_gradients_that_were_cleared_leave_nothing_behind(seen, stage):
    for rank in seen(stage)[0]:
        assert_close(rank["cleared"], plainly()[0])


@at_every_stage
def test_a_scheduler_made_before_prepare_sets_the_rate_of_the_step(seen, stage):
    for rank in seen(stage)[0]:
        rates, found = rank["scheduled"]
        assert rates == [0.5, 0.0]
        assert_close(found, plainly(steps=1)[0])


@at_every_stage
def test_two_engines_trained_in_turn_equal_one_process(seen, stage):
    for rank in seen(stage)[0]:
        for found, expected in zip(rank["two_engines"], two_engines_plainly(), strict=True):
            assert_close(found, expected)


@at_every_stage
def test_whole_parameters_can_be_read_used_and_changed(seen, stage):
    with torch.no_grad():
        changed = net()
        changed.layers[1].weight.mul_(2)
        changed.norm.bias.add_(1)
        expected = changed(tokens(0))
    for rank in seen(stage)[0]:
        wrong, inside = rank["gathered"]
        assert wrong == []
        torch.testing.assert_close(inside, expected)


@at_every_stage
@pytest.mark.parametrize("how", ["overflowing", "overflowing in fp16"])
def test_an_overflow_on_one_rank_skips_the_step_on_all_and_the_next_is_taken(seen, stage, how):
    for rank in seen(stage)[0]:
        assert rank[how] == {
            "scale": 0.5, "skipped": True, "unchanged": True, "then": True, "moved": True,
        }  # fmt: skip


@at_every_stage
@pytest.mark.parametrize(("precision", "atol"), [("bf16", 4e-2), ("fp16", 6e-3), ("fp16 by autocast", 6e-3)])
def test_sixteen_bits_give_float32_outputs_masters_and_about_the_steps_of_float32(
    seen, stage, precision, atol
):
    expected, _ = plainly(steps=3)
    for rank in seen(stage)[0]:
        output, state, found, steps = rank[precision]
        assert (output, state, steps) == (torch.float32, {torch.float32}, 3)
        assert_close(found, {name: expected[name] for name in found}, rtol=0, atol=atol)


@pytest.mark.parametrize("stage", [0, 1])
def test_a_parameter_that_only_some_ranks_use_is_averaged_all_the_same(seen, stage):
    torch.manual_seed(0)
    model = Branches()
    optimizer = sgd(model)
    (sum(model(torch.ones(2, 4), branch).mean() for branch in range(RANKS)) / RANKS).backward()
    optimizer.step()
    for rank in seen(stage)[0]:
        assert_close(rank["branching"], dict(model.state_dict()))


@at_every_stage
def test_a_model_for_evaluation_is_rank_0s_on_all(seen, stage):
    assert [rank["teacher"] for rank in seen(stage)[0]] == [True] * RANKS


@at_every_stage
def test_what_an_engine_cannot_have_is_refused_with_a_code(seen, stage):
    for rank in seen(stage)[0]:
        assert rank["refusals"] == ["D0874", "D0875", "D0876", "D0888", "D0877", "D0878"]


@at_every_stage
def test_batchnorm_in_sixteen_bits_is_refused_where_its_weights_would_be_narrow(seen, stage):
    assert [rank["batchnorm"] for rank in seen(stage)[0]] == ["D0879" if stage else "taken"] * RANKS


@at_every_stage
def test_a_saved_model_has_whole_float32_weights(seen, stage):
    from safetensors.torch import load_file

    found = load_file(seen(stage)[1] / "model.safetensors")
    expected = dict(net().state_dict())
    assert found.keys() >= expected.keys() - {"head.weight", "embedding.weight"}
    assert_close(found, {name: expected[name] for name in found}, rtol=0, atol=0)


@at_every_stage
def test_the_layout_can_be_described(seen, stage):
    assert f"ZeRO stage {stage}" in seen(stage)[0][0]["described"]


IMPORTS = """
import sys, distrib
from distrib import Accelerator
from distrib.strategies import STRATEGIES
assert STRATEGIES.get("deepspeed").capabilities.axes == ("shard", "context")
import torch
a = Accelerator(strategy="ddp", cpu=True)
m = torch.nn.Linear(2, 2)
m, o = a.prepare(m, torch.optim.SGD(m.parameters(), lr=0.1))
a.backward(m(torch.ones(1, 2)).sum())
o.step()
assert "deepspeed" not in sys.modules
"""


def test_a_ddp_run_never_imports_deepspeed():
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
