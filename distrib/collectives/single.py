"""Collectives of a world of one: every operation is the identity."""

from __future__ import annotations

from typing import Any, TypeVar

import torch

from distrib.collectives.base import Collectives, ReduceOp
from distrib.collectives.trees import map_tensors

Tree = TypeVar("Tree")


class SingleCollectives(Collectives):
    """No peers, no communication; results are copies, as they would be with peers."""

    rank = 0
    world_size = 1

    def all_reduce_(self, tensor: torch.Tensor, op: ReduceOp = "sum") -> torch.Tensor:
        return tensor

    def reduce(self, tree: Tree, op: ReduceOp = "sum") -> Tree:
        return map_tensors(lambda x: x.true_divide(1) if op == "mean" else x.clone(), tree)

    def gather(self, tree: Tree) -> Tree:
        return map_tensors(lambda x: x.reshape(x.shape or (1,)).clone(), tree)

    def broadcast(self, tree: Tree, source: int = 0) -> Tree:
        return map_tensors(torch.clone, tree)

    def gather_object(self, value: Any) -> list[Any]:
        return [value]

    def broadcast_object(self, value: Any, source: int = 0) -> Any:
        return value

    def barrier(self, why: str) -> None:
        return None

    def close(self) -> None:
        return None
