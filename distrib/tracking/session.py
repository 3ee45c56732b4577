"""The trackers of one run: started together, written to by the main rank, closed at the end."""

from __future__ import annotations

import atexit
import contextlib
import operator
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from distrib.collectives.base import Collectives
from distrib.errors import DistribError, StrategyError, did_you_mean
from distrib.logging import notice
from distrib.registry import Registry
from distrib.tracking.base import Earlier, SilentTracker, Tracker
from distrib.tracking.values import reduce_values

T = TypeVar("T")


STORED = "trackers"  # key of a checkpoint's info


class Session:
    """Trackers by name, before and after they have been started.

    Args:
        names: Names in the registry.
        own: Trackers that the script has made itself.
        registry: Where names are looked up.
        collectives: All ranks.
        readers: Those whose values count: ranks that read different samples.
    """

    def __init__(
        self,
        names: Iterable[str],
        own: Iterable[Tracker],
        registry: Registry[type[Tracker]],
        collectives: Collectives,
        readers: Collectives,
    ) -> None:
        self._names, self._own, self._registry = tuple(dict.fromkeys(names)), tuple(own), registry
        self._collectives, self._readers = collectives, readers
        self._running: dict[str, Tracker] | None = None
        self._told: set[str] = set()
        self._last_step: int | None = None
        self._earlier: dict[str, Earlier] = {}  # of a checkpoint; taken up by the next start

    @property
    def trackers(self) -> list[Tracker]:
        """Those that run; on other ranks than the main one, stand-ins that do nothing."""
        return list((self._running or {}).values())

    def start(
        self,
        project: str,
        folder: Path,
        config: Mapping[str, Any] | None,
        options: Mapping[str, Mapping[str, Any]],
    ) -> None:
        """Start all trackers on the main rank. Collective.

        Raises:
            StrategyError: on every rank, if one is misused or needs what is not installed.
        """
        self.finish()
        atexit.register(self.finish)
        self._last_step = None
        error = None
        if self._collectives.rank == 0:
            try:
                self._check_options(options)
                self._start_here(
                    lambda name, tracker: tracker.start(project, folder, config, options.get(name, {}))
                )
            except DistribError as found:
                self.finish()
                error = found
        error = self._collectives.broadcast_object(error)
        if error is not None:
            raise error
        self._last_step = max((x.step for x in self._earlier.values() if x.step is not None), default=None)
        self._earlier = {}
        if self._collectives.rank:
            self._running = {name: SilentTracker(name) for name in self._all_names}

    def log(self, values: Mapping[str, Any], step: int | None) -> dict[str, float]:
        """Reduce values over the ranks, and let each tracker of the main rank write them. Collective."""
        reduced = reduce_values(values, self._readers)
        if self._collectives.rank == 0:
            self._count(step)
            if self._running is None and self._all_names:
                self._tell("log", "log: init_trackers has not been called, so the values go nowhere")
            for name, tracker in (self._running or {}).items():
                self._attempt(name, partial(tracker.log, dict(reduced), step))
        return reduced

    def get(self, name: str) -> Tracker:
        """Return a tracker by its name.

        Raises:
            StrategyError: if no such tracker runs; the message lists those that do.
        """
        running = self._running or {}
        if name not in running:
            known = ", ".join(running) or "none; init_trackers starts them"
            raise StrategyError(
                "D0818",
                f"no tracker {name!r} is running; there are: {known}{did_you_mean(name, running)}",
                fix="add it to tracking.log_with, and call init_trackers first",
            )
        return running[name]

    def stored(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, so that a later process can go on with the trackers' runs."""
        runs = {
            name: Earlier(x.run_id, self._last_step) for name, x in (self._running or {}).items() if x.run_id
        }
        found = runs or self._earlier
        return {STORED: {name: {"run": x.run, "step": x.step} for name, x in found.items()}} if found else {}

    def go_on(self, info: Mapping[str, Any]) -> None:
        """Let the next `start` go on with the runs that a checkpoint names; those that run already are not changed.

        Args:
            info: What the checkpoint says of the run that wrote it.
        """
        self._earlier = _earlier_of(info.get(STORED))
        for name, tracker in (self._running or {}).items():
            earlier = self._earlier.get(name)
            if earlier is not None and tracker.run_id not in (None, earlier.run):
                notice(
                    f"the tracker {name} has begun the run {tracker.run_id}, the checkpoint was written in "
                    f"{earlier.run}: to go on with that, call load_state before init_trackers"
                )

    def finish(self) -> None:
        """Close all trackers; they may be started again."""
        atexit.unregister(self.finish)
        running, self._running = self._running or {}, None
        for name, tracker in running.items():
            self._attempt(name, tracker.finish)

    @property
    def _all_names(self) -> tuple[str, ...]:
        return (*self._names, *(tracker.name for tracker in self._own))

    def _start_here(self, start: Callable[[str, Tracker], None]) -> None:
        self._running = {}
        own = {tracker.name: tracker for tracker in self._own}
        for name in self._all_names:

            def begin(name: str = name) -> Tracker:
                tracker = own[name] if name in own else self._registry.get(name)()
                tracker.earlier = self._earlier.get(name)
                start(name, tracker)
                return tracker

            tracker = self._attempt(name, begin, passing=DistribError)
            self._running[name] = tracker or self._stand_in(name)

    def _stand_in(self, name: str) -> Tracker:
        """Return what takes the place of a tracker that failed; its run can be gone on with later."""
        silent = SilentTracker(name)
        earlier = self._earlier.get(name)
        silent.run_id = earlier.run if earlier else None
        return silent

    def _count(self, step: Any) -> None:
        with contextlib.suppress(TypeError):  # none was given, or something that is no whole number
            self._last_step = max(operator.index(step), -1 if self._last_step is None else self._last_step)

    def _check_options(self, options: Mapping[str, Any]) -> None:
        names = self._all_names
        for name in options:
            if name not in names:
                raise StrategyError(
                    "D0820",
                    f"init_kwargs names {name!r}, but this run logs with {', '.join(names) or 'nothing'}"
                    f"{did_you_mean(name, names)}",
                    fix="correct it, or add it to tracking.log_with",
                )

    def _attempt(
        self, name: str, action: Callable[[], T], passing: type[Exception] | tuple[()] = ()
    ) -> T | None:
        """Do something with a tracker; whatever it raises, but for `passing`, is told once and does no harm."""
        try:
            return action()
        except passing:
            raise
        except Exception as error:  # noqa: BLE001 (a plug-in of whatever kind must not end the training)
            self._tell(
                name, f"the tracker {name} failed, and may have lost values: {type(error).__name__}: {error}"
            )
            return None

    def _tell(self, about: str, text: str) -> None:
        if about not in self._told:
            self._told.add(about)
            notice(text)


def _earlier_of(stored: Any) -> dict[str, Earlier]:
    """Return what can be used of a checkpoint's words."""
    return {
        name: Earlier(x["run"], x.get("step") if type(x.get("step")) is int else None)
        for name, x in (stored.items() if isinstance(stored, dict) else ())
        if isinstance(x, dict) and isinstance(x.get("run"), str)
    }


def split_names(log_with: Any) -> tuple[list[str] | None, list[Tracker]]:
    """Take apart what `Accelerator(log_with=...)` may be: a name, a Tracker, or a sequence of these; None for nothing.

    Returns:
        The names, None if nothing was given; and the script's own trackers.

    Raises:
        StrategyError: for anything else.
    """
    if log_with is None:
        return None, []
    given = [log_with] if isinstance(log_with, (str, Tracker)) else list(log_with)
    for x in given:
        if not isinstance(x, (str, Tracker)):
            raise StrategyError(
                "D0820",
                f"log_with has {x!r}; expected names of trackers, or objects of subclasses of distrib.tracking.Tracker",
                fix="pass such as log_with=['jsonl']",
            )
    return [x for x in given if isinstance(x, str)], [x for x in given if isinstance(x, Tracker)]
