"""Windows, losses, optimizers and schedulers on one process: each loop must do what a plain loop does."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, TensorDataset

from distrib import Accelerator, NotBuiltError, TrainingError

pytestmark = pytest.mark.usefixtures("plain_process")

N, MICRO, STEPS = 23, 2, 3
GLOBAL = MICRO * STEPS
PLACES = ["before accumulate", "first", "after step", "after accumulate", "after a real step"]


def accelerator_of(**options: Any) -> Accelerator:
    return Accelerator(cpu=True, **({"gradient_accumulation_steps": STEPS} | options))


def make_model(seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(3, 2).double()


def make_optimizer(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def samples(n: int = N) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    return x, torch.randn(n, 2, generator=generator, dtype=torch.float64), torch.arange(n) % 4 + 1


def loader_of(n: int = N) -> DataLoader:
    return DataLoader(TensorDataset(*samples(n)), batch_size=MICRO)


def losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (model(x) - y).square().sum(dim=1)


def windows(n: int = N, size: int = GLOBAL) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for start in range(0, n, size):
        yield tuple(column[start : start + size] for column in samples(n))  # type: ignore[misc]


class Plain:
    """The truth: one backward pass and one step on each whole global batch."""

    def __init__(self, clip: Callable[[list[nn.Parameter]], Any] | None = None):
        self.model = make_model()
        self.optimizer = make_optimizer(self.model)
        self.clip, self.clipped = clip, []

    def step(self, x: Tensor, y: Tensor, weights: Tensor | None = None) -> None:
        self.optimizer.zero_grad()
        of_samples = losses(self.model, x, y)
        loss = of_samples.mean() if weights is None else (of_samples * weights).sum() / weights.sum()
        loss.backward()
        if self.clip is not None:
            self.clipped.append(self.clip(list(self.model.parameters())))
        self.optimizer.step()

    def train(self, epochs: int = 1, *, counted: bool = False) -> Plain:
        for _ in range(epochs):
            for x, y, weights in windows():
                self.step(x, y, weights if counted else None)
        return self


class Prepared:
    """A loop over a prepared loader, with `zero_grad` in a place of choice."""

    def __init__(self, place: str = "after step", **options: Any):
        self.accelerator = accelerator_of(**options)
        model = make_model()
        self.model, self.optimizer, self.loader = self.accelerator.prepare(
            model, make_optimizer(model), loader_of()
        )
        self.place = place

    def zero_grad_at(self, place: str) -> None:
        if self.place == place:
            self.optimizer.zero_grad()

    def batch(self, x: Tensor, y: Tensor, between: Callable[[], Any] = lambda: None) -> None:
        accelerator = self.accelerator
        self.zero_grad_at("before accumulate")
        with accelerator.accumulate(self.model):
            self.zero_grad_at("first")
            accelerator.backward(losses(self.model, x, y).mean())
            between()
            self.optimizer.step()
            self.zero_grad_at("after step")
            if accelerator.sync_gradients:
                self.zero_grad_at("after a real step")
        self.zero_grad_at("after accumulate")

    def train(self, epochs: int = 1, between: Callable[[], Any] = lambda: None) -> Prepared:
        for _ in range(epochs):
            for x, y, _ in self.loader:
                self.batch(x, y, between)
        return self


def assert_same_parameters(a: nn.Module, b: nn.Module) -> None:
    # Not bitwise: a sum over micro-batches is added up in another order than the sum over the whole batch.
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-14)


# Windows


@pytest.mark.parametrize("place", PLACES)
def test_zero_grad_in_any_place_of_the_loop_gives_the_plain_run(place: str):
    assert_same_parameters(Prepared(place).train(epochs=3).model, Plain().train(epochs=3).model)


def test_a_loop_that_clears_gradients_in_every_place_gives_the_plain_run():
    prepared = Prepared()
    prepared.zero_grad_at = lambda place: prepared.optimizer.zero_grad()  # type: ignore[method-assign]
    assert_same_parameters(prepared.train(epochs=2).model, Plain().train(epochs=2).model)


def test_gradients_synchronise_at_each_windows_end_the_short_last_one_included():
    found: list[bool] = []
    prepared = Prepared()
    prepared.train(between=lambda: found.append(prepared.accelerator.sync_gradients))
    assert found == [False, False, True] * 3 + [False, False, True]  # 23 = 6 + 6 + 6 + 5
    assert prepared.optimizer.num_steps == 4


def test_without_a_prepared_loader_every_third_call_of_accumulate_steps():
    prepared, plain = Prepared(), Plain()
    x, y, _ = samples(18)
    for start in range(0, 18, MICRO):
        prepared.batch(x[start : start + MICRO], y[start : start + MICRO])
    for start in range(0, 18, GLOBAL):
        plain.step(x[start : start + GLOBAL], y[start : start + GLOBAL])
    assert prepared.optimizer.num_steps == 3
    assert_same_parameters(prepared.model, plain.model)


def test_a_loop_without_accumulate_is_a_plain_loop_when_a_window_is_one_micro_step():
    prepared = Prepared(gradient_accumulation_steps=1)
    for x, y, _ in prepared.loader:
        prepared.accelerator.backward(losses(prepared.model, x, y).mean())
        prepared.optimizer.step()
        prepared.optimizer.zero_grad()
    plain = Plain()
    for x, y, _ in windows(size=MICRO):
        plain.step(x, y)
    assert_same_parameters(prepared.model, plain.model)


def test_several_backward_calls_of_one_micro_step_add_up():
    prepared, plain = Prepared(), Plain()
    for x, y, _ in prepared.loader:
        with prepared.accelerator.accumulate(prepared.model):
            for share in (0.25, 0.75):
                prepared.accelerator.backward(losses(prepared.model, x, y).mean() * share)
            prepared.optimizer.step()
            prepared.optimizer.zero_grad()
    assert_same_parameters(prepared.model, plain.train().model)


@pytest.mark.parametrize("place", PLACES)
def test_a_window_left_by_break_counts_nothing_in_the_next_loop(place: str):
    prepared, plain = Prepared(place), Plain()
    for index, (x, y, _) in enumerate(prepared.loader):
        prepared.batch(x, y)
        if index == STEPS:  # one micro-step into the second window
            break
    prepared.train()
    plain.step(*next(windows())[:2])
    plain.train()
    assert prepared.optimizer.num_steps == 1 + 4
    assert_same_parameters(prepared.model, plain.model)


def test_zero_grad_between_two_loops_clears_what_a_window_left_by_break_holds():
    prepared = Prepared("nowhere")
    for x, y, _ in prepared.loader:
        prepared.batch(x, y)
        break
    prepared.optimizer.zero_grad()
    assert [parameter.grad for parameter in prepared.model.parameters()] == [None, None]


def test_a_step_without_a_loader_after_a_break_has_its_own_gradients_only():
    prepared, plain = (
        Prepared("after step", gradient_accumulation_steps=None, global_batch_size=GLOBAL),
        Plain(),
    )
    for x, y, _ in prepared.loader:
        prepared.batch(x, y)
        break
    x, y, _ = samples(4)
    prepared.optimizer.zero_grad()
    prepared.accelerator.backward(losses(prepared.model, x, y).mean())
    prepared.optimizer.step()
    plain.step(x, y)
    assert_same_parameters(prepared.model, plain.model)


def test_an_exception_in_the_body_leaves_accumulate_usable():
    prepared, plain = Prepared("before accumulate"), Plain()
    with pytest.raises(ZeroDivisionError):
        for x, y, _ in prepared.loader:
            prepared.batch(x, y, between=lambda: 1 // 0)
    prepared.train()
    plain.train()
    assert_same_parameters(prepared.model, plain.model)


def test_a_window_that_was_open_at_load_state_counts_nothing_afterwards(tmp_path: Path):
    prepared = Prepared(project_dir=tmp_path)
    prepared.accelerator.save_state()
    for x, y, _ in prepared.loader:
        prepared.batch(x, y)
        break
    prepared.accelerator.load_state()
    prepared.train()
    assert_same_parameters(prepared.model, Plain().train().model)


def test_an_evaluation_inside_a_window_leaves_it_open():
    prepared, plain = Prepared("before accumulate"), Plain()
    evaluation = prepared.accelerator.prepare(loader_of(7))
    for x, y, _ in prepared.loader:
        prepared.batch(x, y)
        with torch.no_grad():
            for z, _, _ in evaluation:
                prepared.accelerator.gather_for_metrics(prepared.model(z))
    assert_same_parameters(prepared.model, plain.train().model)


def test_a_step_in_mid_window_without_accumulate_is_refused_and_changes_nothing():
    prepared = Prepared()
    for x, y, _ in prepared.loader:
        prepared.accelerator.backward(losses(prepared.model, x, y).mean())
        with pytest.raises(TrainingError, match=r"(?s)D0601.*accumulate") as refused:
            prepared.optimizer.step()
        break
    assert refused.value.code == "D0601"
    assert prepared.optimizer.num_steps == 0
    assert_same_parameters(prepared.model, make_model())


def test_two_models_with_an_optimizer_each_step_in_the_same_windows():
    accelerator = accelerator_of()
    models = [make_model(seed) for seed in (0, 1)]
    prepared = accelerator.prepare(*models, *map(make_optimizer, models), loader_of())
    first, second, *optimizers, loader = prepared
    for x, y, weights in loader:
        for model, optimizer in zip((first, second), optimizers, strict=True):
            with accelerator.accumulate(model):
                accelerator.backward((losses(model, x, y) * weights).sum(), count=weights.sum())
                optimizer.step()
                optimizer.zero_grad()
    for model, seed in zip((first, second), (0, 1), strict=True):
        plain = Plain()
        plain.model.load_state_dict(make_model(seed).state_dict())
        assert_same_parameters(model, plain.train(counted=True).model)
    assert [optimizer.num_steps for optimizer in optimizers] == [4, 4]


# Clipping


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("counted", [False, True])
def test_clipping_by_norm_acts_once_per_window(counted: bool):
    plain = Plain(clip=lambda parameters: nn.utils.clip_grad_norm_(parameters, 0.5)).train(counted=counted)
    prepared, norms = Prepared(), []
    for x, y, weights in prepared.loader:
        with prepared.accelerator.accumulate(prepared.model):
            of_samples = losses(prepared.model, x, y)
            if counted:
                prepared.accelerator.backward((of_samples * weights).sum(), count=int(weights.sum()))
            else:
                prepared.accelerator.backward(of_samples.mean())
            norms.append(float(prepared.accelerator.clip_grad_norm_(prepared.model.parameters(), 0.5)))
            prepared.optimizer.step()
            prepared.optimizer.zero_grad()
    assert_same_parameters(prepared.model, plain.model)
    truth = [float(norm) for norm in plain.clipped]
    in_mid_window = [0.0, *truth[:-1]]  # that of the last complete window
    expected = [norm for last, own in zip(in_mid_window, truth, strict=True) for norm in (last, last, own)]
    assert norms == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", ["norm", "value"])
def test_clipping_in_mid_window_leaves_gradients_as_they_are(kind: str):
    prepared = Prepared()

    def clip() -> None:
        before = gradients(prepared.model)
        parameters = prepared.model.parameters()
        if kind == "norm":
            prepared.accelerator.clip_grad_norm_(parameters, 1e-3)
        else:
            prepared.accelerator.clip_grad_value_(parameters, 1e-3)
        for x, y in zip(before, gradients(prepared.model), strict=True):
            assert torch.equal(x, y) != prepared.accelerator.sync_gradients

    prepared.train(between=clip)


def test_clipping_by_value_acts_once_per_window():
    plain = Plain(clip=lambda parameters: nn.utils.clip_grad_value_(parameters, 0.3)).train()
    prepared = Prepared()
    prepared.train(between=lambda: prepared.accelerator.clip_grad_value_(prepared.model.parameters(), 0.3))
    assert_same_parameters(prepared.model, plain.model)


def test_a_single_parameter_can_be_clipped():
    prepared = Prepared(gradient_accumulation_steps=1)
    x, y, _ = samples()
    prepared.accelerator.backward(losses(prepared.model, x, y).mean())
    expected = prepared.model.weight.grad.norm()
    found = prepared.accelerator.clip_grad_norm_(prepared.model.weight, 1e-3)
    assert float(found) == pytest.approx(float(expected))
    assert float(prepared.model.weight.grad.norm()) == pytest.approx(1e-3, rel=1e-3)
    assert float(prepared.model.bias.grad.norm()) > 1e-3


# Counts


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("place", ["first", "after step"])
def test_counted_losses_give_the_mean_over_all_that_was_counted(place: str, as_tensor: bool):
    prepared = Prepared(place)
    for x, y, weights in prepared.loader:
        with prepared.accelerator.accumulate(prepared.model):
            prepared.zero_grad_at("first")
            count = weights.sum() if as_tensor else int(weights.sum())
            prepared.accelerator.backward((losses(prepared.model, x, y) * weights).sum(), count=count)
            prepared.optimizer.step()
            prepared.zero_grad_at("after step")
    assert_same_parameters(prepared.model, Plain().train(counted=True).model)


def test_a_counted_gradient_is_the_undivided_sum_until_clip_or_step_divides_it_once():
    prepared = Prepared(gradient_accumulation_steps=1)
    model, accelerator = prepared.model, prepared.accelerator
    x, y, weights = samples(6)
    (undivided,) = torch.autograd.grad((losses(model, x, y) * weights).sum(), model.weight)
    with accelerator.accumulate(model):
        accelerator.backward((losses(model, x, y) * weights).sum(), count=int(weights.sum()))
        torch.testing.assert_close(model.weight.grad, undivided)
        for _ in range(2):
            accelerator.clip_grad_norm_(model.parameters(), 1e9)
            torch.testing.assert_close(model.weight.grad, undivided / weights.sum())
        prepared.optimizer.step()
        torch.testing.assert_close(model.weight.grad, undivided / weights.sum())


def test_equal_counts_of_one_micro_step_count_once():
    prepared, plain = Prepared(), Plain()
    for x, y, weights in prepared.loader:
        with prepared.accelerator.accumulate(prepared.model):
            for share in (0.25, 0.75):
                total = (losses(prepared.model, x, y) * weights).sum() * share
                prepared.accelerator.backward(total, count=int(weights.sum()))
            prepared.optimizer.step()
            prepared.optimizer.zero_grad()
    assert_same_parameters(prepared.model, plain.train(counted=True).model)


def test_unequal_counts_of_one_micro_step_are_refused_with_both_numbers():
    prepared = Prepared()
    x, y, _ = samples(2)
    with prepared.accelerator.accumulate(prepared.model):
        prepared.accelerator.backward(losses(prepared.model, x, y).sum(), count=2)
        with pytest.raises(TrainingError, match=r"D0603.*count 2 and 5"):
            prepared.accelerator.backward(losses(prepared.model, x, y).sum(), count=torch.tensor(5))


@pytest.mark.parametrize("counts", [(None, 2), (2, None)])
@pytest.mark.parametrize("in_one_micro_step", [True, False])
def test_means_and_sums_in_one_window_are_refused(counts: tuple, in_one_micro_step: bool):
    prepared = Prepared()
    model, accelerator = prepared.model, prepared.accelerator
    x, y, _ = samples(2)

    def backward(count: int | None) -> None:
        accelerator.backward(losses(model, x, y).sum(), count=count)

    with accelerator.accumulate(model):
        backward(counts[0])
        if in_one_micro_step:
            with pytest.raises(TrainingError, match="D0602"):
                backward(counts[1])
            return
    with accelerator.accumulate(model), pytest.raises(TrainingError, match="D0602"):
        backward(counts[1])


def test_one_window_of_means_may_be_followed_by_one_of_sums():
    prepared, plain = Prepared(), Plain()
    for index, (x, y, weights) in enumerate(prepared.loader):
        with prepared.accelerator.accumulate(prepared.model):
            of_samples = losses(prepared.model, x, y)
            if index // STEPS % 2:
                prepared.accelerator.backward((of_samples * weights).sum(), count=int(weights.sum()))
            else:
                prepared.accelerator.backward(of_samples.mean())
            prepared.optimizer.step()
            prepared.optimizer.zero_grad()
    for index, (x, y, weights) in enumerate(windows()):
        plain.step(x, y, weights if index % 2 else None)
    assert_same_parameters(prepared.model, plain.model)


def test_a_micro_step_that_counts_nothing_does_not_matter():
    prepared, plain = Prepared(), Plain()
    x, y, weights = samples(2)
    for count in (0, int(weights.sum()), 0):
        with prepared.accelerator.accumulate(prepared.model):
            total = (losses(prepared.model, x, y) * weights).sum()
            prepared.accelerator.backward(total if count else total * 0, count=count)
            prepared.optimizer.step()
    plain.step(x, y, weights)
    assert not prepared.accelerator.optimizer_step_was_skipped
    assert_same_parameters(prepared.model, plain.model)


def test_a_window_that_counts_nothing_skips_the_step_and_the_schedule_once():
    accelerator = accelerator_of(gradient_accumulation_steps=1)
    model = make_model()
    own = make_optimizer(model)
    model, optimizer, scheduler = accelerator.prepare(model, own, StepLR(own, 1, gamma=0.5))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    x, y, _ = samples(2)
    found = []
    for count in (0, 2):
        accelerator.backward(losses(model, x, y).sum() * (count > 0), count=count)
        optimizer.step()
        scheduler.step()
        unchanged = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        found.append(
            (
                accelerator.optimizer_step_was_skipped,
                optimizer.num_steps,
                own.param_groups[0]["lr"],
                unchanged,
            )
        )
        optimizer.zero_grad()
    assert found == [(True, 0, 0.1, True), (False, 1, 0.05, False)]


def test_backward_refuses_keywords_that_it_does_not_know():
    prepared = Prepared()
    loss = losses(prepared.model, *samples(2)[:2]).mean()
    with pytest.raises(NotBuiltError, match="retain_graph"):
        prepared.accelerator.backward(loss, retain_graph=True)


# The prepared optimizer


def test_a_prepared_optimizer_is_the_users_optimizer_in_all_but_step_and_zero_grad():
    accelerator = accelerator_of()
    model = make_model()
    own = make_optimizer(model)
    optimizer = accelerator.prepare(own)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.optimizer is own
    assert optimizer.param_groups is own.param_groups
    assert optimizer.state is own.state
    assert optimizer.defaults is own.defaults
    assert optimizer.state_dict() == own.state_dict()
    assert "SGD" in repr(optimizer)
    optimizer.load_state_dict(
        {**own.state_dict(), "param_groups": [{**own.state_dict()["param_groups"][0], "lr": 7}]}
    )
    assert own.param_groups[0]["lr"] == 7


def test_preparing_an_optimizer_twice_changes_nothing():
    accelerator = accelerator_of()
    optimizer = accelerator.prepare(make_optimizer(make_model()))
    assert accelerator.prepare(optimizer) is optimizer


def test_parameters_added_after_prepare_are_trained_and_counted_losses_divided():
    accelerator = accelerator_of(gradient_accumulation_steps=1)
    model = make_model()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD([model.weight], lr=1.0))
    optimizer.add_param_group({"params": [model.bias], "lr": 1.0})
    before = model.bias.detach().clone()
    accelerator.backward(model.bias.sum() * 4, count=8)
    optimizer.step()
    torch.testing.assert_close(model.bias.detach(), before - 0.5)


def test_a_step_with_a_closure_is_not_built():
    with pytest.raises(NotBuiltError, match="closure"):
        accelerator_of().prepare(make_optimizer(make_model())).step(lambda: 0.0)


def test_a_prepared_optimizer_is_not_pickled():
    with pytest.raises(TypeError, match="state_dict"):
        pickle.dumps(accelerator_of().prepare(make_optimizer(make_model())))


# Schedulers


def make_scheduler(name: str, optimizer: torch.optim.Optimizer, total: int) -> Any:
    return {
        "StepLR": lambda: StepLR(optimizer, 2, gamma=0.5),
        "LambdaLR": lambda: LambdaLR(optimizer, lambda step: 1 / (1 + step)),
        "OneCycleLR": lambda: OneCycleLR(optimizer, 0.5, total_steps=total),
        "ReduceLROnPlateau": lambda: ReduceLROnPlateau(optimizer, factor=0.5, patience=0),
    }[name]()


def plain_rates(name: str, calls: str, epochs: int) -> list[float]:
    """Return the learning rate of each optimizer step, and the last one."""
    plain = Plain()
    scheduler = make_scheduler(name, plain.optimizer, epochs * (4 if calls != "epoch" else 1))
    rates = []
    for epoch in range(epochs):
        for x, y, _ in windows():
            rates.append(plain.optimizer.param_groups[0]["lr"])
            plain.step(x, y)
            if calls != "epoch":
                scheduler.step()
        if calls == "epoch":
            scheduler.step(*([float(epoch)] if name == "ReduceLROnPlateau" else []))
    return [*rates, plain.optimizer.param_groups[0]["lr"]]


def prepared_rates(name: str, calls: str, epochs: int) -> list[float]:
    accelerator = accelerator_of()
    model = make_model()
    own = make_optimizer(model)
    scheduler = make_scheduler(name, own, epochs * (4 if calls != "epoch" else 1))
    model, scheduler, optimizer, loader = accelerator.prepare(model, scheduler, own, loader_of())
    rates = []
    for epoch in range(epochs):
        for x, y, _ in loader:
            with accelerator.accumulate(model):
                accelerator.backward(losses(model, x, y).mean())
                rate = own.param_groups[0]["lr"]
                optimizer.step()
                if accelerator.sync_gradients:
                    rates.append(rate)
                if calls == "batch" or (calls == "step" and accelerator.sync_gradients):
                    scheduler.step()
                optimizer.zero_grad()
        if calls == "epoch":
            scheduler.step(*([float(epoch)] if name == "ReduceLROnPlateau" else []))
    return [*rates, own.param_groups[0]["lr"]]


@pytest.mark.parametrize(
    ("name", "calls"),
    [
        *(
            (name, calls)
            for name in ["StepLR", "LambdaLR", "OneCycleLR"]
            for calls in ["batch", "step", "epoch"]
        ),
        ("ReduceLROnPlateau", "epoch"),
    ],
)
def test_a_schedule_called_per_batch_step_or_epoch_is_that_of_the_plain_loop(name: str, calls: str):
    assert prepared_rates(name, calls, 4) == pytest.approx(plain_rates(name, calls, 4), rel=1e-12)


def test_one_cycle_gives_the_last_step_its_last_rate():
    last_rate = 0.5 / 25 / 1e4  # max_lr / div_factor / final_div_factor, torch's defaults
    assert prepared_rates("OneCycleLR", "batch", 2)[-2] == pytest.approx(last_rate)


def test_a_scheduler_called_before_its_optimizer_has_stepped_does_not_move():
    accelerator = accelerator_of()
    own = make_optimizer(make_model())
    _, scheduler = accelerator.prepare(own, StepLR(own, 1, gamma=0.5))
    scheduler.step()
    assert scheduler.get_last_lr() == [0.1]


def test_two_schedulers_of_one_optimizer_both_move():
    accelerator = accelerator_of(gradient_accumulation_steps=1)
    model = make_model()
    own = make_optimizer(model)
    schedulers = [StepLR(own, 1, gamma=0.5), LambdaLR(own, lambda step: 1.0)]
    model, optimizer, first, second = accelerator.prepare(model, own, *schedulers)
    accelerator.backward(losses(model, *samples(2)[:2]).mean())
    optimizer.step()
    first.step()
    second.step()
    assert [first.last_epoch, second.last_epoch] == [1, 1]


def test_a_scheduler_built_on_the_prepared_optimizer_moves_with_it():
    accelerator = accelerator_of(gradient_accumulation_steps=1)
    model = make_model()
    model, optimizer = accelerator.prepare(model, make_optimizer(model))
    scheduler = accelerator.prepare(StepLR(optimizer, 1, gamma=0.5))
    accelerator.backward(losses(model, *samples(2)[:2]).mean())
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05


def test_a_scheduler_whose_optimizer_was_not_prepared_is_refused():
    scheduler = accelerator_of().prepare(StepLR(make_optimizer(make_model()), 1))
    with pytest.raises(TrainingError, match=r"D0604.*StepLR"):
        scheduler.step()


@pytest.mark.parametrize("at", range(STEPS))
def test_an_evaluation_between_micro_steps_does_not_touch_the_open_window(at: int):
    def train(evaluates: bool) -> list[float]:
        accelerator = accelerator_of()
        model = make_model()
        loader, held_out = loader_of(), loader_of(5)
        model, optimizer, loader, held_out = accelerator.prepare(
            model, make_optimizer(model), loader, held_out
        )
        for number, (x, y, _) in enumerate(loader):
            with accelerator.accumulate(model):
                accelerator.backward(losses(model, x, y).mean())
                optimizer.step()
                optimizer.zero_grad()
            if evaluates and number % STEPS == at:
                with torch.no_grad():
                    ends = [accelerator.sync_gradients for x, *_ in held_out if model(x) is not None]
                assert ends[-1]
                assert accelerator.sync_gradients == (loader.micro_step.closes)
        return [x for parameter in model.parameters() for x in parameter.flatten().tolist()]

    assert train(True) == train(False)
