"""What the launcher says of a plan and of its settings before anything runs."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any

from distrib.config import RunConfig, overridden
from distrib.config.not_built import is_built
from distrib.config.schema import keys, value_at
from distrib.topology.threads import usable_cores
from distrib_launcher.numa import lines as numa_lines
from distrib_launcher.plan import LaunchPlan
from distrib_launcher.planning import Reasons
from distrib_launcher.redaction import Redactor


def start_up_lines(plan: LaunchPlan, reasons: Reasons, config: RunConfig, redactor: Redactor) -> list[str]:
    """Say in one line what is started and why, and below it what overrode what."""
    processes = f"{plan.num_processes} process{'es' if plan.num_processes > 1 else ''}"
    if config.launch.nproc_per_node == "auto":
        processes += f" ({reasons.processes}; -n N starts N)"
    if plan.machine.count > 1:
        processes += f", {_machine(plan)}; --nnodes 1 stays on this one"
    threads = f"{plan.threads} thread{'s' if plan.threads > 1 else ''} each ({reasons.threads})"
    told = [f"distrib: {plan.program.shown(redactor.words)}: {processes}", _device(config), threads]
    if plan.start_method == "fork":
        told.append(f"forked ({reasons.start_method})")
    return [
        ", ".join([*told, f"config {_file(config)}"]),
        *(f"distrib: {each}" for each in [*overridden(config), *numa_lines(plan.bindings)]),
        *_without_effect(plan, reasons, config),
        *_crowded(plan.num_processes),
    ]


def _without_effect(plan: LaunchPlan, reasons: Reasons, config: RunConfig) -> list[str]:
    """Say which settings do nothing because the ranks are fresh interpreters."""
    if plan.start_method == "fork":
        return []
    asked = config.launch.start_method == "fork" and config.source("launch.start_method").where
    names = [
        f"{name} ({config.source(key).where})"
        for name, key, is_set in (
            ("start_method: fork", "launch.start_method", asked),
            ("preload", "launch.preload", config.launch.preload),
        )
        if is_set
    ]
    why = f"each rank is started as a fresh interpreter: {reasons.start_method}"
    return [f"distrib: warning: {name} has no effect, {why}" for name in names]


def _machine(plan: LaunchPlan) -> str:
    """Say which of the job's machines this is."""
    machine = plan.machine
    return (
        f"ranks {plan.ranks[0]} to {plan.ranks[-1]} of {plan.world_size}: machine {machine.index} of {machine.count} "
        f"({machine.reason})"
    )


def _device(config: RunConfig) -> str:
    where = config.source("device").where
    return f"device {config.device} ({where or 'the ranks choose'})"


def _crowded(num_processes: int) -> list[str]:
    cores = usable_cores()
    if num_processes <= cores:
        return []
    return [f"distrib: warning: {num_processes} processes share {cores} usable cores; expect each to be slow"]


def _file(config: RunConfig) -> str:
    return str(config.file) if config.file else "(no file)"


def plan_lines(plan: LaunchPlan, reasons: Reasons, redactor: Redactor) -> list[str]:
    """Show the command and each rank's environment."""
    lines = [
        f"command: {plan.program.shown(redactor.words)}",
        f"processes: {plan.num_processes} ({reasons.processes})",
        *([f"machines: {_machine(plan)}"] if plan.machine.count > 1 else []),
        f"threads: {plan.threads} ({reasons.threads})",
        f"start method: {plan.start_method} ({reasons.start_method})",
        *numa_lines(plan.bindings),
    ]
    for local_rank, rank in enumerate(plan.ranks):
        variables = plan.variables(local_rank)
        if not plan.master_port:
            variables["MASTER_PORT"] = "<a free port>"
        shown = (f"{name}={shlex.quote(value)}" for name, value in variables.items())
        lines += [f"rank {rank}:", *(f"  {each}" for each in shown)]
    return lines


def config_lines(config: RunConfig) -> list[str]:
    """Show the file and every value with its source, and what lost against another."""
    return [
        f"config: {_file(config)}",
        *(
            f"  {key} = {value!r}  ({config.source(key).where or 'default'})"
            for key, value in _values(config)
        ),
        *map(str, overridden(config)),
    ]


def _values(config: RunConfig) -> Iterator[tuple[str, Any]]:
    """Yield every key that can be set, in the order of the schema, with its value."""
    for key in keys():
        if is_built(key):
            yield key, value_at(config, key)
