"""What a reduction means for each dtype, wherever it is computed.

| dtype | travels as | sum | mean | max, min |
|---|---|---|---|---|
| bool | int64 | int64: how many are true | float32: the share that is true | bool: any, all |
| integer | int64 | its own dtype | float32 | its own dtype |
| float16, bfloat16, float8 | float32 | its own dtype | its own dtype | its own dtype |
| float32, float64 | itself | itself | itself | itself |
| complex | pairs of floats | its own dtype | its own dtype | an error |

"float32" of a mean is torch's default dtype. Half precision is added up in float32, so that neither the sum of a mean
overflows nor its rounding depends on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from distrib.collectives.base import ReduceOp
from distrib.errors import DataError


class Reduction:
    """One reduction of several tensors, which travel as few flat ones.

    Args:
        leaves: This rank's tensors.
        op: What is computed.
    """

    def __init__(self, leaves: Sequence[torch.Tensor], op: ReduceOp) -> None:
        self._leaves, self._op = leaves, op
        self._dtypes = [_travels_as(x.dtype) for x in leaves]

    @property
    def num_bytes(self) -> int:
        """Size of what travels."""
        return sum(_num_numbers(x) * d.itemsize for x, d in zip(self._leaves, self._dtypes, strict=True))

    def check(self) -> None:
        """Refuse an order of numbers that does not exist or cannot be told.

        Raises:
            DataError: for the maximum or minimum of complex numbers, or of uint64.
        """
        for x in self._leaves:
            if self._op in ("max", "min") and (x.is_complex() or x.dtype is torch.uint64):
                raise DataError(
                    "D0509",
                    f"reduce({self._op}) of a {str(x.dtype).removeprefix('torch.')} tensor is not defined here",
                    fix="reduce a real number of it, such as x.abs()"
                    if x.is_complex()
                    else "convert it to int64 or float64",
                )

    def flat(self, device: torch.device) -> list[torch.Tensor]:
        """Return new 1-d tensors that hold all values: one for each dtype that travels, on `device`."""
        kinds = dict.fromkeys(self._dtypes)
        return [
            torch.cat(
                [
                    _numbers(x).to(device, kind)
                    for x, d in zip(self._leaves, self._dtypes, strict=True)
                    if d is kind
                ]
            )
            for kind in kinds
        ]

    def combined(self, everyone: Sequence[torch.Tensor]) -> torch.Tensor:
        """Reduce the flat tensor that each rank gave to one, in rank order."""
        stacked = torch.stack(list(everyone))
        if self._op == "max":
            return stacked.amax(0)
        return stacked.amin(0) if self._op == "min" else stacked.sum(0)

    def results(self, flat: Sequence[torch.Tensor], world_size: int) -> list[torch.Tensor]:
        """Return the reduced tensors in their own shapes, dtypes and devices.

        Args:
            flat: What `flat` gave, reduced over the ranks: added up for "mean".
            world_size: Number of ranks.
        """
        if self._op == "mean":
            flat = [values / world_size for values in flat]
        found: list[torch.Tensor] = []
        by_kind = dict(zip(dict.fromkeys(self._dtypes), flat, strict=True))
        taken = dict.fromkeys(by_kind, 0)
        for x, kind in zip(self._leaves, self._dtypes, strict=True):
            count = _num_numbers(x)
            values = by_kind[kind][taken[kind] : taken[kind] + count]
            taken[kind] += count
            found.append(_as_own(values, x, self._op))
        return found


def _travels_as(dtype: torch.dtype) -> torch.dtype:
    if dtype in (torch.float64, torch.complex128):
        return torch.float64
    return torch.float32 if dtype.is_floating_point or dtype.is_complex else torch.int64


def _num_numbers(x: torch.Tensor) -> int:
    return x.numel() * (2 if x.is_complex() else 1)


def _numbers(x: torch.Tensor) -> torch.Tensor:
    x = x.detach()
    return torch.view_as_real(x.resolve_conj()).reshape(-1) if x.is_complex() else x.reshape(-1)


def _as_own(values: torch.Tensor, x: torch.Tensor, op: ReduceOp) -> torch.Tensor:
    """Give numbers that have travelled the shape, device and dtype that the result of `x` has."""
    if x.is_complex():
        return torch.view_as_complex(values.view(-1, 2)).to(x.device, x.dtype, copy=True).view(x.shape)
    dtype = x.dtype
    if not dtype.is_floating_point and op == "mean":
        dtype = torch.get_default_dtype()
    elif dtype is torch.bool and op == "sum":
        dtype = torch.int64
    return values.to(x.device, dtype, copy=True).view(x.shape)
