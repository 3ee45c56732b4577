"""The configuration as one line of JSON, which the launcher hands to its workers in DISTRIB_CONFIG."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from distrib.config.checks import resolve
from distrib.config.run_config import RunConfig, assemble, settings_of
from distrib.config.settings import PRECEDENCE, Setting, Source
from distrib.errors import ConfigError

_FORMAT: Final = 1


def to_wire(config: RunConfig) -> str:
    """Write a config with the source of every setting."""
    settings = [[s.key, s.value, s.source.kind, s.source.where] for s in settings_of(config)]
    file = None if config.file is None else str(config.file)
    content = {"format": _FORMAT, "file": file, "settings": settings}
    return json.dumps(content, separators=(",", ":"), default=_given)


def from_wire(text: str) -> RunConfig:
    """Read what `to_wire` wrote.

    Raises:
        ConfigError: if the text is anything else.
    """
    try:
        content = json.loads(text)
        settings = [_setting(row) for row in content["settings"]]
        file = content["file"]
        if not isinstance(file, str | None):
            raise TypeError(f"file is {file!r}, not a text")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _damaged(f"{type(error).__name__}: {error}") from None
    if content.get("format") != _FORMAT:
        raise _damaged(f"format {content.get('format')!r}, expected {_FORMAT}")
    return assemble(resolve(settings), None if file is None else Path(file))


def _given(mapping: Any) -> dict[str, Any]:
    """Return what was given of a value that is a mapping with keys of its own."""
    given: dict[str, Any] = mapping.model_dump(exclude_unset=True)
    return given


def _setting(row: list[Any]) -> Setting:
    key, value, kind, where = row
    if not (isinstance(key, str) and isinstance(where, str)):
        raise TypeError(f"key {key!r} or source {where!r} is not a text")
    if kind not in PRECEDENCE:
        raise ValueError(f"unknown kind of source {kind!r}")
    return Setting(key, value, Source(kind, where))


def _damaged(reason: str) -> ConfigError:
    return ConfigError(
        "D0109",
        f"the configuration of the launch cannot be understood ({reason}); "
        "expected what the launcher of the same version wrote",
        where="DISTRIB_CONFIG",
        fix="do not set DISTRIB_CONFIG by hand; name a file with DISTRIB_CONFIG_FILE",
    )
