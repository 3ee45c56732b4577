"""The folder of one launch: what was started, and a log for each rank and attempt.

    LOG_DIR/20260102-030405-1a2b/launch.json            what was started, by whom, and how it ended
                                 report.txt, failure.json
                                 attempt-0/rank-0.log

A run's name begins with its start in UTC, so that runs sort by time.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final

from distrib.errors import LaunchError, did_you_mean
from distrib_launcher import guard

ABOUT: Final = "launch.json"
_NAME = re.compile(r"(\d{8}-\d{6})-[0-9a-f]{4}")
_ATTEMPT = re.compile(r"attempt-(\d+)")
_RANK = re.compile(r"rank-(\d+)\.log")
_OWN = {"host", "machine", "pid", "pid_start", "started"}
_TRIES = 100  # of a name that another launch of the same second may have


@dataclass(frozen=True)
class RunFolder:
    """One run's folder.

    Attributes:
        path: Where it is.
    """

    path: Path

    @classmethod
    def create(cls, log_dir: Path, about: Mapping[str, Any]) -> RunFolder:
        """Make a folder for a launch by this process, with that of its first attempt, before anything is started.

        Args:
            log_dir: The folder for all runs; made if it is missing.
            about: What to keep in `launch.json` beside host, process and time: the redacted command, `num_processes`,
                `world_size`, `max_restarts`.

        Raises:
            LaunchError: if it cannot be written.
        """
        now, folder = datetime.now(timezone.utc), None
        try:
            log_dir.mkdir(parents=True, exist_ok=True)
            folder = cls(_new_folder(log_dir, now))
            folder._write({**about, **_self(), "started": now.isoformat()})
            folder.start_attempt(0)
        except OSError as error:
            if folder is not None:
                shutil.rmtree(folder.path, ignore_errors=True)
            raise _not_writable(log_dir, error) from error
        return folder

    @classmethod
    def newest(cls, log_dir: Path) -> RunFolder | None:
        """Return the run in a folder that was started last; None if there is none."""
        names = [
            name for name in _names(log_dir) if _NAME.fullmatch(name) and (log_dir / name / ABOUT).exists()
        ]
        if not names:
            return None
        second = max(names)[: len("YYYYMMDD-HHMMSS")]
        last = [cls(log_dir / name) for name in names if name.startswith(second)]
        return max(last, key=lambda run: str(run.about()["started"])) if len(last) > 1 else last[0]

    @classmethod
    def find(cls, path: Path) -> RunFolder:
        """Return the run at a path; of a folder of runs the newest.

        Raises:
            LaunchError: if there is none.
        """
        if (path / ABOUT).is_file():
            return cls(path)
        newest = cls.newest(path)
        if newest is not None:
            return newest
        if path.is_dir():
            problem, near = "holds no run", ""
        else:
            problem = "is a file" if path.exists() else "does not exist"
            near = did_you_mean(path.name, _names(path.parent))
        raise LaunchError(
            "D0321",
            f"{path} {problem}; expected a run's folder, or a folder of runs{near}",
            where="distrib logs",
            fix="name what --log-dir named at the launch, or one of the folders in it",
        )

    def start_attempt(self, attempt: int) -> None:
        """Make an attempt's folder.

        Args:
            attempt: 0 for the first, 1 after the first restart.

        Raises:
            OSError: if it cannot be made.
        """
        (self.path / f"attempt-{attempt}").mkdir(exist_ok=True)

    def log_path(self, attempt: int, rank: int) -> Path:
        """Return where a rank's log is. Pure."""
        return self.path / f"attempt-{attempt}" / f"rank-{rank}.log"

    def new_log(self, attempt: int, rank: int) -> Path:
        """Return where a rank's log is to be written, in its attempt's folder, which is made if it is missing.

        Raises:
            OSError: as `start_attempt`.
        """
        self.start_attempt(attempt)
        return self.log_path(attempt, rank)

    def attempts(self) -> list[int]:
        """Return the attempts that were started, in order."""
        return _numbers(self.path, _ATTEMPT)

    def ranks(self, attempt: int) -> list[int]:
        """Return the ranks that have a log of this attempt, in order."""
        return _numbers(self.path / f"attempt-{attempt}", _RANK)

    def about(self) -> dict[str, Any]:
        """Return what `launch.json` holds.

        Raises:
            LaunchError: if it cannot be read.
        """
        file = self.path / ABOUT
        try:
            about = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise unreadable(file, error.strerror or str(error)) from error
        except ValueError as error:
            raise unreadable(file, f"it is no JSON: {error}") from error
        if not (isinstance(about, dict) and about.keys() >= _OWN):
            raise unreadable(file, f"it does not say {', '.join(sorted(_OWN))}")
        return about

    def close(self, exit_code: int) -> str:
        """Note in `launch.json` how the launch ended.

        Returns:
            Why that could not be noted, such as a full disk; empty if it was. The launch is over all the same.
        """
        try:
            ended = datetime.now(timezone.utc).isoformat()
            self._write({**self.about(), "ended": ended, "exit_code": exit_code})
        except (OSError, LaunchError) as error:
            return str(error)
        return ""

    def is_running(self) -> bool | None:
        """Whether the launch goes on; None where that cannot be told, as from another machine or container."""
        about = self.about()
        if "ended" in about:
            return False
        if not about["machine"] or about["machine"] != _machine():
            return None
        process = guard.read_process(about["pid"])
        return process is not None and not process.ended and process.start == about["pid_start"]

    def _write(self, about: Mapping[str, Any]) -> None:
        """Replace `launch.json` in one step: a reader sees the old one or the new one."""
        text = json.dumps(about, indent=2) + "\n"
        new = self.path / f"{ABOUT}.new"
        new.write_text(text, encoding="utf-8")
        new.replace(self.path / ABOUT)


def unreadable(file: Path, why: str) -> LaunchError:
    """Return the error for a file of a run that is there and cannot be read."""
    return LaunchError(
        "D0323",
        f"{file} cannot be read: {why}",
        where="distrib logs",
        fix="give yourself permission to read it; a damaged launch.json can be restored or the logs read by themselves",
    )


def _new_folder(log_dir: Path, now: datetime) -> Path:
    for _ in range(_TRIES):
        folder = log_dir / f"{now:%Y%m%d-%H%M%S}-{os.urandom(2).hex()}"
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise FileExistsError(errno.EEXIST, "every name of this second is taken")


def _self() -> dict[str, Any]:
    """Say who we are, so that a reader can tell later whether we still run."""
    own = guard.read_process(os.getpid())
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "pid_start": own.start if own else 0,
    }


def _machine() -> str:
    """Name where a process id means the same process: a boot of a machine and a namespace. Empty if not on Linux."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _not_writable(log_dir: Path, error: OSError) -> LaunchError:
    in_the_way = next(
        (each for each in (log_dir, *log_dir.parents) if each.exists() and not each.is_dir()), None
    )
    why = f"{in_the_way} is a file" if in_the_way else error.strerror or str(error)
    return LaunchError(
        "D0320",
        f"no run's folder can be made in {log_dir}: {why}",
        where="--log-dir",
        fix="name a folder on a disk with room, where you may write",
    )


def _names(folder: Path) -> list[str]:
    try:
        return [entry.name for entry in folder.iterdir()]
    except OSError:
        return []


def _numbers(folder: Path, pattern: re.Pattern[str]) -> list[int]:
    found = (pattern.fullmatch(name) for name in _names(folder))
    return sorted(int(match[1]) for match in found if match)
