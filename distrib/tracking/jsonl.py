"""One JSON object a line in one file: nothing to install, and readable while it grows."""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distrib.tracking.base import Tracker, refuse_options

_NO_FILE_NAME = re.compile(r"[^\w.-]+")


class JsonlTracker(Tracker):
    """Appends to `<project>.jsonl`: {"time": seconds since 1970, "step": 3, "values": {"loss": 0.5}}.

    A line with "project", "run" and "config" begins each start; one that goes on with a run has its "run" again, and
    "resumed_after", the largest step that the checkpoint's lines have. Numbers that JSON has not are the texts "nan", "inf" and
    "-inf", which `float` reads. Each line is one write, so a process that is killed leaves whole lines; what a machine
    that failed has left of a line is taken away at the next start.
    """

    name = "jsonl"

    def __init__(self) -> None:
        self.path: Path | None = None
        self._file: int | None = None

    def start(
        self, project: str, folder: Path, config: Mapping[str, Any] | None, options: Mapping[str, Any]
    ) -> None:
        refuse_options(self.name, options)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / (_NO_FILE_NAME.sub("_", project) + ".jsonl")
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        _drop_torn_line(self._file)
        self.run_id = self.earlier.run if self.earlier else secrets.token_hex(6)
        resumed = {"resumed_after": self.earlier.step} if self.earlier else {}
        self._write(
            {
                "time": time.time(),
                "project": project,
                "run": self.run_id,
                **resumed,
                "config": dict(config or {}),
            }
        )

    def log(self, values: Mapping[str, float], step: int | None = None) -> None:
        shown = {name: _json_number(value) for name, value in values.items()}
        self._write({"time": time.time(), "step": step, "values": shown})

    def finish(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _write(self, row: Mapping[str, Any]) -> None:
        assert self._file is not None, "start comes first"
        line = json.dumps(row, default=str, allow_nan=False).encode() + b"\n"
        size = os.fstat(self._file).st_size
        try:
            written = os.write(self._file, line)
            if written < len(line):
                raise OSError(f"only {written} of {len(line)} bytes could be written to {self.path}")
        except OSError:
            os.ftruncate(self._file, size)  # no half line, or the next one would be lost with it
            raise


def _json_number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _drop_torn_line(file: int) -> None:
    """Cut the file behind its last line break."""
    end = size = os.fstat(file).st_size
    while end > 0:
        start = max(end - 4096, 0)
        at = os.pread(file, end - start, start).rfind(b"\n")
        if at >= 0:
            end = start + at + 1
            break
        end = start
    if end < size:
        os.ftruncate(file, end)
