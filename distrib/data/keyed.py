"""Random numbers of data code, keyed by (seed, epoch, sample): neither workers, ranks nor a resume change them.

Augmentation draws from the process's global generators. Seeding all three of them before each sample makes it a
function of the sample; most data sets draw nothing, so they are only watched, and seeded once they are seen to draw.
"""

from __future__ import annotations

import ctypes
import random
import sys
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info

from distrib.seeding import derive

_MASK = 2**64 - 1


def seed_generators(key: int, item: Hashable) -> None:
    """Seed Python's, numpy's and torch's CPU generator with a mix of `key` and `item`.

    Args:
        key: 64 bits.
        item: A sample's index; any other hashable is mixed in by its repr.
    """
    if type(item) is not int:
        key, item = derive(key, repr(item)), 0
    mixed = (key + (item + 2) * 0x9E3779B97F4A7C15) & _MASK
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB & _MASK
    mixed ^= mixed >> 31
    random.seed(mixed)
    np.random.seed(mixed >> 32)
    torch.default_generator.manual_seed(mixed & 0xFFFFFFFF)


class Generators:
    """Streams of the three global generators that exist beside the process's own; swapped in as a context.

    Args:
        seed: Where they start.
    """

    def __init__(self, seed: int) -> None:
        self._seed: int | None = seed
        self._own: Any = None
        self._others: Any = None

    def __enter__(self) -> None:
        self._others = _states()
        if self._seed is not None:
            seed_generators(self._seed, 0)
            self._seed = None
        else:
            _restore(self._own)

    def __exit__(self, *error: object) -> None:
        self._own = _states()
        _restore(self._others)


@contextmanager
def generators_kept() -> Iterator[None]:
    """Put the process's generators back where they were."""
    before = _states()
    try:
        yield
    finally:
        _restore(before)


class Fetch:
    """A map-style data set together with its collate function, for a DataLoader whose batch sampler yields jobs.

    A job is (key, shares): for each share, a list of samples, one batch is made. With `single`, a share is one
    sample and is converted instead of collated.

    Args:
        dataset: The user's.
        collate: The loader's own collate function.
        single: Whether the loader makes no batches (`batch_size=None`).
    """

    def __init__(self, dataset: Any, collate: Callable[[Any], Any], *, single: bool) -> None:
        self.dataset, self.collate, self._single = dataset, collate, single
        self._draws = True  # until the first batch shows that it does not
        self._proven = False

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, job: tuple[int, Sequence[list[Any]]]) -> list[Any]:
        """Return one batch for each share of a job."""
        key, shares = job
        if not self._draws:
            before = fingerprint()
            batches = list(map(self._batch, shares))
            if fingerprint() == before:
                return batches
            self._draws = self._proven = True  # only now: make this batch again, as if it had been known
        if get_worker_info() is None:
            with generators_kept():
                return self._seeded(key, shares)
        return self._seeded(key, shares)

    def _batch(self, share: list[Any]) -> Any:
        dataset = self.dataset
        if self._single:
            return self.collate(dataset[share[0]])
        fetch = getattr(dataset, "__getitems__", None)
        return self.collate(fetch(share) if fetch else [dataset[i] for i in share])

    def _seeded(self, key: int, shares: Sequence[list[Any]]) -> list[Any]:
        drew, batches = False, []
        for share in shares:
            samples = []
            for i in share:
                seed_generators(key, i)
                before = None if self._proven else fingerprint()
                samples.append(self.dataset[i])
                drew = drew or (before is not None and fingerprint() != before)
            seed_generators(derive(key, "collate"), share[0])
            before = None if self._proven else fingerprint()
            batches.append(self.collate(samples[0] if self._single else samples))
            drew = drew or (before is not None and fingerprint() != before)
        if not self._proven:
            self._draws = self._proven = drew
        return batches


def fingerprint() -> tuple[Any, ...]:
    """Return a few bytes that change when anybody draws from one of the three global generators; costs 2 us."""
    python = (_python_index.value, _python_word.value) if _knows_python else random.getstate()
    state = torch.default_generator.get_state().numpy().tobytes()
    return state, python, _numpy_index.value, _numpy_word.value


def _states() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state(legacy=False), torch.default_generator.get_state()


def _restore(states: tuple[Any, ...]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.default_generator.set_state(states[2])


def _int_at(address: int) -> ctypes.c_int:
    return ctypes.c_int.from_address(address)


# Both are Mersenne twisters: 624 words that are made anew together, and the index of the next word to use. numpy
# documents the address of its struct {uint32 key[624]; int pos}; CPython's object is {header; int index; uint32[624]}
# in all versions so far. Where it is not, the state is copied, which costs 10 us.
_numpy_at = int(np.random.mtrand._rand._bit_generator.ctypes.state_address)
_numpy_word, _numpy_index = _int_at(_numpy_at), _int_at(_numpy_at + 4 * 624)
_python_at = id(random.seed.__self__) + object.__basicsize__  # type: ignore[attr-defined]
_python_index, _python_word = _int_at(_python_at), _int_at(_python_at + 4)
_knows_python = sys.implementation.name == "cpython" and _python_index.value == random.getstate()[1][-1]
