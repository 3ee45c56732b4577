"""The value that everything else reads: all settings of a run, each with its source."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import PrivateAttr

from distrib.config.checks import Resolved, resolve
from distrib.config.schema import Values, canonical, is_valid, keys, sections, show
from distrib.config.settings import Overridden, Setting, Source
from distrib.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class _Origin:
    winners: Mapping[str, Setting]
    overridden: tuple[Overridden, ...]
    file: Path | None


class RunConfig(Values):
    """All settings of a run: immutable, validated, and each knows its source.

    `docs/config.md` lists the keys. Built in code, `RunConfig(seed=3, data={"tail": "pad"})`, its sources are the
    calling line. Two are equal when their values are, wherever they came from.

    Raises:
        ConfigError: with every unknown key, wrong value and contradiction at once.
    """

    _origin: _Origin = PrivateAttr()

    def __init__(self, **values: Any) -> None:
        caller = sys._getframe(1)
        where = f"{caller.f_code.co_filename}:{caller.f_lineno}"
        resolved = resolve(settings_in(values, Source("code", where)))
        super().__init__(**dict(resolved.values))
        self._origin = _Origin(resolved.winners, resolved.overridden, None)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RunConfig) and dict(self) == dict(other)

    def __hash__(self) -> int:
        return hash(tuple(dict(self).values()))

    @property
    def file(self) -> Path | None:
        """The file that was read, as it was named; None if there was none."""
        return self._origin.file

    def source(self, key: str) -> Source:
        """Say where the value of a dotted key came from.

        Raises:
            ConfigError: if there is no such key.
        """
        if key not in keys():
            raise ConfigError("D0105", f"unknown key {key!r}{did_you_mean(key, keys())}")
        setting = self._origin.winners.get(key)
        return setting.source if setting else Source()

    def is_set(self, key: str) -> bool:
        """Say whether somebody set a dotted key, or any key of a section."""
        if key in sections():
            return any(name.startswith(f"{key}.") for name in self._origin.winners)
        return self.source(key).kind != "default"

    def set_values(self) -> dict[str, Any]:
        """Return what was set explicitly: dotted key -> value, in the order of the schema."""
        winners = self._origin.winners
        return {key: winners[key].value for key in keys() if key in winners}


def assemble(resolved: Resolved, file: Path | None) -> RunConfig:
    """Make the config out of checked settings."""
    config = RunConfig.model_construct(**dict(resolved.values))
    config._origin = _Origin(resolved.winners, resolved.overridden, file)
    return config


def overridden(config: RunConfig) -> tuple[Overridden, ...]:
    """Return what lost against a higher layer that says something else; `str` of each makes the start-up line."""
    return config._origin.overridden


def settings_of(config: RunConfig) -> list[Setting]:
    """Return every setting that went into a config, those that lost included."""
    lost = [each.loser for each in config._origin.overridden]
    return [*lost, *config._origin.winners.values()]


def with_code(config: RunConfig, values: Mapping[str, object], where: str) -> RunConfig:
    """Add what a script gives, such as the arguments of `Accelerator(...)`.

    Args:
        config: What the launch decided.
        values: key -> value, dotted or in sections; None is a value too, so leave out what was not given.
        where: The script's "file:line".

    Raises:
        ConfigError: if a value is not possible, or contradicts one that is set already; both places are named.
    """
    before = {
        setting.key: setting for setting in settings_of(config)
    }  # winners stand after what lost to them
    given = list(settings_in(values, Source("code", where)))
    conflicts = [_conflict(new, before[new.key]) for new in given if _differs(new, before)]
    added = [new for new in given if new.key not in before]
    return assemble(resolve([*settings_of(config), *added], conflicts), config.file)


def _differs(new: Setting, before: Mapping[str, Setting]) -> bool:
    if new.key not in before:
        return False
    return not is_valid(new.key, new.value) or canonical(new.key, new.value) != before[new.key].value


def _conflict(new: Setting, old: Setting) -> ConfigError:
    return ConfigError(
        "D0108",
        f"the script sets {show(new.value)}, but {old.source.where} says {show(old.value)}; expected the same value",
        where=new.where,
        fix=f"remove {new.key} from the script, or from {old.source.where}",
    )


def settings_in(values: Mapping[str, object], source: Source) -> Iterator[Setting]:
    """Yield the settings in a mapping whose keys are dotted, or sections with mappings."""
    for name, value in values.items():
        if name in sections() and (value is None or isinstance(value, Mapping)):
            inside: Iterable[tuple[object, object]] = (value or {}).items()
            yield from (Setting(f"{name}.{key}", _plain(inner), source) for key, inner in inside)
        else:
            yield Setting(name, _plain(value), source)


def _plain(value: object) -> object:
    """Turn what code has into what a file would have: a path into text, a numpy integer into an int."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "__index__") and not isinstance(value, bool):
        return value.__index__()
    return value
