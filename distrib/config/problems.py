"""All that is wrong with a configuration, in one error."""

from __future__ import annotations

from collections.abc import Sequence

from distrib.errors import ConfigError, DistribError, NotBuiltError


class ConfigProblemsError(ConfigError):
    """Several problems of one configuration, each in the usual form; `code`, `where` and `fix` are the first one's.

    Args:
        problems: At least one, in the order in which to show them.
    """

    def __init__(self, problems: Sequence[ConfigError]) -> None:
        self.problems = tuple(problems)
        first = self.problems[0]
        DistribError.__init__(self, first.code, first.problem, where=first.where, fix=first.fix)

    def __str__(self) -> str:
        return "\n".join(map(str, self.problems))

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.problems,)


class NotBuiltProblemsError(ConfigProblemsError, NotBuiltError):
    """Several settings, all of features that are not built yet."""


def raise_all(problems: Sequence[ConfigError]) -> None:
    """Raise what `problems` holds: nothing, the one error itself, or all of them in one.

    Raises:
        ConfigError: if there is a problem; a NotBuiltError if there is no other kind.
    """
    if not problems:
        return
    if len(problems) == 1:
        raise problems[0]
    if all(isinstance(problem, NotBuiltError) for problem in problems):
        raise NotBuiltProblemsError(problems)
    raise ConfigProblemsError(problems)
