"""Mistakes that users of other runtimes suffer from, each as the run that shows it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from distrib import Accelerator, RunConfig, set_seed
from distrib.errors import DataError, StrategyError, TrainingError
from distrib.testing import ranks, run_ranks


def weight() -> nn.Linear:
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    return model


def gradients_of_each_step(num_samples: int, accumulation: int) -> list[float]:
    """Loss of a sample is w, so that its gradient is 1 wherever it lies."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    model = weight()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = TensorDataset(torch.ones(num_samples, 1).double())
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data, batch_size=1))
    found = []
    for (x,) in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(x).mean())
            if accelerator.sync_gradients:
                found.append(accelerator.unwrap_model(model).weight.grad.item())
            optimizer.step()
            optimizer.zero_grad()
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_last_shorter_window_has_a_whole_gradient(world_size):
    for found in run_ranks(gradients_of_each_step, world_size, 5 * world_size, 2):
        assert found == pytest.approx([1.0, 1.0, 1.0], abs=1e-12)


def learning_rates(calls: str) -> list[float]:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = weight()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    loader = DataLoader(TensorDataset(torch.ones(24, 1).double()), batch_size=1)
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
    found = []
    for (x,) in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(x).mean())
            optimizer.step()
            if accelerator.sync_gradients:
                found.append(optimizer.param_groups[0]["lr"])
            if calls == "each batch" or accelerator.sync_gradients:
                scheduler.step()
            optimizer.zero_grad()
    return found[:4]


@pytest.mark.parametrize("calls", ["each batch", "each step"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_schedule_moves_once_per_optimizer_step(world_size, calls):
    for found in run_ranks(learning_rates, world_size, calls):
        assert found == pytest.approx([1.0, 1.0, 1.0, 0.1])


TOKENS = {0: (1, 7), 1: (3, 1)}  # rank -> tokens of its micro-batches


def token_mean_gradient(count: bool) -> float:
    """Gradient of a micro-batch's token sum is its number of tokens squared, so that the mean of means differs."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = weight()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model, optimizer = accelerator.prepare(model, optimizer)
    for tokens in TOKENS[accelerator.process_index]:
        with accelerator.accumulate(model):
            total = model(torch.full((tokens, 1), float(tokens)).double()).sum()
            if count:
                accelerator.backward(total, count=tokens)
            else:
                accelerator.backward(total / tokens)
            optimizer.step()
    return -accelerator.unwrap_model(model).weight.item()


def test_counts_give_the_mean_over_all_tokens():
    expected = sum(n * n for pair in TOKENS.values() for n in pair) / sum(
        n for pair in TOKENS.values() for n in pair
    )
    assert run_ranks(token_mean_gradient, 2, True) == pytest.approx([expected] * 2)
    assert run_ranks(token_mean_gradient, 2, False) == pytest.approx(
        [3.0] * 2
    )  # the mean of means, as it says


def ids_seen(folder, stop_after, skip, epochs=2):
    """Read a shuffled loader; save after `stop_after` batches, or resume and call skip_first_batches too."""
    accelerator = Accelerator(cpu=True, seed=5, project_dir=folder, global_batch_size=4)
    loader = accelerator.prepare(DataLoader(TensorDataset(torch.arange(24)), batch_size=2, shuffle=True))
    resumed = accelerator.load_state() is not None if skip is not None else False
    seen, batches = [], 0
    for epoch in range(loader.epoch, epochs):
        active = accelerator.skip_first_batches(loader, skip) if resumed and epoch == loader.epoch else loader
        resumed = False
        for (x,) in active:
            seen += accelerator.gather_for_metrics(x).tolist()
            batches += 1
            if batches == stop_after:
                accelerator.save_state()
                return seen
    return seen


@pytest.mark.parametrize(("before", "after", "batches"), [(1, 1, 16), (2, 2, 8), (1, 2, 16), (2, 1, 8)])
def test_load_state_then_skip_first_batches_reads_each_sample_once(tmp_path, before, after, batches):
    whole = run_ranks(ids_seen, before, tmp_path / "whole", None, None)[0]
    seen = run_ranks(ids_seen, before, tmp_path / "cut", batches, None)[0]
    rest = run_ranks(ids_seen, after, tmp_path / "cut", None, batches)[0]
    windows = [sorted(whole[i : i + 4]) for i in range(0, 48, 4)]
    again = seen + rest
    assert [sorted(again[i : i + 4]) for i in range(0, len(again), 4)] == windows


@ranks(1, 2, 3)
def test_metrics_hold_each_sample_once_in_order():
    accelerator = Accelerator(cpu=True)
    outer = accelerator.prepare(DataLoader(TensorDataset(torch.arange(10)), batch_size=4))
    inner = accelerator.prepare(DataLoader(TensorDataset(torch.arange(7)), batch_size=3))
    seen = []
    for (x,) in outer:
        found, objects = [], []
        for (y,) in inner:
            found += accelerator.gather_for_metrics({"y": (y, [y * 2])})["y"][1][0].tolist()
            objects += accelerator.gather_for_metrics([{"id": int(i)} for i in y], use_gather_object=True)
        assert found == [2 * i for i in range(7)]
        assert [item["id"] for item in objects] == list(range(7))
        seen += accelerator.gather_for_metrics(x).tolist()
    assert seen == list(range(10))


@ranks(2)
def test_a_mean_given_to_gather_for_metrics_is_an_error():
    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(DataLoader(TensorDataset(torch.arange(9.0)), batch_size=4))
    for (x,) in loader:
        with pytest.raises(DataError, match="leading dim of"):
            accelerator.gather_for_metrics(x.mean())


@ranks(2)
def test_a_rank_without_samples_gets_a_stand_in_that_counts_nothing():
    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(DataLoader(TensorDataset(torch.arange(5)), batch_size=2))
    *_, last = [(x, accelerator.batch_size, accelerator.sample_mask.tolist()) for (x,) in loader]
    assert last[0].tolist() == [4]
    assert last[1:] == ((1, [True]) if accelerator.is_main_process else (0, [False]))


@ranks(2)
def test_padding_is_masked_and_left_out_of_metrics():
    accelerator = Accelerator(RunConfig(data={"tail": "pad"}, device="cpu"))
    loader = accelerator.prepare(DataLoader(TensorDataset(torch.arange(6)), batch_size=2))
    seen, masks = [], []
    for (x,) in loader:
        assert len(x) == 2
        seen += accelerator.gather_for_metrics(x).tolist()
        masks += accelerator.gather(accelerator.sample_mask).tolist()
    assert seen == list(range(6))
    assert masks == [True] * 4 + [True, False] * 2


@ranks(2)
def test_dropout_differs_by_rank_and_weights_do_not():
    accelerator = Accelerator(cpu=True)
    set_seed(0)
    model = accelerator.prepare(nn.Linear(4, 4))
    weights = accelerator.gather(accelerator.unwrap_model(model).weight.detach())
    assert torch.equal(weights[:4], weights[4:])
    masks = accelerator.gather(nn.functional.dropout(torch.ones(1, 64)))
    assert not torch.equal(masks[0], masks[1])
    set_seed(0)
    again = accelerator.gather(nn.functional.dropout(torch.ones(1, 64)))
    assert not torch.equal(again[0], again[1])


@ranks(1, 2)
def test_a_step_in_mid_batch_without_accumulate_is_an_error():
    accelerator = Accelerator(cpu=True, global_batch_size=8)
    model = weight()
    loader = DataLoader(TensorDataset(torch.ones(8, 1).double()), batch_size=1)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0), loader)
    batches = iter(loader)
    (x,) = next(batches)
    accelerator.backward(model(x).mean())
    with pytest.raises(TrainingError, match="accumulate"):
        optimizer.step()


@ranks(2)
def test_a_count_of_zero_skips_the_step_and_the_schedule():
    accelerator = Accelerator(cpu=True)
    model = weight()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    accelerator.backward(model(torch.ones(1, 1).double()).sum() * 0, count=0)
    optimizer.step()
    scheduler.step()
    assert accelerator.optimizer_step_was_skipped
    assert optimizer.param_groups[0]["lr"] == 1.0


@ranks(1)
def test_unequal_counts_in_one_micro_step_name_both():
    accelerator = Accelerator(cpu=True)
    model = weight()
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
    with accelerator.accumulate(model):
        accelerator.backward(model(torch.ones(1, 1).double()).sum(), count=3)
        with pytest.raises(TrainingError, match="3 and 4"):
            accelerator.backward(model(torch.ones(1, 1).double()).sum(), count=4)


@ranks(2)
def test_bf16_trains_and_gives_wide_outputs():
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = nn.Linear(4, 2)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    out = model(torch.ones(3, 4))
    assert out.dtype == torch.float32
    accelerator.backward(out.sum())
    optimizer.step()
    assert accelerator.unwrap_model(model).weight.dtype == torch.float32


@pytest.mark.parametrize("what", ["of no model", "unfrozen", "of a group that came later"])
@ranks(2)
def test_a_gradient_that_nothing_averages_is_refused(what: str):
    accelerator = Accelerator(cpu=True)
    model = nn.Linear(2, 1)
    own = nn.Parameter(torch.ones(()))
    if what == "unfrozen":
        model.bias.requires_grad_(False)
    optimizer = torch.optim.SGD([*model.parameters(), *([own] if what == "of no model" else [])], lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.backward(model(torch.ones(1, 2)).sum())
    optimizer.step()  # right: no such gradient so far
    optimizer.zero_grad()
    accelerator.unwrap_model(model).bias.requires_grad_(True)
    if what == "of a group that came later":
        optimizer.add_param_group({"params": [own]})
    factor = 1 if what == "unfrozen" else own
    accelerator.backward(model(torch.ones(1, 2)).sum() * factor)
    with pytest.raises(StrategyError, match="D0812"):
        optimizer.step()


@ranks(1, 2)
def test_a_model_that_is_compiled_after_prepare_keeps_its_names():
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(nn.Linear(2, 1))
    compiled = torch.compile(prepared)
    assert accelerator.prepare(compiled) is compiled
    assert isinstance(accelerator.unwrap_model(compiled, keep_torch_compile=False), nn.Linear)
    assert sorted(accelerator.get_state_dict(compiled)) == ["bias", "weight"]


@ranks(2)
def test_a_model_that_is_wrapped_already_is_refused():
    accelerator = Accelerator(cpu=True)
    wrapped = nn.parallel.DistributedDataParallel(nn.Linear(2, 1))
    with pytest.raises(StrategyError, match="D0813"):
        accelerator.prepare(wrapped)


@ranks(1, 2)
def test_what_is_given_to_prepare_twice_in_one_call_is_one_model():
    accelerator = Accelerator(cpu=True)
    model = nn.Linear(2, 1)
    first, second = accelerator.prepare(model, model)
    assert first is second
    assert len(accelerator._run.models) == 1


@ranks(2)
def test_the_end_of_one_accelerator_leaves_the_process_group_to_another():
    first, second = Accelerator(cpu=True), Accelerator(cpu=True)
    first.end_training()
    assert second.gather(torch.tensor([second.process_index])).tolist() == [0, 1]
    second.end_training()
    assert not torch.distributed.is_initialized()
