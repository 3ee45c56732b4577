"""Every error that distrib raises on purpose.

    DistribError
    |-- ConfigError          D01xx  a setting is wrong, unknown or contradicted            (exit 2)
    |   `-- NotBuiltError    D09xx  a setting or call whose feature is not built yet       (exit 2)
    |-- TopologyError        D02xx  the variables or hardware around us do not fit         (exit 3)
    |-- LaunchError          D03xx  processes could not be started or supervised           (exit 2)
    |-- CollectiveError      D04xx  ranks disagree, or a peer was lost
    |-- DataError            D05xx  a loader or its data cannot be used as asked
    |-- TrainingError        D06xx  the order of calls in the loop makes no sense
    |-- CheckpointError      D07xx  a checkpoint cannot be written, read or trusted
    `-- StrategyError        D08xx  a model, optimizer or number format does not fit the strategy

A code is stable: `docs/errors.md` lists them all, and the command line prints an error without a traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class DistribError(Exception):
    """What went wrong, where, and how to mend it.

    Args:
        code: Stable identifier such as "D0102"; listed in `docs/errors.md`.
        problem: What is wrong, with the offending value and what was expected.
        where: The place to look at: "train.yaml:7 (mesh.shard)", a file, a keyword. None when the traceback says it.
        fix: What to do about it, as an imperative.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, code: str, problem: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.code, self.problem, self.where, self.fix = code, problem, where, fix
        super().__init__(code, problem)

    def __str__(self) -> str:
        place = f" {self.where}:" if self.where else ""
        fix = f"\n  fix: {self.fix}" if self.fix else ""
        return f"error[{self.code}]{place} {self.problem}{fix}"

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.code, self.problem, self.where, self.fix)


def _rebuild(
    cls: type[DistribError], code: str, problem: str, where: str | None, fix: str | None
) -> DistribError:
    return cls(code, problem, where=where, fix=fix)


class ConfigError(DistribError):
    """A setting is unknown, mistyped, out of range, or contradicts another one."""

    exit_code = 2


class NotBuiltError(ConfigError):
    """The feature is part of the design but not of this version; nothing was ignored in silence."""

    def __init__(
        self,
        feature: str,
        *,
        code: str = "D0901",
        problem: str | None = None,
        where: str | None = None,
        fix: str | None = None,
    ) -> None:
        super().__init__(
            code,
            problem or f"{feature} is not built yet",
            where=where,
            fix=fix or "leave it out; CHANGELOG.md says when it arrives",
        )

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_not_built, (self.code, self.problem, self.where, self.fix)


class NotBuiltNameError(NotBuiltError, AttributeError):
    """A name of the design that this version does not have; `hasattr` is False for it."""


def _rebuild_not_built(code: str, problem: str, where: str | None, fix: str | None) -> NotBuiltError:
    return NotBuiltError("", code=code, problem=problem, where=where, fix=fix)


class TopologyError(DistribError):
    """The environment does not say, or contradicts itself about, which rank this is or what it runs on."""

    exit_code = 3


class LaunchError(DistribError):
    """The launcher cannot start or supervise what it was asked to."""

    exit_code = 2


class CollectiveError(DistribError):
    """Ranks disagree about a collective call, or a peer was lost in it."""


class DataError(DistribError):
    """A loader cannot be prepared, or its data are not the same on all ranks."""


class TrainingError(DistribError):
    """Calls of the training loop contradict each other."""


class CheckpointError(DistribError):
    """A checkpoint cannot be written, is incomplete or damaged, or does not fit what it is loaded into."""


class StrategyError(DistribError):
    """A model, optimizer or number format does not fit the strategy or device."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the nearest known name, or "" when none is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""
