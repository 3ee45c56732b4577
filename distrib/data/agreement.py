"""What the ranks must have in common before they divide a loader's samples between them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader, IterableDataset

from distrib.errors import DataError

if TYPE_CHECKING:
    from distrib.collectives.base import Collectives


def agree_on_loader(loader: DataLoader[Any], index: int, collectives: Collectives) -> int | None:
    """Compare a loader with those of the other ranks, and return the seed of rank 0's generator, if it has one. Collective.

    Raises:
        DataError: D0518, on every rank, naming what differs and both values.
    """
    seed = loader.generator.initial_seed() if loader.generator is not None else None
    everyone = collectives.gather_object((_facts(loader), seed))
    expected: dict[str, Any]
    first_seed: int | None
    expected, first_seed = everyone[0]
    for rank, (facts, _) in enumerate(everyone):
        for name, value in expected.items():
            if facts[name] != value:
                raise DataError(
                    "D0518",
                    f"data loader {index + 1}: {name} is {value} on rank 0 and {facts[name]} on rank {rank}; expected "
                    "the same loader on all ranks",
                    fix="build the same loader on every rank, and leave the division over the ranks to distrib",
                )
    return first_seed


def _facts(loader: DataLoader[Any]) -> dict[str, Any]:
    dataset: Any = loader.dataset
    is_stream = isinstance(dataset, IterableDataset)
    has_length = not is_stream and hasattr(dataset, "__len__")
    return {
        "the data set's class": type(dataset).__name__,
        "the length of the data set": len(dataset) if has_length else None,
        "batch_size": loader.batch_size,
        "drop_last": loader.drop_last,
        "the sampler": None if is_stream else type(loader.sampler).__name__,
    }
