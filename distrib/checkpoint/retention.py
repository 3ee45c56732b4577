"""Which old checkpoints go, and when: never before a newer one is complete, never what is not ours."""

from __future__ import annotations

from pathlib import Path

from distrib.checkpoint.claim import remove_checkpoint
from distrib.checkpoint.reader import incompleteness, numbered
from distrib.checkpoint.storage import LockedError, Storage
from distrib.errors import CheckpointError


def retain(
    directory: str | Path,
    keep_last: int,
    *,
    keep_every: int | None = None,
    dry_run: bool = False,
    prefix: str = "step-",
    storage: Storage | None = None,
) -> list[Path]:
    """Remove all but the newest complete checkpoints of `directory`. Main only, after a save.

    A directory counts if it is named `<prefix><number>` and has our manifest; one that is incomplete, or that a job
    is saving to, is neither counted nor removed. Each is renamed out of sight before its files go.

    Args:
        directory: Where the checkpoints lie side by side.
        keep_last: How many to keep, at least 1.
        keep_every: Also keep those whose number is a multiple of it; None for no others.
        dry_run: Whether to say only what would go.
        prefix: What their names begin with.
        storage: The file operations; tests make them fail.

    Returns:
        What was removed, oldest first.

    Raises:
        CheckpointError: if `keep_last` or `keep_every` is below 1, or the file system refuses.
    """
    _check_at_least_1("keep_last", keep_last)
    if keep_every is not None:
        _check_at_least_1("keep_every", keep_every)
    complete = [
        (number, path) for number, path in numbered(directory, prefix) if incompleteness(path) is None
    ]
    old = [path for number, path in complete[:-keep_last] if keep_every is None or number % keep_every]
    return old if dry_run else [path for path in old if _remove(path, storage or Storage())]


def _check_at_least_1(name: str, value: int) -> None:
    if value < 1:
        raise CheckpointError(
            "D0720",
            f"got {value}; expected at least 1",
            where=f"checkpoint.{name}",
            fix="set it to 1 or more",
        )


def _remove(path: Path, storage: Storage) -> bool:
    try:
        remove_checkpoint(path, storage)
    except LockedError:
        return False
    except OSError as error:
        raise CheckpointError(
            "D0714",
            f"an old checkpoint cannot be removed: {error.strerror or error}",
            where=str(path),
            fix="remove it by hand; newer ones are not touched",
        ) from error
    return True
