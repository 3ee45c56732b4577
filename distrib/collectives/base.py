"""The seam of communication: how values move between ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal, TypeVar

import torch

ReduceOp = Literal["sum", "mean", "max", "min"]
Tree = TypeVar("Tree")


class Collectives(ABC):
    """Operations that every rank calls, in the same order.

    A *tree* is a tensor or any nesting of dicts, lists, tuples, named tuples and dataclasses of tensors; values
    that are no tensors pass through unchanged. Every operation on trees first compares a signature (operation,
    structure, dtypes, trailing shapes) over all ranks and raises `CollectiveError` on all of them if one differs.
    """

    rank: int
    world_size: int

    @abstractmethod
    def all_reduce_(self, tensor: torch.Tensor, op: ReduceOp = "sum") -> torch.Tensor:
        """Reduce one tensor in place over all ranks, unchecked: for inner loops. Collective.

        Args:
            tensor: any shape, the same shape and dtype on all ranks.
            op: "mean" needs a floating-point dtype.

        Returns:
            `tensor`.
        """

    @abstractmethod
    def reduce(self, tree: Tree, op: ReduceOp = "sum") -> Tree:
        """Return a new tree whose tensors are reduced elementwise over all ranks. Collective.

        Raises:
            CollectiveError: if a rank disagrees on operation, structure, dtype or shape.
        """

    @abstractmethod
    def gather(self, tree: Tree) -> Tree:
        """Concatenate each tensor of `tree` over all ranks along dim 0, in rank order. Collective.

        Args:
            tree: tensors (n, *s); n may differ between ranks, dtype and s may not. A 0-d tensor counts as (1,).

        Raises:
            CollectiveError: if a rank disagrees on operation, structure, dtype or trailing shape.
        """

    @abstractmethod
    def broadcast(self, tree: Tree, source: int = 0) -> Tree:
        """Return rank `source`'s tree on every rank; the others pass one of the same structure and shapes. Collective.

        Raises:
            CollectiveError: if a rank disagrees on operation, structure, dtype or shape.
        """

    @abstractmethod
    def gather_object(self, value: Any) -> list[Any]:
        """Return every rank's picklable `value`, in rank order. Collective."""

    @abstractmethod
    def broadcast_object(self, value: Any, source: int = 0) -> Any:
        """Return rank `source`'s picklable value on every rank. Collective."""

    @abstractmethod
    def barrier(self, why: str) -> None:
        """Return when every rank has called it. Collective.

        Args:
            why: What is waited for, shown when a rank is missing.
        """

    @abstractmethod
    def close(self) -> None:
        """Leave the group, if this object made it. Safe to call twice."""
