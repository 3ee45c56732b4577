"""Loggers that know their rank, and one-line notices of the main rank."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any

from distrib.errors import NotBuiltError


class RankLogger(logging.LoggerAdapter[logging.Logger]):
    """A standard logger whose calls are made on the main process only, unless `main_process_only=False`."""

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        """Log like `logging.Logger.log`; `main_process_only` (default True) decides on which ranks."""
        main_only = kwargs.pop("main_process_only", True)
        if kwargs.pop("in_order", False):
            raise NotBuiltError("logging with in_order=True", fix="use main_process_only=False")
        if self.isEnabledFor(level) and (not main_only or rank_of(os.environ) == 0):  # noqa: TID251 (an edge)
            kwargs.setdefault("stacklevel", 2)
            super().log(level, msg, *args, **kwargs)

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        """Leave message and keywords as they are."""
        return msg, kwargs


def get_logger(name: str, log_level: str | None = None) -> RankLogger:
    """Return a logger that speaks once, on rank 0, unless a call says `main_process_only=False`.

    Args:
        name: Name of the underlying standard logger, usually `__name__`.
        log_level: Level to set on it, such as "INFO"; None leaves it as it is.
    """
    logger = logging.getLogger(name)
    if log_level is not None:
        logger.setLevel(log_level.upper())
    return RankLogger(logger, {})


def rank_of(env: Mapping[str, str]) -> int:
    """Return this process's rank as the usual variables give it, 0 if none does."""
    value = env.get("RANK") or env.get("SLURM_PROCID") or "0"
    return int(value) if value.isdigit() else 0


def notice(text: str) -> None:
    """Write one line about a choice of the library to stderr; the caller sees to it that one rank does so."""
    sys.stderr.write(f"distrib: {text}\n")
    sys.stderr.flush()
