"""Which checkpoints lie in a folder, and whether each can be loaded."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path

from distrib.checkpoint.claim import is_checkpoint
from distrib.checkpoint.describe import size_text, table
from distrib.checkpoint.format import Manifest, total_bytes
from distrib.checkpoint.reader import incompleteness, inspect
from distrib.checkpoint.storage import entries
from distrib.errors import CheckpointError

_STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Found:
    """One checkpoint, or what stands where one should.

    Attributes:
        path: Its directory.
        saved_at: UTC, as "2026-01-31T12:00:00Z"; the directory's own time where no manifest says it.
        manifest: None where it cannot be read.
        problem: Why it cannot be loaded, as far as the manifest and the files' sizes tell; None if it can.
    """

    path: Path
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


def inventory(directory: str | Path) -> list[Found]:
    """Return the checkpoints of a folder, newest last; the folder itself, if it is one. Nothing is changed.

    A directory counts if it has a manifest of ours or is named `step-<number>`.

    Raises:
        CheckpointError: if the folder cannot be read.
    """
    parent = Path(directory).absolute()
    if is_checkpoint(parent):
        return [_look(parent)]
    try:
        names = list(entries(parent)) if parent.is_dir() else None
    except OSError as error:
        raise _unreadable(parent, f"cannot be read: {error.strerror}") from error
    if names is None:
        raise _unreadable(parent, "is not a directory" if parent.exists() else "does not exist")
    found = [
        _look(parent / name)
        for name in names
        if is_checkpoint(parent / name) or (_STEP.fullmatch(name) and (parent / name).is_dir())
    ]
    return sorted(found, key=lambda x: (x.saved_at, x.step or 0, x.path.name))


def inventory_lines(found: list[Found]) -> list[str]:
    """Return the checkpoints as a table: name, step, size, time, world size, strategy, state."""
    head = ("checkpoint", "step", "size", "saved at", "ranks", "strategy", "state")
    return table(head, map(_row, found), right=(1, 2, 4))


def _look(path: Path) -> Found:
    problem = incompleteness(path)
    try:
        manifest = inspect(path)
    except CheckpointError:
        manifest = None
    saved_at = manifest.info.get("saved_at") if manifest else None
    if not isinstance(saved_at, str):
        saved_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(path.stat().st_mtime))
    return Found(path, saved_at, manifest, _brief(problem, path) if problem else None)


def _brief(problem: CheckpointError, path: Path) -> str:
    """Return "model/rank-00000.safetensors is missing", and without the name what is said of the checkpoint itself."""
    file = Path(problem.where or path)
    return problem.problem if file == path else f"{file.relative_to(path)} {problem.problem}"


def _row(found: Found) -> tuple[str, ...]:
    step = "?" if found.step is None else str(found.step)
    state = found.problem or "complete"
    if found.manifest is None:
        return (found.path.name, step, "?", found.saved_at, "?", "?", state)
    strategy = str(found.manifest.info.get("strategy", "?"))
    size = size_text(total_bytes(found.manifest))
    return (found.path.name, step, size, found.saved_at, str(found.manifest.world_size), strategy, state)


def _unreadable(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        "D0701",
        problem,
        where=str(path),
        fix="name the folder in which save_state's checkpoints lie side by side, by default `checkpoints`",
    )
