"""The order of samples: a keyed permutation of range(n) that is evaluated only where it is asked."""

from __future__ import annotations

import time
import tracemalloc
from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from distrib.data.order import Permutation, Sequential

BILLION = 10**9
lengths = st.integers(1, 3000)
keys = st.integers(0, 2**64 - 1)


def whole(n: int, key: int) -> np.ndarray:
    return Permutation(n, key)(np.arange(n))


def is_bijection(order: np.ndarray, n: int) -> bool:
    return np.array_equal(np.sort(order), np.arange(n))


@given(n=lengths, key=keys)
@settings(deadline=None)
def test_every_sample_stands_at_exactly_one_position(n: int, key: int):
    assert is_bijection(whole(n, key), n)


def test_every_length_up_to_3000_has_each_sample_once():
    wrong = [n for n in range(1, 3001) if not is_bijection(whole(n, n * 7919), n)]
    assert wrong == []


@given(n=lengths, key=keys, data=st.data())
@settings(deadline=None)
def test_any_positions_are_those_of_the_whole_order(n: int, key: int, data: st.DataObject):
    positions = np.array(data.draw(st.lists(st.integers(0, n - 1), max_size=20)), dtype=np.int64)
    assert np.array_equal(Permutation(n, key)(positions), whole(n, key)[positions])


@given(n=lengths, key=keys)
@settings(deadline=None)
def test_equal_keys_give_equal_orders(n: int, key: int):
    assert np.array_equal(whole(n, key), whole(n, key))


@given(n=st.integers(20, 3000), first=keys, second=keys)
@settings(deadline=None)
def test_different_keys_give_different_orders(n: int, first: int, second: int):
    assert (first == second) == np.array_equal(whole(n, first), whole(n, second))


def test_neighbouring_keys_share_about_as_many_fixed_points_as_chance_has_it():
    n = 1000
    shared = [int((whole(n, key) == whole(n, key + 1)).sum()) for key in range(200)]
    assert 100 < sum(shared) < 320  # Poisson with mean 1 each: 200 in all, standard deviation 14


def test_the_order_is_the_same_on_every_platform_and_in_every_version():
    # A checkpoint stores the seed and a position only: another order would resume with other samples.
    assert whole(10, 0).tolist() == [3, 2, 9, 0, 5, 6, 1, 8, 7, 4]
    assert whole(1000, 2**63 + 1)[[0, 1, 500, 999]].tolist() == [429, 434, 842, 162]
    assert Permutation(BILLION, 7)(np.array([0, BILLION - 1])).tolist() == [172238643, 23838066]


def test_the_last_position_of_a_billion_is_found_at_once():
    positions = np.array([BILLION - 1], dtype=np.int64)
    Permutation(BILLION, 3)(positions)  # loads what numpy loads at its first use
    tracemalloc.start()
    started = time.process_time()
    (sample,) = Permutation(BILLION, 3)(positions).tolist()
    seconds = time.process_time() - started
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 0 <= sample < BILLION
    assert seconds < 0.01
    assert peak_bytes < 10e6


@given(start=st.integers(0, BILLION - 1000), key=keys)
@settings(deadline=None, max_examples=30)
def test_a_stretch_of_a_billion_has_no_sample_twice(start: int, key: int):
    found = Permutation(BILLION, key)(np.arange(start, start + 1000))
    assert len(set(found.tolist())) == 1000
    assert found.min() >= 0
    assert found.max() < BILLION


@pytest.mark.parametrize("n", [2, 3, 4])
def test_every_order_of_a_few_samples_is_about_equally_frequent(n: int):
    orders = len(list(permutations(range(n))))
    draws = 200 * orders
    counts = Counter(tuple(whole(n, key).tolist()) for key in range(draws))
    expected = draws / orders
    assert len(counts) == orders
    for count in counts.values():
        assert abs(count - expected) < 5 * expected**0.5


@pytest.mark.parametrize("n", [5, 17, 50])
@pytest.mark.parametrize("position", ["first", "last"])
def test_every_sample_is_about_equally_frequent_at_a_position(n: int, position: str):
    draws = 200 * n
    at = np.array([0 if position == "first" else n - 1])
    counts = Counter(int(Permutation(n, key)(at)[0]) for key in range(draws))
    chi_square = sum((counts[sample] - 200) ** 2 / 200 for sample in range(n))
    assert chi_square < n - 1 + 5 * (2 * (n - 1)) ** 0.5  # mean n - 1, standard deviation sqrt(2(n - 1))


def test_neighbours_in_the_order_are_no_neighbours_in_the_data():
    order = whole(3000, 5)
    assert (np.abs(np.diff(order)) == 1).sum() < 12  # 2 are expected by chance
    assert abs(np.corrcoef(np.arange(3000), order)[0, 1]) < 0.1


@given(positions=st.lists(st.integers(0, BILLION)))
def test_the_sequential_order_is_the_identity(positions: list[int]):
    assert Sequential()(np.array(positions, dtype=np.int64)).tolist() == positions
