"""The seam of a tracker. A new one is one new file with a subclass, and one line in `distrib.tracking`."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from distrib.errors import StrategyError


class Earlier(NamedTuple):
    """A run of a tracker that a checkpoint was saved in.

    Attributes:
        run: The tracker's own name for it: its `run_id` then.
        step: The largest step that had been logged; None if none was. What was logged after it, by a process that has
            died since, is going to be logged again.
    """

    run: str
    step: int | None


class Tracker(ABC):
    """Writes one run's values somewhere. Only the main rank has one.

    Whatever its methods raise is told once and never ends the training.

    Attributes:
        name: Under which it is registered, and asked for with `get_tracker`. A subclass sets it.
        run_id: What `start` goes on with this run by, in a later process; checkpoints store it. `start` sets it. None
            if the tracker cannot go on with a run.
        earlier: The run that `start` has to go on with, set before it is called; None to begin a new one.
    """

    name: str
    run_id: str | None = None
    earlier: Earlier | None = None

    @abstractmethod
    def start(
        self, project: str, folder: Path, config: Mapping[str, Any] | None, options: Mapping[str, Any]
    ) -> None:
        """Begin the run's record, or go on with that of `earlier`; set `run_id`. Called once, before all else.

        Args:
            project: Name of the project or run.
            folder: Where files go: the run's `project_dir`.
            config: Settings of the run that the script wants recorded.
            options: What `init_trackers(init_kwargs={name: ...})` gives for this tracker; refuse what is unknown.
        """

    @property
    def tracker(self) -> Any:
        """The object behind it, such as a SummaryWriter; by default the tracker itself."""
        return self

    @abstractmethod
    def log(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Record values, already reduced over the ranks.

        Args:
            values: Name -> number; a name may have parts, "eval/loss".
            step: When they were measured.
        """

    def log_images(self, images: Mapping[str, Any], step: int | None = None, **options: Any) -> None:
        """Record images, for trackers that can.

        Args:
            images: Name -> batch of images, as the tracker's own library takes them.
            step: When they were made.
            options: Further options of that library.

        Raises:
            StrategyError: unless a subclass overrides it.
        """
        raise StrategyError(
            "D0819", f"the tracker {self.name} takes no images", fix="use one that does: tensorboard"
        )

    def finish(self) -> None:  # noqa: B027 (optional)
        """Write what is left and close. Called once, at the end of the training or at exit."""


class SilentTracker(Tracker):
    """Stands in for a tracker on every other rank: takes the same calls and does nothing.

    Args:
        name: The tracker's name.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def start(
        self, project: str, folder: Path, config: Mapping[str, Any] | None, options: Mapping[str, Any]
    ) -> None:
        return

    @property
    def tracker(self) -> None:
        """Nothing: the object exists on the main rank only."""
        return

    def log(self, values: Mapping[str, float], step: int | None = None) -> None:
        return

    def log_images(self, images: Mapping[str, Any], step: int | None = None, **options: Any) -> None:
        return


def optional_module(name: str, *, tracker: str, extra: str) -> ModuleType:
    """Import a module of an optional package.

    Args:
        name: The module's name.
        tracker: Who needs it.
        extra: The extra of distrib that installs it.

    Raises:
        StrategyError: naming the extra, if it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise StrategyError(
            "D0817",
            f"the tracker {tracker} needs {name}, which cannot be imported: {error}",
            fix=f"pip install 'distrib[{extra}]', or take {tracker} out of tracking.log_with",
        ) from error


def refuse_options(tracker: str, options: Mapping[str, Any], known: tuple[str, ...] = ()) -> None:
    """Refuse options that a tracker does not have.

    Raises:
        StrategyError: naming the first, and those that exist.
    """
    for name in options:
        if name not in known:
            raise StrategyError(
                "D0820",
                f"init_kwargs of the tracker {tracker} has {name!r}; expected {', '.join(known) or 'nothing'}",
                fix="remove or correct it",
            )
