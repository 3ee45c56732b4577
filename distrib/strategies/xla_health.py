"""Whether XLA can be used here: versions, device, compile cache and what was compiled last. Opens no device.

A TPU belongs to one process at a time, so that a check which opened it would fail whenever a run is going on.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import torch

from distrib.config import load_config
from distrib.devices import DEVICES
from distrib.devices.xla_runtime import num_chips, pjrt_device
from distrib.errors import DistribError, TopologyError

_CACHE_VARIABLE: Final = "XLA_PERSISTENT_CACHE_PATH"  # torch-xla's own
_LATELY_S: Final = 24 * 3600.0
_UNITS: Final = (("day", 86400), ("hour", 3600), ("minute", 60), ("second", 1))
_USAGE: Final = "usage: python -m distrib.strategies.xla health [CONFIG]\n"


@dataclass(frozen=True)
class Finding:
    """One line of the check.

    Attributes:
        name: What was looked at.
        value: What was found.
        is_well: Whether a run could use it as it is.
    """

    name: str
    value: str
    is_well: bool = True


def health(compile_cache: str | None, env: Mapping[str, str], now: float) -> list[Finding]:
    """Look at this machine and this installation.

    Args:
        compile_cache: The setting `xla.compile_cache`.
        env: The process's environment.
        now: Seconds since the epoch.
    """
    found = [_versions(), _device(env)]
    folder = compile_cache or env.get(_CACHE_VARIABLE)
    if not folder:
        return [*found, Finding("compile cache", "none (set xla.compile_cache): each start compiles again")]
    source = "xla.compile_cache" if compile_cache else _CACHE_VARIABLE
    return [*found, *_cache(Path(folder), source, now)]


def _versions() -> Finding:
    if find_spec("torch_xla") is None:
        return Finding("torch_xla", "not installed: pip install 'distrib[tpu]'", is_well=False)
    try:
        DEVICES.get("xla")().check_installation()
    except TopologyError as error:
        return Finding("torch_xla", f"{error.problem}; {error.fix}", is_well=False)
    return Finding("torch_xla", f"{metadata.version('torch_xla')}, which fits torch {torch.__version__}")


def _device(env: Mapping[str, str]) -> Finding:
    kind, chips = pjrt_device(env), num_chips()
    if kind is None:
        return Finding("PJRT device", "none: there is no TPU, and PJRT_DEVICE is not set", is_well=False)
    if kind == "TPU":
        return Finding("PJRT device", f"TPU, {chips} chips on the PCI bus", is_well=chips > 0)
    return Finding("PJRT device", f"{kind}, from PJRT_DEVICE")


def _cache(folder: Path, source: str, now: float) -> list[Finding]:
    name = "compile cache"
    if not folder.is_dir():
        return [
            Finding(name, f"{folder} ({source}), not there yet: the first run makes it", not folder.exists())
        ]
    graphs = sorted(_graphs(folder))
    lately = sum(now - at < _LATELY_S for at, _ in graphs)
    size_mib = sum(size for _, size in graphs) / 2**20
    can_write = os.access(folder, os.W_OK)
    return [
        Finding(
            name,
            f"{folder} ({source}), {len(graphs)} graphs, {size_mib:.1f} MiB{'' if can_write else ', cannot be written'}",
            can_write,
        ),
        Finding(
            "last compilations",
            f"{lately} in the last 24 hours, the newest {_ago(now - graphs[-1][0])} ago"
            if graphs
            else "none kept",
        ),
    ]


def _graphs(folder: Path) -> list[tuple[float, int]]:
    """Return when each kept graph was compiled, and its size in bytes; ranks may have folders of their own."""
    found = []
    for file in folder.rglob("*"):
        try:
            status = file.stat()
        except OSError:  # a run may be at work
            continue
        if file.is_file():
            found.append((status.st_mtime, status.st_size))
    return found


def _ago(seconds: float) -> str:
    seconds = max(0.0, seconds)
    unit, length = next((each for each in _UNITS if seconds >= each[1]), _UNITS[-1])
    count = int(seconds // length)
    return f"{count} {unit}{'' if count == 1 else 's'}"


def main(arguments: Sequence[str], env: Mapping[str, str]) -> int:
    """Print the check; return 0 if all is well, else 1.

    Args:
        arguments: A configuration file, for `xla.compile_cache`; else ./distrib.yaml and the environment's settings.
        env: The process's environment.
    """
    if len(arguments) > 1 or any(word.startswith("-") for word in arguments):
        sys.stderr.write(_USAGE)
        return 2
    try:
        config = load_config(*arguments, env=env)
    except DistribError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    findings = health(config.xla.compile_cache, env, time.time())
    width = max(len(each.name) for each in findings)
    for each in findings:
        sys.stdout.write(f"{'ok  ' if each.is_well else 'FAIL'}  {each.name:<{width}}  {each.value}\n")
    return int(not all(each.is_well for each in findings))
