"""One explicit setting and where it came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

Kind = Literal["default", "launcher", "code", "file", "env", "flag"]
PRECEDENCE: Final[tuple[Kind, ...]] = get_args(Kind)  # the later wins


@dataclass(frozen=True)
class Source:
    """Where a value came from.

    Attributes:
        kind: The layer; `default` when nobody set it.
        where: "run.yaml:12", "DISTRIB_SEED", "--seed", "train.py:9"; empty for a default.
    """

    kind: Kind = "default"
    where: str = ""


@dataclass(frozen=True)
class Setting:
    """A value that somebody gave for a dotted key."""

    key: str
    value: Any
    source: Source

    @property
    def where(self) -> str:
        """The place as an error names it: "run.yaml:12 (mesh.shard)"."""
        return f"{self.source.where} ({self.key})"


@dataclass(frozen=True)
class Overridden:
    """A setting that lost against one of a higher layer that says something else."""

    winner: Setting
    loser: Setting

    def __str__(self) -> str:
        return (
            f"{self.winner.key} = {self.winner.value} ({self.winner.source.where}) "
            f"overrides {self.loser.value} ({self.loser.source.where})"
        )
