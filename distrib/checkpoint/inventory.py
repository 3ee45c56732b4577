"""Which checkpoints lie in a folder, and whether each can be loaded."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from distrib.checkpoint.claim import is_checkpoint
from distrib.checkpoint.describe import size_text, table
from distrib.checkpoint.format import Manifest, total_bytes
from distrib.checkpoint.location import Location, Url, locate
from distrib.checkpoint.opening import incompleteness, inspect
from distrib.checkpoint.storage import entries
from distrib.errors import CheckpointError

_STEP = re.compile(r"step-(\d+)")
_UNKNOWN: Final = "?"  # sorts behind every time


@dataclass(frozen=True)
class ListedCheckpoint:
    """One checkpoint, or what stands where one should.

    Attributes:
        path: Its directory or URL.
        saved_at: UTC, as "2026-01-31T12:00:00Z"; where no manifest says it the directory's own time, "?" at a URL.
        manifest: None where it cannot be read.
        problem: Why it cannot be loaded, as far as the manifest and the files' sizes tell; None if it can.
    """

    path: Location
    saved_at: str
    manifest: Manifest | None
    problem: str | None

    @property
    def step(self) -> int | None:
        """The step that it was saved at; that of its name where no manifest says it."""
        counted = self.manifest.counters.get("step") if self.manifest else None
        if isinstance(counted, int):
            return counted
        named = _STEP.fullmatch(self.path.name)
        return int(named[1]) if named else None


def inventory(place: str | Path | Url) -> list[ListedCheckpoint]:
    """Return the checkpoints of a folder, newest last; the folder itself, if it is one. Nothing is changed.

    What lies in it counts if it has a manifest of ours or is a folder named `step-<number>`.

    Args:
        place: A directory, or the URL of one.

    Raises:
        CheckpointError: if it is not there or cannot be read.
    """
    parent = locate(place)
    if is_checkpoint(parent):
        return [_look(parent)]
    found = [
        _look(parent / name)
        for name in names_in(parent)
        if _is_folder(parent / name) and (_STEP.fullmatch(name) or is_checkpoint(parent / name))
    ]
    return sorted(found, key=lambda x: (x.saved_at, x.step or 0, x.path.name))


def names_in(place: Location) -> list[str]:
    """Return the names in a directory or directly below a URL, sorted.

    Raises:
        CheckpointError: if there is no such place, or it cannot be read. A store does not tell an empty folder from none.
    """
    try:
        names = list(entries(place))
    except NotADirectoryError as error:
        raise _unreadable(place, "is not a directory") from error
    except OSError as error:
        raise _unreadable(place, f"cannot be read: {error.strerror}") from error
    if not names and isinstance(place, Url):
        raise _unreadable(place, "has nothing below it")
    if not names and isinstance(place, Path) and not place.exists():
        raise _unreadable(place, "does not exist")
    return names


def _is_folder(place: Location) -> bool:
    return place.is_dir() if isinstance(place, Path) else any(True for _ in entries(place))


def inventory_lines(found: list[ListedCheckpoint]) -> list[str]:
    """Return the checkpoints as a table: name, step, size, time, world size, strategy, state."""
    head = ("checkpoint", "step", "size", "saved at", "ranks", "strategy", "state")
    return table(head, map(_row, found), right=(1, 2, 4))


def _look(path: Location) -> ListedCheckpoint:
    problem = incompleteness(path)
    try:
        manifest = inspect(path)
    except CheckpointError:
        manifest = None
    saved_at = manifest.info.get("saved_at") if manifest else None
    if not isinstance(saved_at, str):
        saved_at = _time_of(path)
    return ListedCheckpoint(path, saved_at, manifest, _brief(problem, path) if problem else None)


def _time_of(path: Location) -> str:
    if isinstance(path, Url):
        return _UNKNOWN
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(path.stat().st_mtime))


def _brief(problem: CheckpointError, path: Location) -> str:
    """Return "model/rank-00000.safetensors is missing", and without the name what is said of the checkpoint itself."""
    file = (problem.where or "").removeprefix(f"{path}/")
    return problem.problem if file in ("", str(path)) else f"{file} {problem.problem}"


def _row(found: ListedCheckpoint) -> tuple[str, ...]:
    step = _UNKNOWN if found.step is None else str(found.step)
    state = found.problem or "complete"
    if found.manifest is None:
        return (found.path.name, step, _UNKNOWN, found.saved_at, _UNKNOWN, _UNKNOWN, state)
    strategy = str(found.manifest.info.get("strategy", _UNKNOWN))
    size = size_text(total_bytes(found.manifest))
    return (found.path.name, step, size, found.saved_at, str(found.manifest.world_size), strategy, state)


def _unreadable(path: Location, problem: str) -> CheckpointError:
    return CheckpointError(
        "D0701",
        problem,
        where=str(path),
        fix="name the folder in which save_state's checkpoints lie side by side, by default `checkpoints`",
    )
