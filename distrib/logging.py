"""Loggers that know their rank, and one-line notices of the main rank."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

from distrib.errors import CollectiveError, ConfigError

# As distrib.topology knows them, which is not imported for a log line: the first that is set counts.
_RANKS: Final = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "PMI_RANK")
_SIZES: Final = (
    "WORLD_SIZE",
    "SLURM_STEP_NUM_TASKS",
    "OMPI_COMM_WORLD_SIZE",
    "MV2_COMM_WORLD_SIZE",
    "PMI_SIZE",
)


class RankLogger(logging.LoggerAdapter[logging.Logger]):
    """A standard logger whose calls are made on the main process only, unless a call says otherwise."""

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        """Log like `logging.Logger.log`.

        Args:
            level: As there.
            msg: As there.
            args: As there.
            kwargs: As there; `main_process_only` (default True, False with `in_order`) decides on which ranks;
                `in_order=True` lets every rank log in turn. Then it is collective, on ranks that take the level.

        Raises:
            ConfigError: if a call is for the main process only and in order.
            CollectiveError: in order, if a rank does something else, or the ranks are not connected yet.
        """
        in_order = kwargs.pop("in_order", False)
        main_only = kwargs.pop("main_process_only", not in_order)
        if in_order and main_only:
            raise ConfigError(
                "D0107",
                "a log call has in_order=True, but main_process_only=True; the main process needs no order",
                fix="leave one of them out",
            )
        env = os.environ  # noqa: TID251 (an edge: a logger is made before anything else knows the rank)
        if not self.isEnabledFor(level) or (main_only and rank_of(env)):
            return
        kwargs["stacklevel"] = kwargs.get("stacklevel", 1) + 1  # this frame
        if not in_order:
            super().log(level, msg, *args, **kwargs)
            return
        with _turn(env):
            super().log(level, msg, *args, **kwargs)

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        """Leave message and keywords as they are."""
        return msg, kwargs


def get_logger(name: str, log_level: str | None = None) -> RankLogger:
    """Return a logger that speaks once, on rank 0, unless a call says `main_process_only=False` or `in_order=True`.

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
    value = _first(env, _RANKS, "0")
    return int(value) if value.isdigit() else 0


def _first(env: Mapping[str, str], names: Sequence[str], default: str) -> str:
    return next((found for name in names if (found := env.get(name))), default)


def _turn(env: Mapping[str, str]) -> AbstractContextManager[None]:
    """Return a context that the connected ranks enter one after the other. Collective."""
    distributed = sys.modules.get(
        "torch.distributed"
    )  # not imported: who has no torch yet has no peers either
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        # Upwards, against the layers: a logger knows no Accelerator, and this module is loaded without torch.
        ranks = importlib.import_module("distrib.collectives").connected_ranks()
        turn: AbstractContextManager[None] = ranks.in_turn("logging in order")
        return turn
    if _first(env, _SIZES, "1") != "1":
        raise CollectiveError(
            "D0407",
            "in_order=True, but the ranks are not connected yet",
            fix="make the Accelerator before the first such call",
        )
    return nullcontext()


def notice(text: str) -> None:
    """Write one line about a choice of the library to stderr; the caller sees to it that one rank does so."""
    sys.stderr.write(f"distrib: {text}\n")
    sys.stderr.flush()
