"""Tensors made equal in one dim by filling up."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from distrib.errors import DataError


def size_of(x: torch.Tensor, dim: int) -> int:
    """Return the size of a dim, 0 if `x` has no such dim."""
    return x.shape[dim] if has_dim(x, dim) else 0


def has_dim(x: torch.Tensor, dim: int) -> bool:
    """Say whether `x` has a dim of that number; negative counts from the end."""
    return -x.dim() <= dim < x.dim()


def check_dim(leaves: Sequence[torch.Tensor], dim: int) -> None:
    """Refuse a dim that no tensor has.

    Raises:
        DataError: with the most dims that there are.
    """
    if leaves and not any(has_dim(x, dim) for x in leaves):
        raise DataError(
            "D0512",
            f"pad_across_processes(dim={dim}): the tensors have at most {max(x.dim() for x in leaves)} dims",
            fix="name a dim that a tensor has; 0-d tensors need no padding",
        )


def padded(x: torch.Tensor, dim: int, size: int, value: float, *, first: bool) -> torch.Tensor:
    """Return a contiguous copy of `x` whose `dim` has at least `size` entries, filled up with `value`."""
    x = x.detach()
    missing = max(size - size_of(x, dim), 0) if has_dim(x, dim) else 0
    if not missing:
        return x.clone(memory_format=torch.contiguous_format)
    shape = list(x.shape)
    shape[dim] = missing
    filling = torch.full(shape, value, dtype=x.dtype, device=x.device)
    return torch.cat([filling, x] if first else [x, filling], dim)
