"""Ways to start a job, one file each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from distrib.config import RunConfig
from distrib.errors import LaunchError
from distrib.registry import Registry


@dataclass(frozen=True)
class Request:
    """What the command line asks for.

    Attributes:
        kind: "script", "module" or "command".
        words: The program and its arguments.
        config: The settings of this launch.
        env: The launcher's environment.
        dry_run: Whether to show what would run, on stdout, and to start nothing.
        format: In which form that is shown: "text", or another that the backend has.
    """

    kind: str
    words: tuple[str, ...]
    config: RunConfig
    env: Mapping[str, str]
    dry_run: bool = False
    format: str = "text"


def no_such_format(request: Request, backend: str, formats: tuple[str, ...]) -> LaunchError:
    """Return the error for a form that a backend cannot show its work in."""
    return LaunchError(
        "D0920",
        f"backend {backend} cannot show what would run as {request.format}; it has {', '.join(formats)}",
        where="--format",
        fix="leave --format out, or name the backend that has it: --backend tpu",
    )


Backend = Callable[[Request], int]  # carries the request out, from the main thread; returns the exit code

BACKENDS: Final = Registry[Backend](
    "backend",
    "distrib.backends",
    {
        "local": "distrib_launcher.backends.local:run",
        "tpu": "distrib_launcher.backends.tpu:run",
    },
)
