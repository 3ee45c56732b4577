"""Batch normalization over the batches of all ranks: torch's own where it runs, and one of ours on the CPU.

A module changes its class in place: it keeps its identity, parameters, buffers and their names, so optimizers, hooks and
checkpoints need not know.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from distrib.errors import StrategyError
from distrib.frames import outside_frame
from distrib.state import Runtime
from distrib.strategies.slices import listed


class _OverAllRanks(_BatchNorm):
    """Normalizes with the statistics of all ranks' batches together while it trains; of any sizes, also none.

    Both directions talk, so every rank must call it equally often: two sums forward, two backward.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's name)
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(input)
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        low = input.dtype in (torch.float16, torch.bfloat16)
        return self._normalize(input.float() if low else input).to(input.dtype)

    def _normalize(self, x: Tensor) -> Tensor:
        dims = [dim for dim in range(x.dim()) if dim != 1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        mine = x.new_tensor([x.numel() // x.shape[1]])
        sums = _sum_over_ranks(torch.cat([x.sum(dims), mine]))
        count = float(sums[-1])
        if count <= 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got {count:g}")
        mean = sums[:-1] / count
        centered = x - mean.view(shape)
        variance = _sum_over_ranks(centered.square().sum(dims)) / count
        self._track(mean.detach(), variance.detach() * (count / (count - 1)))
        normal = centered * torch.rsqrt(variance + self.eps).view(shape)
        if self.weight is not None:
            normal = normal * self.weight.view(shape)
        return normal if self.bias is None else normal + self.bias.view(shape)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        share = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)


class SyncedBatchNorm1d(_OverAllRanks, nn.BatchNorm1d):
    """BatchNorm1d over the batches of all ranks."""


class SyncedBatchNorm2d(_OverAllRanks, nn.BatchNorm2d):
    """BatchNorm2d over the batches of all ranks."""


class SyncedBatchNorm3d(_OverAllRanks, nn.BatchNorm3d):
    """BatchNorm3d over the batches of all ranks."""


class SyncedBatchNorm(_OverAllRanks):
    """torch's SyncBatchNorm for the CPU; not derived from it, since DDP refuses that there."""

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002 (torch's name)
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")


_ON_HOST: dict[type[_BatchNorm], type[_BatchNorm]] = {
    nn.BatchNorm1d: SyncedBatchNorm1d,
    nn.BatchNorm2d: SyncedBatchNorm2d,
    nn.BatchNorm3d: SyncedBatchNorm3d,
    nn.SyncBatchNorm: SyncedBatchNorm,
}


def synchronize_batchnorm(model: nn.Module, *, on_host: bool) -> None:
    """Let every batch normalization of `model` use the batches of all ranks, in place.

    Args:
        model: Its parameters, buffers and their names stay.
        on_host: Whether it computes on the CPU, where torch has no synchronized one.

    Raises:
        StrategyError: D0808, if one is neither torch's own class nor synchronized already; nothing is changed then.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    for name, module in found.items():
        if not _is_synchronized(module) and type(module) not in _ON_HOST:
            raise StrategyError(
                "D0808",
                f"sync_batchnorm cannot convert {name or 'the model'}: {type(module).__name__} is not torch's "
                "BatchNorm1d, BatchNorm2d or BatchNorm3d, and what it does besides would be lost",
                fix="use torch's class there, convert it to a class derived from torch.nn.SyncBatchNorm yourself, or "
                "leave sync_batchnorm out",
            )
    for module in found.values():
        if on_host:
            module.__class__ = _ON_HOST.get(type(module), type(module))
        elif not _is_synchronized(module):
            module.__class__ = nn.SyncBatchNorm
            module.process_group = None  # type: ignore[assignment]  # that of all ranks


class BatchNorms:
    """What a strategy with several ranks does about batch normalizations of the models that it prepares.

    Args:
        runtime: Of the run.
        synchronize: `sync_batchnorm`.
    """

    def __init__(self, runtime: Runtime, *, synchronize: bool) -> None:
        self._synchronize, self._on_host = synchronize, runtime.device.type == "cpu"
        self._is_main, self._has_warned = runtime.topology.is_main, False

    def see_to(self, model: nn.Module) -> None:
        """Let those of a model be synchronized, in place, or warn that they are not, once in a run."""
        if self._synchronize:
            synchronize_batchnorm(model, on_host=self._on_host)
        elif not self._has_warned and (names := of_each_rank(model)):
            self._has_warned = True
            if self._is_main:
                warn_of_each_rank(names)


def of_each_rank(model: nn.Module) -> list[str]:
    """Return the names of batch normalizations that see the rank's own batch only."""
    return [
        name or type(module).__name__
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and not _is_synchronized(module)
    ]


def warn_of_each_rank(names: Sequence[str]) -> None:
    """Warn, at the user's call, that statistics of a rank's own batches make the run depend on the number of ranks."""
    warnings.warn(
        f"BatchNorm sees only the rank's own micro-batch ({listed(names)}), so the run depends on the number of ranks; "
        "sync_batchnorm: true takes its statistics over all ranks",
        stacklevel=outside_frame()[1],
    )


def is_synchronized(model: nn.Module) -> bool:
    """Whether any batch normalization of `model` talks to other ranks."""
    return any(_is_synchronized(module) for module in model.modules())


def _is_synchronized(module: nn.Module) -> bool:
    return isinstance(module, (_OverAllRanks, nn.SyncBatchNorm))


def _sum_over_ranks(x: Tensor) -> Tensor:
    total: Tensor = _SumOverRanks.apply(x)  # type: ignore[no-untyped-call]
    return total


class _SumOverRanks(torch.autograd.Function):
    """The sum over all ranks. Every rank's loss depends on it, so its gradient is the sum of theirs."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> Tensor:
        return _sum_over_ranks(gradients[0])
