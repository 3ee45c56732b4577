"""Results of true samples only: what stand-ins and padding produced is taken out before it is gathered."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from distrib.collectives.base import Collectives
from distrib.collectives.trees import map_tensors, tensors
from distrib.data.loader import PreparedDataLoader
from distrib.data.sharding import Share
from distrib.errors import DataError


def gather_true_rows(
    value: Any, loader: PreparedDataLoader | None, collectives: Collectives, *, objects: bool
) -> Any:
    """Return every rank's rows of `value` in sample order, each sample of the current micro-step once. Collective.

    Args:
        value: A tree of tensors (rows, *s); or, with `objects` or without any tensor, a list of `rows` objects.
        loader: The loader being read; None for values that belong to no loader, which are gathered as they are.
        collectives: How rows travel.
        objects: Whether to gather picklable objects.

    Raises:
        DataError: if the leading dim of a tensor, or the length of a list, is not the batch's number of rows.
    """
    share = loader.share if loader is not None else None
    if loader is not None and loader.is_unbatched and share is not None:
        value, share = (value if share.size else _none_of(value)), None
    if objects or not tensors(value):
        return [item for part in collectives.gather_object(_true_items(value, share)) for item in part]
    return collectives.gather(
        value if share is None else map_tensors(lambda x: _true_tensor(x, share), value)
    )


def refuse_after_the_loop(loader: PreparedDataLoader | None) -> None:
    """Refuse to gather what was collected in a loop that has ended, if it has rows that are no samples.

    Raises:
        DataError: if the last loop gave some rank a stand-in or padding.
    """
    if loader is not None and loader.has_stand_ins:
        raise DataError(
            "D0504",
            "gather_for_metrics after the loop cannot tell samples from the rows that filled up its last batch",
            fix="call it inside the loop, batch by batch, and collect what it returns",
        )


def _none_of(value: Any) -> Any:
    """Return what a rank gives that has only a stand-in of unknown size."""
    return map_tensors(lambda x: x.reshape(x.shape or (1,))[:0], value) if tensors(value) else []


def _true_tensor(x: Tensor, share: Share) -> Tensor:
    if x.dim() == 0 or x.shape[0] != share.rows:
        raise DataError(
            "D0503",
            f"gather_for_metrics was given a tensor of shape {tuple(x.shape)}, but this rank's batch has "
            f"{share.rows} rows; expected a leading dim of {share.rows}",
            fix="pass one value per sample, or use accelerator.reduce for a mean or a sum",
        )
    return x[: share.size]


def _true_items(value: Any, share: Share | None) -> list[Any]:
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    if share is None:
        return items
    if len(items) != share.rows:
        raise DataError(
            "D0503",
            f"gather_for_metrics was given {len(items)} objects, but this rank's batch has {share.rows} rows",
            fix="pass a list with one object per sample, or use accelerator.gather_object",
        )
    return items[: share.size]
