"""A collection cut contiguously over the ranks: pure arithmetic, no communication."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from distrib.errors import DataError


def split(inputs: Any, rank: int, world_size: int, *, padded: bool = False) -> Any:
    """Return `rank`'s part: contiguous, in order, sizes differing by at most one, larger first.

    Args:
        inputs: A list, tuple, range, array or tensor (n, ...), or a mapping of such of equal length.
        rank: Whose part.
        world_size: Into how many parts.
        padded: Whether every part gets the size of the largest, by repeating the last item of `inputs`.

    Returns:
        The same kind of collection (a list for a padded range); empty where nothing is left.

    Raises:
        DataError: for anything else, or for lengths that differ.
    """
    length = _length(inputs)
    each, extra = divmod(length, world_size)
    start = rank * each + min(rank, extra)
    size = each + (rank < extra)
    missing = each + (extra > 0) - size if padded else 0
    return _cut(inputs, slice(start, start + size), missing)


def _length(inputs: Any) -> int:
    if not isinstance(inputs, Mapping):
        _check_sliceable(inputs)
        return len(inputs)
    lengths = {key: _length(value) for key, value in inputs.items()}
    if len(set(lengths.values())) > 1:
        shown = ", ".join(f"{key!r}: {n}" for key, n in lengths.items())
        raise DataError(
            "D0510",
            f"split_between_processes was given values of different lengths ({shown}); expected one length",
            fix="split what belongs together, and leave the rest out",
        )
    return next(iter(lengths.values()), 0)


def _check_sliceable(inputs: Any) -> None:
    has_items = isinstance(inputs, (list, tuple, range)) or (
        isinstance(inputs, (torch.Tensor, np.ndarray)) and inputs.ndim > 0
    )
    if not has_items:
        raise DataError(
            "D0511",
            f"split_between_processes cannot cut a {type(inputs).__name__}; "
            "expected a list, tuple, range, array or tensor with rows, or a dict of such",
            fix="pass a list of the items, such as list(x)",
        )


def _cut(inputs: Any, where: slice, missing: int) -> Any:
    if isinstance(inputs, Mapping):
        return {key: _cut(value, where, missing) for key, value in inputs.items()}
    part = inputs[where]
    if not missing:
        return part
    if isinstance(inputs, torch.Tensor):
        return torch.cat([part, inputs[-1:].expand(missing, *inputs.shape[1:])])
    if isinstance(inputs, np.ndarray):
        return np.concatenate([part, np.repeat(inputs[-1:], missing, axis=0)])
    return (
        [*part, *[inputs[-1]] * missing]
        if not isinstance(inputs, tuple)
        else (*part, *[inputs[-1]] * missing)
    )
