"""Which old checkpoints go, and when: never before a newer one is complete, never what is not ours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from distrib.checkpoint.claim import remove_checkpoint
from distrib.checkpoint.codec import decode
from distrib.checkpoint.location import Location, Url
from distrib.checkpoint.opening import incompleteness, inspect, numbered
from distrib.checkpoint.storage import LockedError, Storage
from distrib.errors import CheckpointError

METRICS: Final = "metrics"  # where the counters of a manifest have them


class Best(NamedTuple):
    """Which checkpoints are the best, by a metric that `save_state` was given.

    Attributes:
        metric: Its name.
        mode: "min" or "max": which value is the best.
        number: How many are kept.
    """

    metric: str
    mode: str
    number: int

    def of(self, paths: Sequence[Location]) -> list[Location]:
        """Return the best of these; of equal ones the newest, which stands last. One without the metric is no candidate."""
        found = [(_metrics_of(path).get(self.metric, math.nan), path) for path in reversed(paths)]
        candidates = [(value, path) for value, path in found if not math.isnan(value)]
        candidates.sort(key=lambda pair: pair[0], reverse=self.mode == "max")
        return [path for _, path in candidates[: self.number]]

    @classmethod
    def of_run(cls, path: Location) -> Best | None:
        """Return what the run that saved this checkpoint is set to keep; None if it keeps no best ones."""
        stored = decode(inspect(path).info, str(path)).get("config")
        config = stored if isinstance(stored, dict) else {}
        number, metric = config.get("checkpoint.keep_best"), config.get("checkpoint.best_metric")
        if not (isinstance(number, int) and isinstance(metric, str)):
            return None
        return cls(metric, "max" if config.get("checkpoint.best_mode") == "max" else "min", number)


def complete(directory: str | Path | Url, prefix: str = "step-") -> list[tuple[int, Location]]:
    """Return (number, path) of the complete checkpoints of `directory` that are named `<prefix><number>`, oldest first."""
    return [(number, path) for number, path in numbered(directory, prefix) if incompleteness(path) is None]


def retain(
    directory: str | Path | Url,
    keep_last: int,
    *,
    keep_every: int | None = None,
    best: Best | None = None,
    dry_run: bool = False,
    prefix: str = "step-",
    storage: Storage | None = None,
) -> list[Location]:
    """Remove all but the newest complete checkpoints of `directory`. Main only, after a save.

    A directory counts if it is named `<prefix><number>` and has our manifest; one that is incomplete, or that a job
    is saving to, is neither counted nor removed. Each is renamed out of sight before its files go.

    Args:
        directory: Where the checkpoints lie side by side, or a URL.
        keep_last: How many to keep, at least 1.
        keep_every: Also keep those whose number is a multiple of it; None for no others.
        best: Also keep the best ones; None for no others.
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
    found = complete(directory, prefix)
    kept = {path for _, path in found[-keep_last:]}
    kept |= {path for number, path in found if keep_every is not None and number % keep_every == 0}
    kept |= set(best.of([path for _, path in found])) if best is not None else set()
    old = [path for _, path in found if path not in kept]
    return old if dry_run else [path for path in old if _remove(path, storage or Storage())]


def _metrics_of(path: Location) -> dict[str, float]:
    found: dict[str, float] = decode(inspect(path).counters, str(path)).get(METRICS, {})
    return found


def _check_at_least_1(name: str, value: int) -> None:
    if value < 1:
        raise CheckpointError(
            "D0720",
            f"got {value}; expected at least 1",
            where=f"checkpoint.{name}",
            fix="set it to 1 or more",
        )


def _remove(path: Location, storage: Storage) -> bool:
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
