"""`distrib launch`: from the command line to a plan, which is shown or run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import click

from distrib.config import load_config
from distrib.errors import ConfigError, LaunchError
from distrib_launcher.backends import BACKENDS, Request
from distrib_launcher.commands.options import GIVEN, flags, setting_options, twice
from distrib_launcher.describing import config_lines
from distrib_launcher.output import show
from distrib_launcher.redaction import Redactor


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
@click.option("--format", "shown_as", metavar="FORM", help="Of --dry-run: text, or with --backend tpu gke.")
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
    shown_as: str | None,
    explain: bool,
    program: tuple[str, ...],
) -> int:
    """Run PROGRAM on one or more processes, and explain how it ended.

    Everything after the program's name is the program's own.
    """
    env: Mapping[str, str] = context.obj
    config = load_config(_file_of(files), env=env, flags=flags(context.meta.get(GIVEN, ()), settings))
    if explain and not dry_run:
        return show(Redactor(env).text("\n".join(config_lines(config))))
    kind = _kind(module=module, no_python=no_python)
    request = Request(kind, program, config, env, dry_run=dry_run, format=shown_as or "text")
    if shown_as and not dry_run:
        raise LaunchError(
            "D0308",
            f"--format {shown_as} says how to show what would run, but nothing asks to show it",
            where="distrib launch",
            fix="add --dry-run, or leave --format out",
        )
    return BACKENDS.get(config.launch.backend)(request)


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
