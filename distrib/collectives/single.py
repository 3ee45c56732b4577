"""Collectives of a world of one: every operation is the identity, with the checks and the dtypes of many ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from distrib.collectives.base import Collectives, ReduceOp
from distrib.collectives.inputs import check_rank, dense_tensors
from distrib.collectives.padding import check_dim, padded
from distrib.collectives.reductions import Reduction
from distrib.collectives.trees import map_tensors, replace_tensors

Tree = TypeVar("Tree")


class SingleCollectives(Collectives):
    """No peers, no communication; results are copies, as they would be with peers."""

    rank = 0
    world_size = 1

    def among(self, groups: Sequence[Sequence[int]]) -> Collectives:
        return self

    def all_reduce_(self, tensor: torch.Tensor, op: ReduceOp = "sum") -> torch.Tensor:
        return tensor

    def reduce(self, tree: Tree, op: ReduceOp = "sum") -> Tree:
        leaves = dense_tensors("reduce", tree)
        if not leaves:
            return tree
        reduction = Reduction(leaves, op)
        reduction.check()
        return replace_tensors(tree, iter(reduction.results(reduction.flat(leaves[0].device), 1)))

    def gather(self, tree: Tree) -> Tree:
        dense_tensors("gather", tree)
        return map_tensors(lambda x: _copy(x).reshape(x.shape or (1,)), tree)

    def broadcast(self, tree: Tree, source: int = 0) -> Tree:
        check_rank("broadcast from rank", source, 1)
        dense_tensors("broadcast", tree)
        return map_tensors(_copy, tree)

    def pad(self, tree: Tree, dim: int = 0, value: float = 0, *, first: bool = False) -> Tree:
        leaves = dense_tensors("pad_across_processes", tree)
        check_dim(leaves, dim)
        return map_tensors(lambda x: padded(x, dim, 0, value, first=first), tree)

    def gather_object(self, value: Any) -> list[Any]:
        return [value]

    def broadcast_object(self, value: Any, source: int = 0) -> Any:
        check_rank("broadcast_object from rank", source, 1)
        return value

    def exchange(self, values: Sequence[int]) -> list[list[int]]:
        return [list(values)]

    def scatter_(
        self, received: torch.Tensor, parts: Sequence[torch.Tensor] | None, source: int = 0
    ) -> torch.Tensor:
        assert parts is not None, "the only rank is the source"
        return received.copy_(parts[0])

    def all_to_all(self, rows: torch.Tensor) -> torch.Tensor:
        return _copy(rows)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return _copy(tensor).unsqueeze(0)

    def barrier(self, why: str) -> None:
        return None

    @contextmanager
    def first(self, scope: str, *, place: int, members: int) -> Iterator[None]:
        yield

    @contextmanager
    def in_turn(self, why: str) -> Iterator[None]:
        yield

    def beside(self) -> Collectives:
        return SingleCollectives()

    def close(self) -> None:
        return None


def _copy(x: torch.Tensor) -> torch.Tensor:
    return x.detach().clone(memory_format=torch.contiguous_format)
