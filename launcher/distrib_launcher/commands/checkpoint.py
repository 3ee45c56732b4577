"""`distrib checkpoint`: look at checkpoints, check, compare, export, convert and remove them.

The commands import distrib.checkpoint, and with it torch, only when one of them is called; this is the one module of the
launcher that may.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from distrib.errors import CheckpointError, LaunchError, did_you_mean
from distrib_launcher.output import say, show

if TYPE_CHECKING:
    from distrib.checkpoint import Reader
    from distrib.checkpoint.retention import Best

_HELP: Final = {"help_option_names": ["-h", "--help"]}
_ALIASES: Final = {"merge": "export"}
_DTYPES: Final = ("float32", "float16", "bfloat16", "float64")
_FORMATS: Final = ("hf", "adapter")
_CONFIG_NAMES: Final = {"hf": "config.json", "adapter": "adapter_config.json"}


class _Group(click.Group):
    """A group with aliases, and our own error for an unknown name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of their definition."""
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click's, but for aliases and unknown names."""
        if args and args[0] not in {*self.commands, *_ALIASES}:
            raise LaunchError(
                "D0305",
                f"there is no command {args[0]!r}{did_you_mean(args[0], [*self.commands, *_ALIASES])}",
                where="distrib checkpoint",
                fix="distrib checkpoint --help lists the commands",
            )
        return super().resolve_command(ctx, [_ALIASES.get(args[0], args[0]), *args[1:]] if args else args)


@click.group(
    cls=_Group,
    invoke_without_command=True,
    subcommand_metavar="COMMAND [ARGS]...",
    context_settings=_HELP,
)
@click.pass_context
def checkpoint(context: click.Context) -> None:
    """Look at checkpoints, check, compare, export, convert and remove them.

    No command needs a GPU or the training code. Wherever a checkpoint or a folder of checkpoints is named, it may be a URL of
    an object store: s3://bucket/run/step-1.
    """
    if context.invoked_subcommand is None:
        say(context.get_help())
        context.exit(LaunchError.exit_code)


@checkpoint.command("ls", short_help="List the checkpoints of a folder.", context_settings=_HELP)
@click.argument("directory", default="checkpoints")
def list_(*, directory: str) -> int:
    """List the checkpoints of DIRECTORY (default: checkpoints), or below a URL, newest last.

    A checkpoint that cannot be loaded is listed with the reason, as far as sizes tell; verify reads the bytes.
    """
    from distrib.checkpoint.inventory import inventory, inventory_lines  # noqa: PLC0415 (loads torch)

    found = inventory(directory)
    if not found:
        say(f"no checkpoints in {directory}")
        return 0
    return show("\n".join(inventory_lines(found)))


@checkpoint.command("show", short_help="Show what a checkpoint holds.", context_settings=_HELP)
@click.argument("path")
@click.option("--json", "as_json", is_flag=True, help="For other programs: also where each slice lies.")
def show_(*, path: str, as_json: bool) -> int:
    """Show what the checkpoint PATH holds: step, who wrote it, its settings and tensors."""
    from distrib.checkpoint import inspect  # noqa: PLC0415 (loads torch)
    from distrib.checkpoint.describe import json_of, lines_of  # noqa: PLC0415 (loads torch)

    manifest = inspect(path)
    if as_json:
        return show(json.dumps(json_of(manifest, path), indent=2))
    return show("\n".join(lines_of(manifest, path)))


@checkpoint.command(short_help="Compare every byte with its checksum.", context_settings=_HELP)
@click.argument("paths", nargs=-1, required=True)
def verify(*, paths: tuple[str, ...]) -> int:
    """Read every byte of the checkpoints PATHS and compare it with its checksum.

    Each damaged file and tensor is named. The exit code is 1 if there is one.
    """
    from distrib.checkpoint.damage import damage  # noqa: PLC0415 (loads torch)

    code = 0
    for path in paths:
        try:
            with _progress(f"verify {path}") as progress:
                found = list(damage(path, progress))
        except CheckpointError as error:
            found = [error]
        for each in found:
            say(str(each))
        code = code or (CheckpointError.exit_code if found else 0)
        code = show(f"{path}: {f'{len(found)} damaged' if found else 'ok'}") or code
    return code


@checkpoint.command(short_help="Compare two checkpoints.", context_settings=_HELP)
@click.argument("a")
@click.argument("b")
@click.option("--no-verify", is_flag=True, help="Do not compare checksums first.")
def diff(*, a: str, b: str, no_verify: bool) -> int:
    """Compare the checkpoints A and B: tensors by name, shape, dtype and value, and settings.

    The exit code is 1 if they differ. Hosts, times, versions and numbers of ranks are not compared.
    """
    from distrib.checkpoint.compare import differences  # noqa: PLC0415 (loads torch)

    with _opened(a, verify=not no_verify) as one, _opened(b, verify=not no_verify) as other:
        with _progress("diff") as progress:
            found = list(differences(one, other, progress))
        return (show("\n".join(found)) or 1) if found else show(f"{a} and {b} hold the same")


@checkpoint.command(short_help="Write weights as Hugging Face libraries read them.", context_settings=_HELP)
@click.argument("path")
@click.argument("out")
@click.option("--format", "layout", type=click.Choice(_FORMATS), default="hf", show_default=True)
@click.option(
    "--dtype", type=click.Choice(_DTYPES), help="Convert floating-point weights; default: as they are."
)
@click.option(
    "--max-shard-size", metavar="SIZE", help="Of one file, such as 5GB; default 10GB. With hf only."
)
@click.option(
    "--include", multiple=True, metavar="PATTERN", help="Only tensors whose name fits; may be repeated."
)
@click.option(
    "--config", type=click.Path(path_type=Path), help="Copied to config.json or adapter_config.json."
)
@click.option(
    "--model", "index", type=click.IntRange(min=0), default=0, metavar="N", help="0 is the first prepared."
)
@click.option("--adapter", metavar="NAME", help="Which adapter of PEFT's model; default: default.")
@click.option("--no-verify", is_flag=True, help="Do not compare checksums first.")
def export(
    *,
    path: str,
    out: str,
    layout: str,
    dtype: str | None,
    max_shard_size: str | None,
    include: tuple[str, ...],
    config: Path | None,
    index: int,
    adapter: str | None,
    no_verify: bool,
) -> int:
    """Write the weights of the checkpoint PATH to the directory OUT, as Hugging Face libraries read them.

    With --format adapter only the tensors of an adapter (LoRA and the like), as PEFT reads them. Its alias is merge.
    """
    _refuse_other_format(layout, max_shard_size=max_shard_size, adapter=adapter)
    from distrib.checkpoint.commands import (  # noqa: PLC0415 (loads torch)
        export_checkpoint,
        local_directory,
    )

    folder = local_directory(out, "an export")  # before a byte is read
    with _opened(path, verify=not no_verify) as reader, _progress("export") as progress:
        written = export_checkpoint(
            reader,
            folder,
            adapter=(adapter or "default") if layout == "adapter" else None,
            dtype=dtype,
            max_shard_size=max_shard_size or "10GB",
            include=include or None,
            settings=(config, _CONFIG_NAMES[layout]) if config else None,
            model=index,
            progress=progress,
        )
    return show(str(written))


@checkpoint.command(short_help="Make a checkpoint from another program's.", context_settings=_HELP)
@click.argument("source")
@click.argument("out")
@click.option(
    "--step", type=click.IntRange(min=0), metavar="N", help="Optimizer steps taken, if SOURCE does not say."
)
@click.option(
    "--allow-pickle", is_flag=True, help="Run code that pickled objects in SOURCE name. Only if you trust it."
)
@click.option("--no-verify", is_flag=True, help="Do not compare checksums first.")
def convert(*, source: str, out: str, step: int | None, allow_pickle: bool, no_verify: bool) -> int:
    """Make the checkpoint OUT from SOURCE, which another program wrote.

    SOURCE is a directory of Accelerate's save_state (also with FSDP or DeepSpeed), of torch.distributed.checkpoint or of
    DeepSpeed, or a file of torch.save or safetensors; or a URL of these, which is copied to TMPDIR first. OUT is a
    directory.
    """
    from distrib.checkpoint.commands import local_directory  # noqa: PLC0415 (loads torch)
    from distrib.checkpoint.convert import convert as convert_  # noqa: PLC0415 (as above)
    from distrib.checkpoint.fetch import fetched  # noqa: PLC0415 (as above)

    folder = local_directory(out, "a conversion")  # before a byte is read
    with ExitStack() as stack:
        with _progress("copy") as progress:
            local = stack.enter_context(fetched(source, progress))
        with _progress("convert") as progress:
            made = convert_(
                local, folder, step=step, allow_pickle=allow_pickle, verify=not no_verify, progress=progress
            )
    for each in made.left_out:
        say(f"left out: {each}")
    return show(f"{out}: from {made.kind}, step {made.step}")


@checkpoint.command(short_help="Remove old checkpoints.", context_settings=_HELP)
@click.argument("directory")
@click.option(
    "--keep-last", type=click.IntRange(min=1), required=True, metavar="N", help="Keep the newest N."
)
@click.option(
    "--keep-every", type=click.IntRange(min=1), metavar="N", help="Also keep steps that are multiples of N."
)
@click.option(
    "--keep-best",
    type=click.IntRange(min=0),
    metavar="N",
    help="Also keep the N best, instead of checkpoint.keep_best of the run; 0 keeps none.",
)
@click.option("--best-metric", metavar="NAME", help="By this metric, instead of checkpoint.best_metric.")
@click.option(
    "--best-mode", type=click.Choice(("min", "max")), help="Its best value, instead of checkpoint.best_mode."
)
@click.option("--dry-run", is_flag=True, help="Show what would be removed; remove nothing.")
def prune(
    *,
    directory: str,
    keep_last: int,
    keep_every: int | None,
    keep_best: int | None,
    best_metric: str | None,
    best_mode: str | None,
    dry_run: bool,
) -> int:
    """Remove old checkpoints of DIRECTORY, or below a URL, named step-<number>.

    Those that the run which saved the newest one keeps as its best (checkpoint.keep_best) stay. Incomplete ones are
    neither counted nor removed.
    """
    from distrib.checkpoint import locate, retain  # noqa: PLC0415 (loads torch)
    from distrib.checkpoint.inventory import names_in  # noqa: PLC0415 (as above)
    from distrib.checkpoint.retention import Best, complete  # noqa: PLC0415 (as above)

    names_in(locate(directory))  # a place that is not there is a mistake, not one without old checkpoints
    paths = [path for _, path in complete(directory)]
    of_run = Best.of_run(paths[-1]) if paths else None
    given: dict[str, Any] = {"number": keep_best, "metric": best_metric, "mode": best_mode}
    best = (of_run or Best("", "min", 0))._replace(**{k: v for k, v in given.items() if v is not None})
    stay = best.of(paths) if best.number else []
    _refuse_unclear_best(best, stay, paths, given)
    removed = retain(
        directory, keep_last, keep_every=keep_every, best=best if best.number else None, dry_run=dry_run
    )
    verb = "would remove" if dry_run else "removed"
    kept = [f"keeping {path}, of the {best.number} best by {best.metric} ({best.mode})" for path in stay]
    return show(
        "\n".join([*kept, *(f"{verb} {path}" for path in removed), f"{verb} {len(removed)} checkpoints"])
    )


def _refuse_unclear_best(
    best: Best, stay: Sequence[object], paths: Sequence[object], given: Mapping[str, Any]
) -> None:
    """Refuse options that leave open which checkpoints are the best, before one of them is removed."""
    if best.number and not best.metric:
        problem = "--keep-best says how many, but neither --best-metric nor the run says by which metric"
    elif not best.number and (given["metric"] or given["mode"]):
        problem = "--best-metric and --best-mode say which are the best, but none are to be kept"
    elif given["metric"] and paths and not stay:
        problem = f"no checkpoint has a value of the metric {best.metric!r}"
    else:
        return
    raise LaunchError(
        "D0325",
        f"the best checkpoints are not clear: {problem}",
        where="distrib checkpoint prune",
        fix="name --keep-best N and --best-metric NAME as save_state(metrics={NAME: ...}) does, or leave them out",
    )


def _refuse_other_format(layout: str, *, max_shard_size: str | None, adapter: str | None) -> None:
    given, wanted = ("--max-shard-size", "hf") if layout == "adapter" else ("--adapter", "adapter")
    if (max_shard_size if layout == "adapter" else adapter) is not None:
        raise LaunchError(
            "D0308",
            f"{given} says something about --format {wanted}, but the format is {layout}",
            where="distrib checkpoint export",
            fix=f"leave one of them out: PEFT reads one file, and {wanted} is the format that {given} belongs to",
        )


@contextmanager
def _opened(path: str, *, verify: bool) -> Iterator[Reader]:
    """Open a checkpoint; with `verify`, only if every byte has its checksum, else all that is damaged is named."""
    from distrib.checkpoint.commands import open_alone  # noqa: PLC0415 (loads torch)
    from distrib.checkpoint.damage import damage  # noqa: PLC0415 (as above)

    if verify:
        with _progress(f"verify {path}") as progress:
            found = list(damage(path, progress))
        for each in found[:-1]:
            say(str(each))
        if found:
            raise found[-1]
    with open_alone(path, verify=False) as reader:
        yield reader


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Yield what is told (done, all); it draws a bar if stderr is a terminal."""
    if not os.isatty(2):
        yield lambda *_: None
        return
    from rich.console import Console  # noqa: PLC0415 (slow to import)
    from rich.progress import Progress  # noqa: PLC0415 (as above)

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
