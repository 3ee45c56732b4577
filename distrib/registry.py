"""Names to implementations, resolved only when chosen.

A registry is a table of name -> "module:attribute". Looking a name up imports that module and no other, so a
back-end costs nothing until it is used. Other distributions add rows through entry points of the registry's group.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Generic, TypeVar, cast

from distrib.errors import ConfigError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """A lazy table of named implementations of one kind.

    Args:
        kind: What the names name, for messages: "strategy".
        group: The entry-point group in which other packages add theirs: "distrib.strategies".
        builtin: name -> "module:attribute", in order of preference.
    """

    def __init__(self, kind: str, group: str, builtin: Mapping[str, str]) -> None:
        self.kind, self.group, self.builtin = kind, group, dict(builtin)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __contains__(self, name: object) -> bool:
        return name in self.builtin or name in self._plugins()

    def names(self) -> tuple[str, ...]:
        """Return every known name, our own first."""
        return tuple(dict.fromkeys((*self.builtin, *self._plugins())))

    def get(self, name: str) -> T:
        """Import and return what `name` stands for.

        Raises:
            ConfigError: if no such name is known; the message lists the names and the nearest one.
        """
        target = self.builtin.get(name)
        if target is None:
            plugin = self._plugins().get(name)
            if plugin is None:
                known = self.names()
                raise ConfigError(
                    "D0101",
                    f"unknown {self.kind} {name!r}; known: {', '.join(known)}{did_you_mean(name, known)}",
                    fix=f"use one of them, or install a package that adds {name!r} to the entry points {self.group!r}",
                )
            return cast("T", plugin.load())
        module, _, attribute = target.partition(":")
        return cast("T", getattr(importlib.import_module(module), attribute))

    def _plugins(self) -> dict[str, metadata.EntryPoint]:
        return {entry.name: entry for entry in metadata.entry_points(group=self.group)}
