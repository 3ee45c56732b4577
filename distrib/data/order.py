"""The order of samples in an epoch, as a function that maps any position to a sample in constant time and memory."""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]

_ROUNDS = 8  # even, so that both halves come out where they went in


class Order(Protocol):
    """A bijection of range(n)."""

    def __call__(self, positions: Indices) -> Indices:
        """Return the samples at `positions`, (k,) int64 in [0, n)."""
        ...


class Sequential:
    """The identity: sample i stands at position i."""

    def __call__(self, positions: Indices) -> Indices:
        return positions


class Permutation:
    """A keyed pseudo-random permutation of range(n), evaluated only where it is asked.

    A generalised Feistel network on Z_a x Z_b with a * b just above n, and "cycle walking": a position that leaves
    [0, n) is encrypted again until it comes back (both: Black and Rogaway, "Ciphers with arbitrary finite domains",
    2002). With a = ceil(sqrt(n)) fewer than sqrt(n) + 1 positions of the domain lie outside, so hardly any position
    needs a second pass. The round function is the finaliser of SplitMix64 (Steele, Lea and Flood, 2014).

    Args:
        n: Number of samples.
        key: Any 64-bit integer; equal keys give equal permutations on every platform.
    """

    def __init__(self, n: int, key: int) -> None:
        self.n = n
        left = max(1, math.isqrt(max(n - 1, 0)) + 1)
        self._sizes = np.uint64(left), np.uint64(max(1, -(-n // left)))
        self._keys = _mix(np.uint64(key % 2**64) + np.arange(1, _ROUNDS + 1, dtype=np.uint64) * _GOLDEN)

    def __call__(self, positions: Indices) -> Indices:
        found = self._encrypt(positions.astype(np.uint64))
        outside = np.flatnonzero(found >= self.n)
        while outside.size:
            again = self._encrypt(found[outside])
            found[outside] = again
            outside = outside[again >= self.n]
        return found.astype(np.int64)

    def _encrypt(self, values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        left, right = values % self._sizes[0], values // self._sizes[0]
        for number, key in enumerate(self._keys):
            size = self._sizes[number % 2]
            left, right = right, (left + _mix(right ^ key) % size) % size
        return right * self._sizes[0] + left


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
