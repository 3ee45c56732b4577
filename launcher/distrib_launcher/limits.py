"""The limits of a process and of its user, and what it looks like when one of them is reached."""

from __future__ import annotations

import re
import resource
from collections.abc import Callable
from typing import Final

_MEMORY: Final = (
    r"\bMemoryError\b|cannot allocate memory|failed to map segment|bad_alloc|can't allocate memory"
)
_PROCESSES: Final = (
    r"can't start new thread|resource temporarily unavailable|pthread_create|thread creation failed"
)
_LIMITS: Final = (
    (_MEMORY, resource.RLIMIT_AS, "virtual memory of a process", "ulimit -v", 1024),
    (_MEMORY, resource.RLIMIT_DATA, "data of a process", "ulimit -d", 1024),
    (_PROCESSES, resource.RLIMIT_NPROC, "processes and threads of a user", "ulimit -u", 1),
    (r"too many open files", resource.RLIMIT_NOFILE, "open files of a process", "ulimit -n", 1),
    (r"file too large", resource.RLIMIT_FSIZE, "size of a file", "ulimit -f", 1024),
)


def limits_behind(text: str, limit_of: Callable[[int], int] | None = None) -> list[str]:
    """Name the limits in force that can be behind an error.

    Args:
        text: The error's type and message.
        limit_of: `resource.RLIMIT_*` -> the limit in force; this process's own by default.

    Returns:
        One line each, such as "virtual memory of a process is limited to 2000000 KiB (`ulimit -v`)".
    """
    limit_of = limit_of or _soft_limit
    return [
        f"{what} is limited to {limit_of(number) // unit}{' KiB' if unit > 1 else ''} (`{command}`)"
        for looks_like, number, what, command, unit in _LIMITS
        if limit_of(number) != resource.RLIM_INFINITY and re.search(looks_like, text, re.IGNORECASE)
    ]


def _soft_limit(number: int) -> int:
    return resource.getrlimit(number)[0]
