"""Activation checkpointing of a block: its forward runs again in the backward instead of keeping what it computed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Final

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from distrib.strategies.caches import without_empty_caches

Forward = Callable[..., Any]  # of a module, which is its first argument

_MATRIX_PRODUCTS: Final = frozenset({
    "mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "_scaled_mm", "_scaled_grouped_mm", "_grouped_mm",
})  # fmt: skip


def recomputing(forward: Forward, *, selective: bool) -> Forward:
    """Return a forward that keeps its inputs and computes all else again in the backward.

    Random numbers are drawn as in the first run, and autocast is as it was. Without gradients it is just `forward`; so
    it is for a block of transformers that checkpoints itself, and for one that is given a key/value cache to fill.

    Args:
        forward: A module's, unbound.
        selective: Keep the results of matrix products and attention too.
    """

    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or getattr(self, "gradient_checkpointing", False):
            return forward(self, *args, **kwargs)
        args, kwargs, fills_a_cache = without_empty_caches(self, args, kwargs)
        if fills_a_cache:
            return forward(self, *args, **kwargs)
        if (
            torch.compiler.is_compiling()
        ):  # the compiler wants torch's own contexts, and changes buffers once anyway
            own: dict[str, Any] = {"context_fn": _SELECTIVE} if selective else {}
            return checkpoint(forward, self, *args, use_reentrant=False, **own, **kwargs)
        contexts = partial(_contexts, self, selective)
        return checkpoint(forward, self, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    # The compiler keeps what it made by code object, and only so many versions for each: every class has its own.
    run.__code__ = run.__code__.replace()
    return functools.update_wrapper(
        run, forward, updated=()
    )  # marks of other replacements stay with their own


def _policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:  # noqa: ARG001 (torch calls it so)
    return CheckpointPolicy.MUST_SAVE if _is_kept(op) else CheckpointPolicy.PREFER_RECOMPUTE


@functools.cache
def _is_kept(op: Any) -> bool:
    name = op.name().rpartition("::")[2].partition(".")[0]
    return name in _MATRIX_PRODUCTS or "attention" in name or "flash_attn" in name or "flex_attn" in name


_SELECTIVE: Final = partial(create_selective_checkpoint_contexts, _policy)


def _contexts(
    module: nn.Module, selective: bool  # noqa: FBT001 (bound by partial)
) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:  # fmt: skip
    """Return the contexts of the first run and of the second."""
    first, second = _SELECTIVE() if selective else (nullcontext(), nullcontext())
    return first, _second_run(module, second)


@contextmanager
def _second_run(module: nn.Module, context: AbstractContextManager[Any]) -> Iterator[None]:
    """Enter `context`; running statistics, which the first run has moved, stay."""
    norms = [x for x in module.modules() if isinstance(x, _BatchNorm) and x.num_batches_tracked is not None]
    kept = [(x, x.momentum, x.num_batches_tracked) for x in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        with context:
            yield
    finally:
        for norm, momentum, count in kept:
            norm.momentum, norm.num_batches_tracked = momentum, count
