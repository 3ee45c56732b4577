"""Named random streams from one seed."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable

import numpy as np
import torch

from distrib.errors import ConfigError

# torch's generators belong to the process, and so does the rule how `set_seed` seeds them: until the first model is
# prepared every rank draws the same numbers (equal initial weights), afterwards each rank its own (dropout).
_noise_rank = 0
_seed_too: dict[str, Callable[[int], None]] = {}  # device -> seeds its generator


def derive(seed: int, *names: object) -> int:
    """Return the seed of the stream `names` below `seed`, in [0, 2**63): equal on every platform."""
    text = "/".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def set_seed(seed: int, *, deterministic: bool = False) -> None:
    """Seed Python, numpy and torch (all devices).

    Before the first `prepare` of a model every rank draws the same numbers, so that models start out equal; from
    then on torch's generators differ by rank, so that dropout does. Rank 0 draws what a plain single-process
    script with `torch.manual_seed(seed)` draws.

    Args:
        seed: Any non-negative integer below 2**64.
        deterministic: Also ask torch for deterministic algorithms.

    Raises:
        ConfigError: D0122, for anything else than such a number.
    """
    if not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ConfigError(
            "D0122", f"set_seed was given {seed!r}; expected a whole number from 0 to 2**64 - 1"
        )
    random.seed(seed)
    np.random.seed(seed % 2**32)
    _seed_noise(seed)
    if deterministic:
        torch.use_deterministic_algorithms(True)


def part_noise_streams(rank: int, seed: int | None) -> None:
    """Give this rank's torch generators a stream of their own, once; rank 0 goes on with the one it has.

    Args:
        rank: This rank; from now on `set_seed` seeds its own stream.
        seed: The run's seed; None if the generators have just been restored and must stay as they are.
    """
    global _noise_rank  # noqa: PLW0603 (see above)
    if rank != _noise_rank:
        _noise_rank = rank
        if seed is not None:
            _seed_noise(seed)


def seed_too(device: str, seed: Callable[[int], None]) -> None:
    """Seed the generator of a kind of device, of which `torch.manual_seed` does not know, from now on as well."""
    _seed_too[device] = seed


def _seed_noise(seed: int) -> None:
    noise = _noise_seed(seed)
    torch.manual_seed(noise)
    for seed_device in _seed_too.values():
        seed_device(noise)


def _noise_seed(seed: int) -> int:
    return derive(seed, "noise", _noise_rank) if _noise_rank else seed
