"""The configuration of a run: one validated, immutable value that remembers where each setting came from."""

from __future__ import annotations

from distrib.config.load import FILE_VARIABLE, WIRE_VARIABLE, dump_config, load_config
from distrib.config.problems import ConfigProblemsError
from distrib.config.run_config import RunConfig, overridden, with_code
from distrib.config.settings import Overridden, Source
from distrib.config.wire import from_wire, to_wire

__all__ = [
    "FILE_VARIABLE",
    "WIRE_VARIABLE",
    "ConfigProblemsError",
    "Overridden",
    "RunConfig",
    "Source",
    "dump_config",
    "from_wire",
    "load_config",
    "overridden",
    "to_wire",
    "with_code",
]
