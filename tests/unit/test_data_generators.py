"""Draws from the three global generators: none goes unseen, whichever way the generators are looked at."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch

from distrib.data import keyed
from distrib.data.keyed import Fetch, fingerprint, generators_kept

DRAWS: dict[str, Callable[[], object]] = {
    "random.random": random.random,
    "random.getrandbits": lambda: random.getrandbits(3),
    "random.gauss": lambda: random.gauss(0.0, 1.0),
    "random.shuffle": lambda: random.shuffle([1, 2, 3]),
    "np.random.rand": np.random.rand,
    "np.random.randn": np.random.randn,
    "np.random.randint": lambda: np.random.randint(7),
    "np.random.binomial": lambda: np.random.binomial(5, 0.3),
    "np.random.permutation": lambda: np.random.permutation(3),
    "torch.rand": lambda: torch.rand(()),
    "torch.randn": lambda: torch.randn(()),
    "torch.randn in float64": lambda: torch.randn((), dtype=torch.float64),
    "torch.randint": lambda: torch.randint(2**40, ()),
    "torch.randperm": lambda: torch.randperm(5),
    "torch.nn.functional.dropout": lambda: torch.nn.functional.dropout(torch.ones(3)),
}
LOOKS = {"memory": (), "copies": ("_python_memory", "_numpy_memory", "_torch_memory")}


@pytest.fixture(params=LOOKS)
def look(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Look at the generators' memory, as here, and by the public calls, as where the memory is laid out otherwise."""
    for name in LOOKS[request.param]:
        assert getattr(keyed, name) is not None, f"{name}: its layout is not the expected one here"
        monkeypatch.setattr(keyed, name, None)
    with generators_kept():
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        yield


@pytest.mark.parametrize("draw", DRAWS)
def test_every_single_draw_is_seen(look, draw: str):
    # 1300 pass both ends of a twister's 624 words; every second normal number comes from a cache beside the words.
    unseen = []
    for number in range(1300):
        before = fingerprint()
        DRAWS[draw]()
        if fingerprint() == before:
            unseen.append(number)
    assert unseen == []


@pytest.mark.parametrize("words", [623, 624, 625, 1248])
def test_as_many_draws_as_a_twister_has_words_are_seen(look, words: int):
    draws: list[Callable[[], object]] = [
        lambda: random.getrandbits(32 * words),
        lambda: np.random.bytes(4 * words),
        lambda: torch.randint(2**20, (words,)),
    ]
    for draw in draws:
        before = fingerprint()
        draw()
        assert fingerprint() != before


def test_what_draws_nothing_leaves_the_fingerprint_as_it_is(look):
    before = fingerprint()
    torch.rand(3, generator=torch.Generator().manual_seed(1))
    np.random.default_rng(1).random()
    random.Random(1).random()
    torch.stack([torch.ones(2), torch.zeros(2)])
    assert fingerprint() == before


def test_a_torch_whose_generator_hides_its_address_is_looked_at_by_copies(monkeypatch):
    class Hidden:
        def manual_seed(self, seed: int) -> None:
            pass

    monkeypatch.setattr(torch, "Generator", Hidden)
    assert keyed._memory_of_torch() is None


def test_a_torch_whose_words_lie_elsewhere_is_looked_at_by_copies(monkeypatch):
    monkeypatch.setattr(keyed, "_UNLIKELY", 0)  # zeros stand before the seed already
    assert keyed._memory_of_torch() is None


def test_the_generators_memory_is_known_with_the_tested_versions():
    assert None not in [getattr(keyed, name) for name in LOOKS["copies"]]


class LateNormal:
    """Its first batches draw nothing, its sample 5 a single normal number."""

    def __init__(self, draw: Callable[[], float]) -> None:
        self._draw = draw

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> float:
        return float(self._draw()) if i == 5 else 0.0


@pytest.mark.parametrize(
    "draw", [lambda: random.gauss(0.0, 1.0), np.random.randn, lambda: torch.randn(()).item()]
)
def test_a_normal_number_left_over_in_a_cache_is_no_samples_noise(draw: Callable[[], float]):
    def batches(leftovers: int) -> list[list[float]]:
        fetch = Fetch(LateNormal(draw), list, single=False)
        found = [fetch.__getitems__((1, [[0, 1]]))[0]]
        for _ in range(leftovers):  # the loop's own: an odd number of them leaves one in the cache
            draw()
        return [*found, *fetch.__getitems__((1, [[4, 5]]))]

    with generators_kept():
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        assert batches(0) == batches(1) == batches(2)
