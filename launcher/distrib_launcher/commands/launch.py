"""`distrib launch`: from the command line to a plan, which is shown or run."""

from __future__ import annotations

import resource
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace

import click

from distrib.config import RunConfig, load_config, overridden, to_wire
from distrib.errors import ConfigError, LaunchError
from distrib.topology import resolve_mesh
from distrib.topology.threads import threads_per_rank, usable_cores
from distrib_launcher.accelerators import processes_for
from distrib_launcher.backends import BACKENDS
from distrib_launcher.commands.options import GIVEN, flags, setting_options, twice
from distrib_launcher.output import say, show
from distrib_launcher.plan import LaunchPlan, find_program
from distrib_launcher.rendezvous import HOST, ReservedPort

_MOST_PROCESSES = 4096
_OWN_FILES = 40  # of the launcher itself, generously


@click.command(
    params=setting_options(),
    context_settings={
        "help_option_names": ["-h", "--help"],
        "allow_interspersed_args": False,  # what follows the program's name is the program's
        "token_normalize_func": lambda name: name.replace("_", "-"),
    },
)
@click.option(
    *("-c", "--config", "--config-file", "files"),
    multiple=True,
    metavar="FILE",
    help="Configuration; else ./distrib.yaml.",
)
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any key, such as data.tail=pad.")
@click.option("-m", "--module", is_flag=True, help="PROGRAM is the name of a module.")
@click.option("--no-python", is_flag=True, help="PROGRAM is a command.")
@click.option("--dry-run", is_flag=True, help="Show what would run; start nothing.")
@click.option("--explain", is_flag=True, help="Show every value and its source; start nothing.")
@click.argument("program", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def launch(
    context: click.Context,
    /,
    *,
    files: tuple[str, ...],
    settings: tuple[str, ...],
    module: bool,
    no_python: bool,
    dry_run: bool,
    explain: bool,
    program: tuple[str, ...],
) -> int:
    """Run PROGRAM on one or more processes of this machine, and explain how it ended.

    Everything after the program's name is the program's own.
    """
    env: Mapping[str, str] = context.obj
    config = load_config(_file_of(files), env=env, flags=flags(context.meta.get(GIVEN, ()), settings))
    if explain and not dry_run:
        return show("\n".join(config_lines(config)))
    plan, reason = make_plan(_kind(module=module, no_python=no_python), program, config, env)
    if dry_run:
        return show("\n".join([*plan_lines(plan, reason), *config_lines(config)]))
    return _start(plan, reason, config, env)


def _file_of(files: Sequence[str]) -> str | None:
    if "" in files:
        raise ConfigError(
            "D0102",
            "the name of the configuration file is empty; expected a YAML or JSON file",
            where="--config",
            fix="name a file, or leave the option out; a shell variable that is not set gives an empty name",
        )
    if len(set(files)) > 1:
        raise twice("--config", files[0], next(file for file in files if file != files[0]))
    return files[0] if files else None


def _kind(*, module: bool, no_python: bool) -> str:
    if module and no_python:
        raise LaunchError(
            "D0308",
            "--module says that the program is a module, but --no-python says that it is a command; expected one",
            where="distrib launch",
            fix="leave one of them out",
        )
    return "module" if module else "command" if no_python else "script"


def _start(plan: LaunchPlan, reason: str, config: RunConfig, env: Mapping[str, str]) -> int:
    backend = BACKENDS.get(config.launch.backend)
    port = ReservedPort(plan.master_port, where=config.source("launch.master_port").where or None)
    try:
        say("\n".join(start_up_lines(plan, reason, config, env)))
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
        ConfigError: if this machine cannot hold so many processes, or the mesh needs another number of them.
        TopologyError: if OMP_NUM_THREADS is no number.
    """
    program = find_program(kind, words, env)
    count = count_processes(config, env)[0]
    _check_count(count, config)
    if config.strategy == "single" and count > 1:
        raise LaunchError(
            "D0310",
            f"strategy single runs on one process, but {count} were asked for",
            where=config.source("strategy").where,
            fix="leave the strategy out, or start one process",
        )
    mesh = config.source("mesh.replicate").where
    resolve_mesh(config.mesh.model_dump(), count, where=f"{mesh} (mesh.replicate)" if mesh else None)
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


def most_processes(open_files: int) -> int:
    """Return how many processes a launcher with this limit of open files can watch: each takes it 5 of them."""
    return min(_MOST_PROCESSES, max(1, (open_files - _OWN_FILES) // 5))


def _check_count(count: int, config: RunConfig) -> None:
    open_files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    most = most_processes(open_files if open_files != resource.RLIM_INFINITY else sys.maxsize)
    if count > most:
        option = config.source("launch.nproc_per_node").where
        limit = "on one machine" if most == _MOST_PROCESSES else f"with a limit of {open_files} open files"
        raise ConfigError(
            "D0106",
            f"got {count}; expected at most {most} processes {limit}",
            where=f"{option} (launch.nproc_per_node)" if option else "launch.nproc_per_node",
            fix="start fewer" + ("" if most == _MOST_PROCESSES else ", or raise the limit: `ulimit -n`"),
        )


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
