"""Named random streams from one seed."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from distrib import seeding
from distrib.seeding import derive, part_noise_streams, set_seed

seeds = st.integers(0, 2**64 - 1)
names = st.lists(st.text("abcxyz", min_size=1) | st.integers(0, 10**9), max_size=3).map(tuple)


@pytest.fixture(autouse=True)
def generators_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Start as rank 0, and give Python's, numpy's and torch's generators back as they were."""
    monkeypatch.setattr(seeding, "_noise_rank", 0)
    python, ours, theirs = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(python)
    np.random.set_state(ours)
    torch.set_rng_state(theirs)


def drawn() -> tuple[float, float, float]:
    """Draw from each global generator."""
    return random.random(), float(np.random.random()), float(torch.rand(()))


def noise(seed: int) -> float:
    set_seed(seed)
    return float(torch.rand(()))


@given(seed=seeds, stream=names)
def test_a_derived_seed_fits_every_generator_and_is_repeated(seed: int, stream: tuple):
    derived = derive(seed, *stream)
    assert derived == derive(seed, *stream)
    assert 0 <= derived < 2**63


@given(a=st.tuples(seeds, names), b=st.tuples(seeds, names))
def test_another_seed_or_name_gives_another_stream(a: tuple, b: tuple):
    assert (derive(a[0], *a[1]) == derive(b[0], *b[1])) == (texts(a) == texts(b))


def texts(stream: tuple) -> list[str]:
    seed, path = stream
    return [str(seed), *map(str, path)]


def test_derived_seeds_are_the_same_on_every_platform_and_in_every_version():
    # Checkpoints store the seed alone: another rule would resume with other samples and other dropout.
    assert derive(0) == 4246866556266386882
    assert derive(7, "order", 3) == 4973603909648859553
    assert derive(2**64 - 1, "noise", 1) == 8784211811024252562


def test_the_streams_of_one_seed_have_no_seed_in_common():
    streams = ["order", "workers", "noise", "loader"]
    found = {derive(seed, name, i) for seed in range(20) for name in streams for i in range(20)}
    assert len(found) == 20 * 4 * 20


@given(seed=seeds)
@settings(deadline=None)
def test_one_seed_repeats_the_numbers_of_python_numpy_and_torch(seed: int):
    set_seed(seed)
    first = drawn()
    set_seed(seed)
    assert drawn() == first


def test_another_seed_changes_the_numbers_of_python_numpy_and_torch():
    set_seed(1)
    first = drawn()
    set_seed(2)
    assert all(a != b for a, b in zip(first, drawn(), strict=True))


def test_rank_0_draws_what_a_plain_script_with_manual_seed_draws():
    set_seed(11)
    ours = torch.rand(3)
    torch.manual_seed(11)
    assert torch.equal(ours, torch.rand(3))


def test_before_the_first_prepare_every_rank_draws_the_same():
    assert noise(5) == noise(5)
    assert seeding._noise_rank == 0


def test_after_it_every_rank_draws_its_own_numbers_and_rank_0_goes_on():
    set_seed(5)
    torch.rand(3)  # the model's weights
    weights_done = torch.get_rng_state()
    found = []
    for rank in range(4):
        seeding._noise_rank = 0  # as in a process of its own
        torch.set_rng_state(weights_done)
        part_noise_streams(rank, 5)
        found.append(float(torch.rand(())))
    torch.set_rng_state(weights_done)
    assert found[0] == float(torch.rand(()))
    assert len(set(found)) == 4


def test_a_rank_has_the_same_stream_of_its_own_in_every_run():
    found = []
    for _ in range(2):
        seeding._noise_rank = 0
        part_noise_streams(2, 5)
        found.append(float(torch.rand(())))
    assert found[0] == found[1]


def test_python_and_numpy_draw_the_same_on_every_rank_afterwards():
    found = []
    for rank in (0, 3):
        part_noise_streams(rank, 5)
        set_seed(5)
        found.append(drawn()[:2])
    assert found[0] == found[1]


def test_set_seed_after_the_first_prepare_keeps_the_ranks_apart():
    at_rank_0 = noise(5)
    part_noise_streams(1, 5)
    assert noise(5) != at_rank_0
    assert noise(5) == noise(5)


def test_the_second_model_does_not_start_the_stream_anew():
    part_noise_streams(1, 5)
    first = float(torch.rand(()))
    part_noise_streams(1, 5)
    assert float(torch.rand(())) != first


def test_generators_that_were_just_restored_stay_as_they_are():
    torch.manual_seed(99)
    part_noise_streams(1, None)
    after = torch.rand(3)
    torch.manual_seed(99)
    assert torch.equal(after, torch.rand(3))


@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_algorithms_are_asked_for_only_on_request(
    monkeypatch: pytest.MonkeyPatch, deterministic: bool
):
    before = torch.are_deterministic_algorithms_enabled()
    try:
        set_seed(1, deterministic=deterministic)
        assert torch.are_deterministic_algorithms_enabled() == (before or deterministic)
    finally:
        torch.use_deterministic_algorithms(before)
