"""The order of samples in an epoch, as a function that maps any position to a sample in constant time and memory."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]

_ROUNDS = 8
_MIN_HALF_BITS = 3  # below this the halves of a tiny data set are too narrow for the rounds to mix them


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

    A balanced Feistel network (Luby and Rackoff, "How to construct pseudorandom permutations", 1988) permutes the
    smallest even-bit domain that holds n; positions that leave [0, n) are encrypted again until they come back
    ("cycle walking": Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). The domain is less than
    4n for n > 16, so a position needs fewer than four passes on average. The round function is the finaliser of
    SplitMix64 (Steele, Lea and Flood, 2014).

    Args:
        n: Number of samples.
        key: Any 64-bit integer; equal keys give equal permutations on every platform.
    """

    def __init__(self, n: int, key: int) -> None:
        self.n = n
        self._half = max(_MIN_HALF_BITS, -(-max(n - 1, 1).bit_length() // 2))
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
        half, mask = np.uint64(self._half), np.uint64(2**self._half - 1)
        left, right = values >> half, values & mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        return left << half | right


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
