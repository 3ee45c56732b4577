"""Whose error it is: the user's own pass DeepSpeed unchanged, its own are told with the key at fault, and what it would do
wrong is refused."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distrib import Accelerator, RunConfig, StrategyError
from distrib.strategies.deepspeed_pairs import refuse_begun
from distrib.testing import run_ranks
from tests.multiproc.test_deepspeed import assert_close
from tests.multiproc.test_deepspeed_layouts import needs_async_io

if find_spec("deepspeed") is None:
    pytest.skip("pip install deepspeed==0.19.8", allow_module_level=True)

RANKS = 2
at_every_stage = pytest.mark.parametrize(
    "stage", [pytest.param(0, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.slow), 2, 3]
)


class FailsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, gradient):
        raise ValueError("the user's own, in a backward")


class Failing(nn.Linear):
    """Fails where `how` says: "forward", "backward" or nowhere."""

    how = ""

    def forward(self, x):
        if self.how == "forward":
            raise ValueError("the user's own, in a forward")
        y = super().forward(x)
        return FailsInBackward.apply(y) if self.how == "backward" else y


class Sparse(nn.Module):
    """An embedding whose gradient is sparse, which no module tells."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.ones(5, 3))

    def forward(self, x):
        return nn.functional.embedding(x, self.table, sparse=True)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), Failing(4, 3), nn.Linear(3, 2))


def loss_of(model: nn.Module, rank: int) -> torch.Tensor:
    return model(torch.linspace(-1, 1 + rank, 8).view(2, 4)).square().mean()


def started(
    stage: int, model: nn.Module, make: Callable[[nn.Module], Any] | None = None, **zero: Any
) -> tuple[Accelerator, Any, Any]:
    if stage == 3:
        zero.setdefault("stage3_param_persistence_threshold", 0)  # else small parameters stay whole
    config = {"zero_optimization": {"stage": stage, "reduce_bucket_size": 7, **zero}}
    accelerator = Accelerator(
        RunConfig(strategy="deepspeed", device="cpu", seed=3, deepspeed={"config": config})
    )
    optimizer = make(model) if make else torch.optim.AdamW(model.parameters(), lr=0.05)
    return accelerator, *accelerator.prepare(model, optimizer)


def two_groups(model: Any) -> torch.optim.Optimizer:
    groups = [{"params": model[0].parameters(), "lr": 0.2}, {"params": [*model[2].parameters(), *model[3].parameters()]}]  # fmt: skip
    return torch.optim.Adagrad(groups, lr=0.05, initial_accumulator_value=0.1, lr_decay=0.1)


def by_rows(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(model.parameters(), lr=0.05)


def plainly(make: Callable[[Any], Any], steps: int) -> dict[str, torch.Tensor]:
    model = net()
    optimizer = make(model)
    for _ in range(steps):
        optimizer.zero_grad()
        (sum(loss_of(model, rank) for rank in range(RANKS)) / RANKS).backward()
        optimizer.step()
    return {name: x.detach() for name, x in model.state_dict().items()}


def whole(accelerator: Accelerator, model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: x.clone() for name, x in accelerator.get_state_dict(model).items()}


def told_by(work: Callable[[], Any]) -> str:
    try:
        work()
    except (StrategyError, ValueError) as error:
        return error.code if isinstance(error, StrategyError) else str(error)
    return "nothing"


def own_errors(stage: int) -> Any:
    """Fail in every way, then train as if nothing had been."""
    accelerator, model, optimizer = started(stage, net())
    rank = accelerator.process_index

    def in_whole_parameters() -> None:
        with accelerator.gathered(model):
            accelerator.backward(loss_of(model, rank))

    told = []
    for how in ("forward", "backward"):
        model[2].how = how
        for work in (lambda: accelerator.backward(loss_of(model, rank)), in_whole_parameters):
            told.append(told_by(work))
            optimizer.zero_grad()
    model[2].how = ""
    for _ in range(2):
        accelerator.backward(loss_of(model, rank))
        optimizer.step()
        optimizer.zero_grad()
    return told, whole(accelerator, model)


def inside_of_gathered(stage: int, folder: str) -> Any:
    """Return what is refused there, and a value as it is inside, in a checkpoint of inside, and afterwards."""
    accelerator, model, optimizer = started(stage, net())
    accelerator.backward(loss_of(model, accelerator.process_index))

    def value() -> float:
        return float(accelerator.get_state_dict(model)["0.weight"][1, 2])

    with accelerator.gathered(model) as plain:
        with accelerator.gathered(plain) as again, torch.no_grad():
            again[0].weight.fill_(7)
        values = [value()]
        accelerator.save_state(folder, durable=False)
        told = [told_by(optimizer.step), told_by(lambda: accelerator.load_state(folder))]
    values.append(value())
    with accelerator.gathered(model) as plain, torch.no_grad():
        plain[0].weight.fill_(1)
    accelerator.load_state(folder)
    values.append(value())

    def replace() -> None:
        with accelerator.gathered(model) as plain:
            plain[3] = nn.Linear(3, 9)

    return [*told, told_by(replace)], values


def refused(stage: int) -> list[str]:
    sparse = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 1))
    matrices = nn.Linear(3, 4, bias=False)
    return [
        told_by(lambda: started(stage, sparse, lambda m: torch.optim.SGD(m.parameters(), lr=0.1))),
        told_by(lambda: started(stage, matrices, lambda m: torch.optim.Muon(m.parameters()))),
    ]


def of_deepspeed(stage: int) -> tuple[str, str]:
    """Return the message and the cause's class of an error that DeepSpeed has in a backward, or at its end."""
    accelerator, model, optimizer = started(stage, Sparse(), lambda m: torch.optim.SGD(m.parameters(), lr=1))
    try:
        accelerator.backward(model(torch.tensor([1, 2])).sum())
        optimizer.step()
    except StrategyError as error:
        return str(error), type(error.__cause__).__name__
    return "nothing", ""


def resumed(stage: int, make: Callable[[Any], Any], folder: str) -> dict[str, torch.Tensor]:
    """Return the parameters of the third step, which follows a checkpoint of the second."""
    accelerator, model, optimizer = started(stage, net(), make)

    def step() -> None:
        accelerator.backward(loss_of(model, accelerator.process_index))
        optimizer.step()
        optimizer.zero_grad()

    step()
    step()
    accelerator.save_state(folder, durable=False)
    step()
    step()
    accelerator.load_state(folder)
    step()
    return whole(accelerator, model)


def observed(stage: int, folder: str) -> dict[str, Any]:
    seen = {
        "own errors": own_errors(stage),
        "inside": inside_of_gathered(stage, f"{folder}/inside"),
        "refused": refused(stage),
        "adagrad": resumed(stage, two_groups, f"{folder}/adagrad"),
    }
    if stage == 0:
        seen["adafactor"] = resumed(stage, by_rows, f"{folder}/adafactor")
    else:
        seen["of deepspeed"] = of_deepspeed(stage)
    return seen


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    @functools.cache
    def of(stage: int) -> list[dict[str, Any]]:
        folder = tmp_path_factory.mktemp(f"stage{stage}")
        return run_ranks(observed, RANKS, stage, str(folder), timeout_s=110)

    return of


@at_every_stage
def test_an_error_of_the_user_s_own_passes_unchanged_and_training_goes_on_as_if_it_had_not_been(seen, stage):
    expected = plainly(lambda m: torch.optim.AdamW(m.parameters(), lr=0.05), 2)
    for rank in seen(stage):
        told, found = rank["own errors"]
        assert told == ["the user's own, in a forward"] * 2 + ["the user's own, in a backward"] * 2
        assert_close(found, expected)


@at_every_stage
def test_what_is_changed_inside_of_gathered_is_saved_there_and_what_would_be_lost_is_refused(seen, stage):
    for rank in seen(stage):
        told, values = rank["inside"]
        assert told == ["D0951", "D0951", "D0837"]
        assert values == [7.0, 7.0, 7.0]


@at_every_stage
def test_what_zero_cannot_divide_is_refused_when_it_is_prepared(seen, stage):
    for rank in seen(stage):
        assert rank["refused"] == (["D0950", "D0953"] if stage else ["nothing", "nothing"])


@at_every_stage
def test_an_adagrad_of_two_groups_trains_and_resumes_as_in_one_process(seen, stage):
    for rank in seen(stage):
        assert_close(rank["adagrad"], plainly(two_groups, 3))


@pytest.mark.slow
def test_state_of_another_shape_than_its_parameter_is_saved_in_stage_0(seen):
    for rank in seen(0):
        assert_close(rank["adafactor"], plainly(by_rows, 3))


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 2, 3])
def test_an_error_of_deepspeed_in_a_backward_or_its_end_is_told_with_its_cause(seen, stage):
    for rank in seen(stage):
        message, cause = rank["of deepspeed"]
        when = "averaging gradients" if stage == 1 else "a backward"
        assert message.startswith(f"error[D0945] DeepSpeed failed in {when} of Sparse: NotImplementedError: ")
        assert cause == "NotImplementedError"


def test_an_adagrad_cannot_go_to_a_disk():
    with pytest.raises(StrategyError, match="D0952"):
        refuse_begun(torch.optim.Adagrad(net().parameters()))


class Pair(nn.Module):
    """Two parameters of more than a MiB on each of two ranks, of which one computation needs both."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.ones(700, 900)) for _ in range(2))

    def forward(self, x):
        return x @ (self.first + self.second).T


def on_a_disk(folder: str, count: int) -> tuple[str, float]:
    """Return what a forward tells with so few buffers, and what is computed with whole parameters, which need but one."""
    off = {"device": "nvme", "nvme_path": folder, "max_in_cpu": 0, "buffer_count": count}
    accelerator, model, _ = started(3, nn.Sequential(Pair(), nn.Tanh()), offload_param=off)
    told = told_in(lambda: model(torch.ones(1, 900)))
    with accelerator.gathered(model) as plain, torch.no_grad():
        plain[0].second.mul_(0.5)
    with accelerator.gathered(model) as plain, torch.no_grad():
        return told, float((plain[0].first + plain[0].second).mean())


def told_in(work: Callable[[], Any]) -> str:
    try:
        work()
    except StrategyError as error:
        return str(error)
    return "nothing"


@needs_async_io
def test_too_few_buffers_are_told_in_a_forward_with_their_key_and_suffice_for_whole_parameters(
    tmp_path: Path,
):
    for told, mean in run_ranks(on_a_disk, RANKS, str(tmp_path), 1, timeout_s=100):
        assert "D0945" in told
        assert "(zero_optimization.offload_param.buffer_count): DeepSpeed failed in a forward of Pair" in told
        assert mean == 1.5
