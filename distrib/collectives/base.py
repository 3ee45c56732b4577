"""The seam of communication: how values move between ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, TypeVar

import torch

ReduceOp = Literal["sum", "mean", "max", "min"]
Tree = TypeVar("Tree")


class Collectives(ABC):
    """Operations that every rank calls, in the same order.

    A *tree* is a tensor or any nesting of dicts, lists, tuples, named tuples and dataclasses of tensors; values
    that are no tensors pass through unchanged. Every operation on trees first compares a signature (operation,
    structure, dtypes, trailing shapes) over all ranks and raises `CollectiveError` on all of them if one differs.
    Results are detached, and share no memory with the arguments.

    Attributes:
        rank: This rank.
        world_size: Number of ranks.
        in_flight: What this rank is waiting in: "gather", "wait_for_everyone at train.py:12"; None outside.
    """

    rank: int
    world_size: int
    in_flight: str | None = None

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

        A sum of bools counts them (int64), a mean of integers or bools is a float; see `reductions.py`.

        Raises:
            CollectiveError: if a rank disagrees on operation, structure, dtype or shape.
            DataError: for the maximum or minimum of complex numbers.
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
            CollectiveError: if a rank disagrees on operation, structure, dtype or shape, or if `source` is no rank.
        """

    @abstractmethod
    def pad(self, tree: Tree, dim: int = 0, value: float = 0, *, first: bool = False) -> Tree:
        """Return a new tree whose tensors have the largest size of `dim` that any rank has. Collective.

        One exchange of sizes for the whole tree; no tensor travels. Other sizes may differ too. A tensor that has no
        such dim comes back as a copy.

        Args:
            tree: tensors of equal numbers of dims and dtypes on all ranks.
            dim: What is padded; negative counts from the end.
            value: What with.
            first: Whether the padding goes before the data.

        Raises:
            CollectiveError: if a rank disagrees on operation, structure, dtype or number of dims.
            DataError: if no tensor has such a dim.
        """

    @abstractmethod
    def gather_object(self, value: Any) -> list[Any]:
        """Return every rank's picklable `value`, in rank order. Collective.

        Raises:
            CollectiveError: on all ranks, if a rank's value cannot be pickled.
        """

    @abstractmethod
    def broadcast_object(self, value: Any, source: int = 0) -> Any:
        """Return rank `source`'s picklable value on every rank. Collective.

        Raises:
            CollectiveError: on all ranks, if it cannot be pickled or `source` is no rank.
        """

    @abstractmethod
    def exchange(self, values: Sequence[int]) -> list[list[int]]:
        """Return every rank's few numbers, in rank order: one small operation on the CPU, unchecked. Collective.

        Args:
            values: 64-bit integers, as many on every rank.
        """

    @abstractmethod
    def scatter_(
        self, received: torch.Tensor, parts: Sequence[torch.Tensor] | None, source: int = 0
    ) -> torch.Tensor:
        """Fill `received` with this rank's part of what rank `source` has, unchecked. Collective.

        Args:
            received: A CPU tensor, of the same shape and dtype on all ranks.
            parts: On `source` one tensor like it for each rank; None elsewhere.
            source: The rank that has them.
        """

    @abstractmethod
    def all_to_all(self, rows: torch.Tensor) -> torch.Tensor:
        """Give row j to rank j, and return the rows that came, in rank order; unchecked: for inner loops. Collective.

        Args:
            rows: (world size, *s), contiguous, of the same shape and dtype on all ranks.
        """

    @abstractmethod
    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return every rank's tensor, (world size, *s) in rank order; unchecked: for inner loops. Collective.

        Args:
            tensor: (*s), contiguous, of the same shape and dtype on all ranks.
        """

    @abstractmethod
    def among(self, groups: Sequence[Sequence[int]]) -> Collectives:
        """Return the collectives of this rank's group. Collective, over all ranks.

        Args:
            groups: Ranks, ascending; every rank is in exactly one group, and all ranks give the same groups.
        """

    @abstractmethod
    def barrier(self, why: str) -> None:
        """Return when every rank has called it. Collective.

        Args:
            why: What is waited for, equal on all ranks; shown with the script's line when a rank is missing.
        """

    @abstractmethod
    def first(self, scope: str, *, place: int, members: int) -> AbstractContextManager[None]:
        """Return a context whose body runs on one rank of `scope` first, then on its others. Collective in `scope`.

        Without a device collective and without a time limit; an exception in the first body is raised on the
        others too.

        Args:
            scope: Who takes part: "main" for all ranks, "node 3".
            place: This rank's number among them; 0 goes first.
            members: How many take part.

        Raises:
            CollectiveError: on the others, if the first one's body raised; for a checked operation in its body.
        """

    @abstractmethod
    def in_turn(self, why: str) -> AbstractContextManager[None]:
        """Return a context whose body runs on rank 0, then on rank 1, and so on. Collective."""

    @abstractmethod
    def beside(self) -> Collectives:
        """Return collectives of the same ranks that another thread can use meanwhile, for CPU values. Collective.

        They have no time limit: a peer may be long at work, and one that ends is noticed all the same.
        """

    @abstractmethod
    def close(self) -> None:
        """Leave the group, if this object made it. Safe to call twice."""
