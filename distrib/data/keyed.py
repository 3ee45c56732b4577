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

from distrib.errors import DataError
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
        try:
            if not self._draws:
                before = fingerprint()
                batches = list(map(self._batch, shares))
                if fingerprint() == before and len(batches) == len(shares):
                    return batches
                self._draws = self._proven = True  # only now: make this batch again, as if it had been known
            if get_worker_info() is None:
                with generators_kept():
                    return self._seeded(key, shares)
            return self._seeded(key, shares)
        except StopIteration as error:  # would look like the end of the epoch, on this rank alone
            raise DataError(
                "D0520",
                f"{type(self.dataset).__name__} raised StopIteration for a sample among {shares}",
                fix="let its __getitem__, or collate_fn, raise another error, or catch that of the iterator in it",
            ) from error

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
    """Return what changes when anybody draws from one of the three global generators; costs 0.3 us.

    Not only their words count: each keeps the second of two normal numbers for the next call, which then uses no word.
    """
    return (
        (_python_memory.value, _python.gauss_next) if _python_memory is not None else random.getstate(),
        (_numpy_memory[0].raw, _numpy_memory[1].value) if _numpy_memory is not None else _numpy_state(),
        _torch_memory.raw if _torch_memory is not None else _torch_state(),
    )


def _states() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state(legacy=False), torch.default_generator.get_state()


def _restore(states: tuple[Any, ...]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.default_generator.set_state(states[2])


def _numpy_state() -> tuple[Any, ...]:
    state: Any = np.random.get_state(legacy=True)
    return state[1].tobytes(), *state[2:]


def _torch_state() -> bytes:
    return torch.default_generator.get_state().numpy().tobytes()


# All three are Mersenne twisters: 624 words that are made anew together, and the index of the next word to use; the
# index and the word beside it, 8 bytes, tell of a draw. Their memory is read in place. Where one is not laid out as its
# check here expects, its memory is None, and its state is copied by public calls instead, which costs up to 10 us.


def _memory_of_python() -> ctypes.c_uint64 | None:
    """CPython's object is {header; int index; uint32[624]} in all versions so far."""
    if sys.implementation.name != "cpython":
        return None
    memory = ctypes.c_uint64.from_address(id(_python) + object.__basicsize__)
    words = random.getstate()[1]
    expected = words[-1].to_bytes(4, sys.byteorder) + words[0].to_bytes(4, sys.byteorder)
    return memory if bytes(memory) == expected else None


def _memory_of_numpy() -> tuple[Any, ctypes.c_uint64] | None:
    """Return numpy's object, which holds the left-over normal number, and the end of its twister.

    numpy documents the address of the struct {uint32 key[624]; int pos}. Of the object only this is used, and checked
    on one of our own: what it holds changes when a left-over normal number is used.
    """
    if sys.implementation.name != "cpython":
        return None
    own = np.random.RandomState(0)
    held = _held_by(own)
    own.standard_normal()
    before = held.raw
    own.standard_normal()
    if held.raw == before:
        return None
    generator = np.random.mtrand._rand
    address = int(generator._bit_generator.ctypes.state_address)
    return _held_by(generator), ctypes.c_uint64.from_address(address + 4 * 623)


def _held_by(generator: np.random.RandomState) -> Any:
    size = type(generator).__basicsize__ - object.__basicsize__
    return (ctypes.c_char * size).from_address(id(generator) + object.__basicsize__)


def _memory_of_torch() -> Any:
    """Return the engine {uint64 seed; int left; bool seeded; uint32 next; uint32[624]} and both normal numbers after it.

    torch tells where its C++ object lies, but not where the engine lies in that: it is looked for in one of our own,
    behind a seed that stands nowhere else.
    """
    own: Any = torch.Generator()
    own.manual_seed(_UNLIKELY)
    if not hasattr(own, "_cdata"):
        return None
    at = ctypes.string_at(own._cdata, 256).find(_UNLIKELY.to_bytes(8, sys.byteorder))
    if at < 0:
        return None
    memory = (ctypes.c_char * _TORCH_BYTES).from_address(own._cdata + at)
    torch.randint(2**20, (700,), generator=own)
    state = own.get_state().numpy()[24 : 24 + 8 * 624].view(np.uint64)  # the words, stored in 8 bytes each
    if memory.raw[20 : 20 + 4 * 624] != state.astype(np.uint32).tobytes():
        return None
    for kind in (torch.float32, torch.float64):
        torch.randn((), dtype=kind, generator=own)
        before = memory.raw
        torch.randn((), dtype=kind, generator=own)
        if memory.raw[_TORCH_NORMALS:] == before[_TORCH_NORMALS:]:
            return None
    default: Any = torch.default_generator
    return (ctypes.c_char * _TORCH_BYTES).from_address(default._cdata + at)


_UNLIKELY = 0x0123456789ABCDEF
_TORCH_NORMALS = 8 + 4 + 4 + 4 + 4 * 624 + 4  # the last 4 fill up to 8
_TORCH_BYTES = _TORCH_NORMALS + 8 + 16  # optional<float> and optional<double>
_python = random.seed.__self__  # type: ignore[attr-defined]
_python_memory = _memory_of_python()
_numpy_memory = _memory_of_numpy()
_torch_memory = _memory_of_torch()
