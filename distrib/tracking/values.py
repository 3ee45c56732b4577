"""Values as each rank has them, and one number for all ranks, as declared."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from distrib.collectives.base import Collectives
from distrib.errors import DataError

Number = float | torch.Tensor


@dataclass(frozen=True)
class Mean:
    """Reduce to the weighted mean over the ranks; a weight of 0 leaves the rank out, whatever its value."""

    value: Number
    weight: Number = 1


@dataclass(frozen=True)
class Sum:
    """Reduce to the sum over the ranks."""

    value: Number


@dataclass(frozen=True)
class Max:
    """Reduce to the largest value of any rank."""

    value: Number


@dataclass(frozen=True)
class Min:
    """Reduce to the smallest value of any rank."""

    value: Number


Rows = Sequence[tuple[float, float]]  # (value, weight) of each rank


def _mean(rows: Rows) -> float:
    total = math.fsum(weight for _, weight in rows)
    return sum(value * weight for value, weight in rows if weight) / total if total else math.nan


_REDUCE: dict[type, Callable[[Rows], float]] = {
    Mean: _mean,
    Sum: lambda rows: sum(value for value, _ in rows),
    Max: lambda rows: _extreme(max, rows),
    Min: lambda rows: _extreme(min, rows),
}


def _extreme(choose: Callable[[Iterator[float]], float], rows: Rows) -> float:
    """Return the largest or smallest value; one that is not a number wins, as in torch."""
    if any(math.isnan(value) for value, _ in rows):
        return math.nan
    return choose(value for value, _ in rows)


def reduce_values(values: Mapping[str, Any], collectives: Collectives) -> dict[str, float]:
    """Reduce all values over the ranks, each as declared, in one collective. Collective.

    Args:
        values: Name -> Mean, Sum, Max or Min of a number; a bare number is a Mean. A mapping inside gives names with
            parts: {"eval": {"loss": 1.0}} is "eval/loss". Equal names on all ranks, in any order.
        collectives: How they travel.

    Returns:
        Name -> number, equal on every rank, in this rank's order.

    Raises:
        DataError: for a value that is no number, naming it.
        CollectiveError: if the ranks do not log the same names in the same way.
    """
    declared = dict(_flat(values, ""))
    names = sorted(declared)
    rows = torch.tensor([_row(name, declared[name]) for name in names], dtype=torch.float64, device="cpu")
    rows = rows.reshape(len(names), 2)  # also if there are none: other ranks may have some, and wait
    label = ", ".join(f"{type(declared[name]).__name__} {name}" for name in names)
    everyone = collectives.gather({label: rows[None]})[label].tolist()
    reduced = {
        name: _REDUCE[type(declared[name])]([rank[i] for rank in everyone]) for i, name in enumerate(names)
    }
    return {name: reduced[name] for name in declared}


def _flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Mean | Sum | Max | Min]]:
    for name, value in values.items():
        full = f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{full}/")
        elif isinstance(value, (Mean, Sum, Max, Min)):
            yield full, value
        else:
            yield full, Mean(value)


def _row(name: str, declared: Mean | Sum | Max | Min) -> tuple[float, float]:
    weight = _number(f"the weight of {name}", declared.weight) if isinstance(declared, Mean) else 1.0
    return _number(name, declared.value), weight


def _number(name: str, value: Any) -> float:
    if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_complex():
        return float(value.detach().item())
    if isinstance(value, (numbers.Real, np.bool_)) or (isinstance(value, np.ndarray) and value.size == 1):
        return float(value)
    what = repr(value)[:60]
    if isinstance(value, (torch.Tensor, np.ndarray)):
        what = f"a {type(value).__name__} of shape {tuple(value.shape)}"
    raise DataError(
        "D0511",
        f"log was given {what} as {name}; expected a number or a tensor with one element",
        fix="reduce it first, such as x.mean(), or log it from the main rank with get_tracker(...).tracker",
    )
