"""After 20 optimizer steps every strategy has the parameters of a plain loop on the same global batches."""

from __future__ import annotations

import pytest
import torch

from distrib.testing import run_ranks
from tests.contract.layouts import PLAIN, VARIED, dtype_of, in_each, readers, tolerances
from tests.contract.plain import train_plainly
from tests.contract.training import shuffled_order, train

STEPS = 20


in_every_world = pytest.mark.parametrize(("strategy", "world_size"), in_each(PLAIN))


def assert_same(found, expected, *, rtol=1e-9, atol=1e-12):
    parameters, losses, ids = found
    true_parameters, true_losses, true_ids = expected
    assert ids == true_ids
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(true_losses), rtol=1e-5, atol=1e-5)
    for name, value in true_parameters.items():
        torch.testing.assert_close(parameters[name], value, rtol=rtol, atol=atol, msg=name)


@in_every_world
@pytest.mark.parametrize("accumulation", [1, 3, 4])
def test_parameters_equal_those_of_a_plain_loop(strategy, world_size, accumulation):
    n, micro = 53, 2  # 53 leaves a ragged tail in every window and micro-step
    dtype = dtype_of(strategy)
    expected = train_plainly(
        n, micro * world_size * accumulation, STEPS, lambda _: list(range(n)), dtype=dtype
    )
    for found in run_ranks(train, world_size, strategy, n, micro, accumulation, STEPS, dtype=dtype):
        assert_same(found, expected, **tolerances(strategy))


@in_every_world
@pytest.mark.parametrize("accumulation", [1, 3])
def test_token_counts_give_the_mean_over_all_tokens(strategy, world_size, accumulation):
    n, micro = 41, 3
    size = micro * world_size * accumulation
    options = {"counted": True, "clip": 0.3, "dtype": dtype_of(strategy)}
    expected = train_plainly(n, size, STEPS, lambda _: list(range(n)), **options)
    for found in run_ranks(train, world_size, strategy, n, micro, accumulation, STEPS, **options):
        assert_same(found, expected, **tolerances(strategy))


@in_every_world
def test_shuffled_epochs_meet_the_same_samples_in_each_step(strategy, world_size):
    n, size = 29, 12
    expected = train_plainly(n, size, STEPS, shuffled_order(n, 11), dtype=dtype_of(strategy))
    found = run_ranks(
        train,
        world_size,
        strategy,
        n,
        2,
        None,
        STEPS,
        shuffle=True,
        global_batch=size,
        workers=2,
        zero_grad="start",
        dtype=dtype_of(strategy),
    )
    assert_same(found[0], expected, **tolerances(strategy))


@in_every_world
def test_clipping_sees_the_norm_of_the_whole_batch(strategy, world_size):
    n = 24
    options = {"clip": 0.1, "dtype": dtype_of(strategy)}
    expected = train_plainly(n, 12, STEPS, lambda _: list(range(n)), **options)
    found = run_ranks(train, world_size, strategy, n, 2, None, STEPS, global_batch=12, **options)
    assert_same(found[0], expected, **tolerances(strategy))


@in_every_world
def test_float32_stays_within_rounding(strategy, world_size):
    n = 31
    expected = train_plainly(n, 12, STEPS, lambda _: list(range(n)), dtype=torch.float32)
    found = run_ranks(train, world_size, strategy, n, 2, None, STEPS, global_batch=12, dtype=torch.float32)
    assert_same(found[0], expected, rtol=0, atol=2e-5)


@in_every_world
def test_drop_leaves_out_the_last_shorter_batch(strategy, world_size):
    n = 27
    dtype = dtype_of(strategy)
    expected = train_plainly(n, 12, STEPS, lambda _: list(range(n)), drop=True, dtype=dtype)
    found = run_ranks(
        train, world_size, strategy, n, 2, None, STEPS, tail="drop", global_batch=12, dtype=dtype
    )
    assert_same(found[0], expected, **tolerances(strategy))


@pytest.mark.parametrize(("layout", "world_size"), in_each(VARIED))
@pytest.mark.parametrize("counted", [False, True], ids=["mean", "tokens"])
def test_every_layout_gives_the_parameters_of_a_plain_loop(layout, world_size, counted):
    n, micro, accumulation = 53, 2, 3
    size = micro * readers(layout, world_size) * accumulation
    options = {"counted": counted, "clip": 0.3, "dtype": dtype_of(layout)}
    expected = train_plainly(n, size, STEPS, lambda _: list(range(n)), **options)
    for found in run_ranks(train, world_size, layout, n, micro, accumulation, STEPS, **options):
        assert_same(found, expected, **tolerances(layout))
