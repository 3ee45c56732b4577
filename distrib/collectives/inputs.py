"""What a collective cannot do anything with is refused, instead of coming back as this rank's own value."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch

from distrib.collectives.trees import constants, tensors
from distrib.errors import CollectiveError, DataError

_SHOWN = 60  # characters of a value in a message


def dense_tensors(op: str, tree: Any) -> list[torch.Tensor]:
    """Return the tensors of `tree`.

    Args:
        op: The method's name.
        tree: Its argument.

    Raises:
        DataError: if one is sparse, so that it has no rows of bytes.
    """
    leaves = tensors(tree)
    for x in leaves:
        if x.layout is not torch.strided:
            raise DataError(
                "D0508",
                f"{op} was given a {x.layout} tensor of shape {tuple(x.shape)}; expected a dense one",
                fix="pass x.to_dense()",
            )
    return leaves


def check_tensors(op: str, tree: Any) -> None:
    """Refuse a tree with numbers or arrays beside its tensors, or with nothing but constants.

    Args:
        op: The method's name.
        tree: Its argument.

    Raises:
        DataError: naming the first value that has not travelled, and what to do instead.
    """
    others = constants(tree)
    lost = [x for x in others if isinstance(x, (bool, int, float, complex, np.ndarray, np.number, np.bool_))]
    if not lost and not tensors(tree):
        lost = others
    if lost:
        raise DataError(
            "D0508",
            f"{op} was given {_shown(lost[0])}, which is no tensor, so the ranks' values would not meet",
            fix=f"pass torch.{_maker(lost[0])}, or use gather_object or broadcast_object for what is no tensor",
        )


def check_rank(what: str, rank: Any, world_size: int) -> int:
    """Return a rank that exists.

    Args:
        what: What it is for: "broadcast from rank".
        rank: A whole number.
        world_size: Number of ranks.

    Raises:
        CollectiveError: if there is no such rank.
    """
    try:
        number = operator.index(rank)
    except TypeError:
        number = -1
    if isinstance(rank, bool) or not 0 <= number < world_size:
        expected = "0" if world_size == 1 else f"0 to {world_size - 1}"
        raise CollectiveError(
            "D0403",
            f"{what} {rank!r}, but the world size is {world_size}; expected {expected}",
            fix="name a rank of this job, such as accelerator.num_processes - 1 for the last",
        )
    return number


def _shown(value: Any) -> str:
    text = repr(value)
    if isinstance(value, np.ndarray):
        text = f"an array of shape {value.shape}"
    elif len(text) > _SHOWN:
        text = f"{text[:_SHOWN]}..."
    return f"{text} ({type(value).__name__})"


def _maker(value: Any) -> str:
    return "from_numpy(x)" if isinstance(value, np.ndarray) else "tensor(x)"
