"""The command line `distrib`. Each command's module is imported only when that command is called."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Final

import click

from distrib import __version__
from distrib.errors import DistribError, LaunchError, did_you_mean
from distrib_launcher.output import open_closed_streams, say

_COMMANDS: Final[Mapping[str, tuple[str, str]]] = {
    "launch": ("distrib_launcher.commands.launch:launch", "Run a program on one or more processes."),
    "checkpoint": (
        "distrib_launcher.commands.checkpoint:checkpoint",
        "Look at checkpoints, check, compare, export, convert and remove them.",
    ),
    "logs": ("distrib_launcher.commands.logs:logs", "Print what the ranks of a launch have written."),
}


class LazyGroup(click.Group):
    """A group that knows its commands' names and help, and imports a command when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names, without importing anything."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command; None if there is no such name."""
        if cmd_name not in _COMMANDS:
            return None
        module, _, attribute = _COMMANDS[cmd_name][0].partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click's, with our own error for an unknown name."""
        if args and args[0] not in _COMMANDS:
            raise LaunchError(
                "D0305",
                f"there is no command {args[0]!r}{did_you_mean(args[0], _COMMANDS)}",
                where="distrib",
                fix="distrib --help lists the commands",
            )
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands from the table."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, about) for name, (_, about) in _COMMANDS.items()])


@click.group(
    cls=LazyGroup,
    invoke_without_command=True,
    subcommand_metavar="COMMAND [ARGS]...",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, message="distrib %(version)s")
@click.pass_context
def distrib(context: click.Context) -> None:
    """Distributed training for plain PyTorch loops."""
    if context.invoked_subcommand is None:
        say(context.get_help())
        context.exit(LaunchError.exit_code)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code; errors are printed without a traceback.

    Args:
        args: The words after the command's name; by default the process's own.
    """
    open_closed_streams()
    sys.exit(run(args, dict(os.environ)))


def run(args: Sequence[str] | None, env: Mapping[str, str]) -> int:
    """Run the command line in an environment; return the exit code."""
    try:
        code = distrib.main(args=args, prog_name="distrib", standalone_mode=False, obj=env)
    except click.UsageError as error:
        return _print(_usage_error(error))
    except DistribError as error:
        return _print(error)
    except (click.Abort, KeyboardInterrupt):
        return 130
    return code if isinstance(code, int) else 0


def _usage_error(error: click.UsageError) -> LaunchError:
    name = error.ctx.command_path if error.ctx else "distrib"
    fix = f"{name} --help lists the options"
    if isinstance(error, click.NoSuchOption):
        known = [option for each in _parameters(error.ctx) for option in each.opts]
        near = did_you_mean(error.option_name, known)
        return LaunchError("D0306", f"no such option{near}", where=error.option_name, fix=fix)
    return LaunchError("D0307", error.format_message().rstrip("."), where=name, fix=fix)


def _parameters(context: click.Context | None) -> list[click.Parameter]:
    return context.command.params if context else []


def _print(error: DistribError) -> int:
    say(str(error))
    return error.exit_code
