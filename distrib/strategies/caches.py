"""Key/value caches of transformers' models, which a block fills while it computes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def without_empty_caches(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], bool]:
    """Return the arguments of a block without caches that training would fill for nobody.

    Models of transformers make one in every forward, unless `use_cache` is false. A block that runs again in the
    backward would fill it twice, and one that is compiled is bound to its place in it, so that no two are alike.

    Args:
        module: The block; outside of training, and without gradients, its caches stay.
        args: Of its forward.
        kwargs: Of its forward.

    Returns:
        `args` and `kwargs`, and whether a cache is left in them.
    """
    caches = [x for x in (*args, *kwargs.values()) if is_cache(x)]
    is_wanted = not (module.training and torch.is_grad_enabled()) or any(x.get_seq_length() for x in caches)
    if not caches or is_wanted:
        return args, dict(kwargs), bool(caches)
    kept = {name: None if is_cache(x) else x for name, x in kwargs.items()}
    return tuple(None if is_cache(x) else x for x in args), kept, False


def is_cache(x: object) -> bool:
    """Whether this is a key/value cache of transformers."""
    return hasattr(x, "get_seq_length")
