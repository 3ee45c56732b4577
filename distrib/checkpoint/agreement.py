"""One outcome for all ranks: a step that fails on one rank fails on every rank, with that rank's reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from distrib.collectives.base import Collectives
from distrib.errors import CheckpointError

T = TypeVar("T")


class Call(NamedTuple):
    """What is the same on all ranks that save or load together."""

    directory: str
    num_hooks: int
    num_objects: int


def check_same_call(calls: Sequence[Call]) -> None:
    """Refuse a save or load in which ranks name different directories or have registered other numbers of things.

    Raises:
        CheckpointError: on every rank.
    """
    other = next((rank for rank, call in enumerate(calls) if call != calls[0]), None)
    if other is None:
        return
    first, found = calls[0], calls[other]
    if first.directory != found.directory:
        raise CheckpointError(
            "D0794",
            f"rank 0 names {first.directory}, rank {other} names {found.directory}; expected one directory for all ranks",
            fix="let one rank choose the name: accelerator.broadcast_object(name), or leave it to checkpoint.dir",
        )
    if first.num_objects != found.num_objects:
        raise CheckpointError(
            "D0792",
            f"rank 0 has registered {first.num_objects} objects, rank {other} has {found.num_objects}; "
            "expected the same on all ranks",
            fix="call register_for_checkpointing on every rank: what rank 0 has is stored, and every rank loads it",
        )
    raise CheckpointError(
        "D0764",
        f"rank 0 has registered {first.num_hooks} hooks, rank {other} has {found.num_hooks}; "
        "expected the same on all ranks",
        fix="register hooks on every rank; a hook may ask for accelerator.is_main_process inside",
    )


def collect(collectives: Collectives, what: str, action: Callable[[], T]) -> list[T]:
    """Run `action` on every rank and return every rank's picklable value. Collective.

    Args:
        collectives: The ranks.
        what: The action in words, for messages: "writing the checkpoint".
        action: What each rank does by itself; it must not communicate with peers that may have failed.

    Raises:
        CheckpointError: on every rank, if it failed on any.
    """
    value, error = _attempt(what, action)
    outcomes = collectives.gather_object((value, error))
    _raise_first(collectives, [failed for _, failed in outcomes], error)
    return [found for found, _ in outcomes]


def together(collectives: Collectives, what: str, action: Callable[[], T]) -> T:
    """Run `action` on every rank and return this rank's value, which stays on it. Collective.

    Raises:
        CheckpointError: on every rank, if it failed on any.
    """
    value, error = _attempt(what, action)
    _raise_first(collectives, collectives.gather_object(error), error)
    return value  # type: ignore[return-value]  # it is None only where an error has just been raised


def on_main(collectives: Collectives, what: str, action: Callable[[], T]) -> T:
    """Run `action` on rank 0 and return its picklable value on every rank. Collective.

    Raises:
        CheckpointError: on every rank, if it failed.
    """
    value, error = _attempt(what, action) if collectives.rank == 0 else (None, None)
    outcome: tuple[T, CheckpointError | None] = collectives.broadcast_object((value, error))
    _raise_first(collectives, [outcome[1]], error)
    return outcome[0]


def _attempt(what: str, action: Callable[[], T]) -> tuple[T | None, CheckpointError | None]:
    try:
        return action(), None
    except CheckpointError as error:
        return None, error
    except OSError as error:
        wrapped = CheckpointError(
            "D0714",
            f"{what} failed: {error.strerror or error}",
            where=str(error.filename) if error.filename else None,
            fix="see that the file system is mounted, writable and has room, then save again",
        )
    except Exception as error:  # noqa: BLE001 (the peers wait in a collective; they must hear of any failure)
        wrapped = CheckpointError("D0714", f"{what} failed: {type(error).__name__}: {error}")
        wrapped.__cause__ = error
    return None, wrapped


def _raise_first(
    collectives: Collectives, errors: Sequence[CheckpointError | None], own: CheckpointError | None
) -> None:
    failed = [(rank, error) for rank, error in enumerate(errors) if error is not None]
    if not failed:
        return
    rank, first = failed[0]
    if collectives.world_size == 1:
        raise first
    more = f" (and on {len(failed) - 1} more ranks)" if len(failed) > 1 else ""
    raise CheckpointError(
        first.code, f"rank {rank}: {first.problem}{more}", where=first.where, fix=first.fix
    ) from own
