"""The file of machines that DeepSpeed's and MPI's launchers take: a line `HOST slots=N` for each, and comments."""

from __future__ import annotations

import re
import socket
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from distrib.errors import LaunchError, NotBuiltError

_LINE = re.compile(r"(\S+)\s+slots\s*=\s*(\d+)", re.ASCII)


class Host(NamedTuple):
    """A machine, and how many processes it takes.

    Attributes:
        name: Its name or address.
        slots: A number of at least 1.
        line: Where the file says so, counted from 1.
    """

    name: str
    slots: int
    line: int


def parse(text: str, path: str) -> tuple[Host, ...]:
    """Return the machines of a hostfile, in its order.

    Args:
        text: What the file holds. Empty lines and what follows a "#" mean nothing.
        path: Its name, for the error.

    Raises:
        LaunchError: D0946, if a line is no such line, a machine stands twice, or there is none.
    """
    hosts: list[Host] = []
    for number, line in enumerate(text.splitlines(), 1):
        stated = line.partition("#")[0].strip()
        if not stated:
            continue
        match = _LINE.fullmatch(stated)
        if match is None or int(match[2]) < 1:
            raise _wrong(f"got {stated!r}; expected HOST slots=N with a number of at least 1", path, number)
        before = next((x.line for x in hosts if x.name == match[1]), None)
        if before is not None:
            raise _wrong(
                f"{match[1]} stands here and in line {before}; expected each host once", path, number
            )
        hosts.append(Host(match[1], int(match[2]), number))
    if not hosts:
        raise _wrong("it names no host; expected lines such as 'worker-1 slots=4'", path, 1)
    return tuple(hosts)


def slots_here(hosts: tuple[Host, ...], own_names: Collection[str], where: str) -> int:
    """Return how many processes a file of one machine gives this one.

    Args:
        hosts: Of the file.
        own_names: What this machine is called, in lower case.
        where: The setting that names the file, for the error.

    Raises:
        NotBuiltError: D0947, if the file names other machines.
    """
    others = [host for host in hosts if host.name.lower() not in own_names]
    if not others and len(hosts) == 1:
        return hosts[0].slots
    names = ", ".join(host.name for host in (others or hosts)[:8])
    what = f"it names {len(hosts)} hosts" if len(hosts) > 1 else "it names a host that is not this machine"
    raise NotBuiltError(
        "several hosts",
        code="D0947",
        problem=f"{what} ({names}{', ...' if len(others or hosts) > 8 else ''}); a launch over SSH is not built yet, and "
        "nothing was started",
        where=where,
        fix="start torchrun on each of the hosts (docs/launch.md), or leave only this machine's line in the file",
    )


def read_slots(path: str, where: str) -> int:
    """Return how many processes a hostfile gives this machine.

    Raises:
        LaunchError: D0946, if it cannot be read or is wrong.
        NotBuiltError: D0947, if it names other machines.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise LaunchError(
            "D0946", f"cannot read {path}: {reason}", where=where, fix="correct the path of the hostfile"
        ) from None
    name = socket.gethostname().lower()
    return slots_here(
        parse(text, path), {"localhost", "127.0.0.1", "::1", name, name.partition(".")[0]}, where
    )


def _wrong(problem: str, path: str, line: int) -> LaunchError:
    return LaunchError("D0946", problem, where=f"{path}:{line}", fix="correct the hostfile there")
