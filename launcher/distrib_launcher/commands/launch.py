"""`distrib launch`: from the command line to a plan, which is shown or run."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace

import click

from distrib.config import RunConfig, load_config, overridden, to_wire
from distrib.errors import LaunchError
from distrib.topology.threads import threads_per_rank, usable_cores
from distrib_launcher.accelerators import processes_for
from distrib_launcher.backends import BACKENDS
from distrib_launcher.commands.options import GIVEN, flags, setting_options
from distrib_launcher.plan import LaunchPlan, find_program
from distrib_launcher.rendezvous import HOST, ReservedPort


@click.command(
    params=setting_options(),
    context_settings={
        "help_option_names": ["-h", "--help"],
        "allow_interspersed_args": False,  # what follows the program's name is the program's
        "token_normalize_func": lambda name: name.replace("_", "-"),
    },
)
@click.option(
    "-c", "--config", "--config-file", "file", metavar="FILE", help="Configuration; else ./distrib.yaml."
)
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any key, such as data.tail=pad.")
@click.option("-m", "--module", "kind", flag_value="module", help="PROGRAM is the name of a module.")
@click.option("--no-python", "kind", flag_value="command", help="PROGRAM is a command.")
@click.option("--dry-run", "show", flag_value="plan", help="Show what would run; start nothing.")
@click.option(
    "--explain", "show", flag_value="values", help="Show every value and its source; start nothing."
)
@click.argument("program", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def launch(
    context: click.Context,
    /,
    *,
    file: str | None,
    settings: tuple[str, ...],
    kind: str | None,
    show: str | None,
    program: tuple[str, ...],
) -> int:
    """Run PROGRAM on one or more processes of this machine, and explain how it ended.

    Everything after the program's name is the program's own.
    """
    env: Mapping[str, str] = context.obj
    config = load_config(file, env=env, flags=flags(context.meta.get(GIVEN, ()), settings))
    if show == "values":
        click.echo("\n".join(config_lines(config)))
        return 0
    plan, reason = make_plan(kind or "script", program, config, env)
    if show == "plan":
        click.echo("\n".join([*plan_lines(plan, reason), *config_lines(config)]))
        return 0
    return _start(plan, reason, config, env)


def _start(plan: LaunchPlan, reason: str, config: RunConfig, env: Mapping[str, str]) -> int:
    backend = BACKENDS.get(config.launch.backend)
    port = ReservedPort(plan.master_port, where=config.source("launch.master_port").where or None)
    try:
        sys.stdout.flush()
        click.echo("\n".join(start_up_lines(plan, reason, config, env)), err=True)
        return backend(replace(plan, master_port=port.port), env)
    finally:
        port.release()


def make_plan(
    kind: str, words: Sequence[str], config: RunConfig, env: Mapping[str, str]
) -> tuple[LaunchPlan, str]:
    """Settle what will run; return it with the reason for its number of threads.

    Args:
        kind: "script", "module" or "command".
        words: The program and its arguments.
        config: The settings of this launch.
        env: The launcher's environment.

    Raises:
        LaunchError: if the program is missing.
        TopologyError: if OMP_NUM_THREADS is no number.
    """
    program = find_program(kind, words, env)
    count = count_processes(config, env)[0]
    if config.strategy == "single" and count > 1:
        raise LaunchError(
            "D0310",
            f"strategy single runs on one process, but {count} were asked for",
            where=config.source("strategy").where,
            fix="leave the strategy out, or start one process",
        )
    threads, reason = threads_per_rank(env, usable_cores(), count)
    port = config.launch.master_port
    return LaunchPlan(program, count, threads, HOST, port, to_wire(config), config.launch.grace_s), reason


def count_processes(config: RunConfig, env: Mapping[str, str]) -> tuple[int, str]:
    """Return how many processes this machine gets, and why."""
    count = config.launch.nproc_per_node
    if count != "auto":
        return count, str(config.source("launch.nproc_per_node").where)
    if config.strategy == "single":
        return 1, "strategy single"
    return processes_for(config.device, env)


def start_up_lines(plan: LaunchPlan, reason: str, config: RunConfig, env: Mapping[str, str]) -> list[str]:
    """Say in one line what is started and why, and below it what overrode what."""
    processes = f"{plan.num_processes} process{'es' if plan.num_processes > 1 else ''}"
    if config.launch.nproc_per_node == "auto":
        processes += f" ({count_processes(config, env)[1]}; -n N starts N)"
    threads = f"{plan.threads} thread{'s' if plan.threads > 1 else ''} each ({reason})"
    head = (
        f"distrib: {plan.program.command}: {processes}, {_device(config)}, {threads}, config {_file(config)}"
    )
    return [head, *(f"distrib: {each}" for each in overridden(config)), *_crowded(plan.num_processes)]


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


def plan_lines(plan: LaunchPlan, reason: str) -> list[str]:
    """Show the command and each rank's environment."""
    lines = [
        f"command: {plan.program.command}",
        f"processes: {plan.num_processes}",
        f"threads: {plan.threads} ({reason})",
    ]
    for rank in range(plan.num_processes):
        variables = plan.variables(rank)
        if not plan.master_port:
            variables["MASTER_PORT"] = "<a free port>"
        shown = (f"{name}={shlex.quote(value)}" for name, value in variables.items())
        lines += [f"rank {rank}:", *(f"  {each}" for each in shown)]
    return lines


def config_lines(config: RunConfig) -> list[str]:
    """Show the file and every value that somebody set, with its source, and what lost."""
    values = config.set_values()
    shown = [f"  {key} = {value!r}  ({config.source(key).where})" for key, value in values.items()]
    return [
        f"config: {_file(config)}",
        *(shown or ["  every value is the default"]),
        *map(str, overridden(config)),
    ]
