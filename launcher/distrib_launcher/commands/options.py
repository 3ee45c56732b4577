"""The options of `distrib launch` that set keys of the configuration."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, Final

import click

from distrib.errors import LaunchError, NotBuiltError

Given = tuple[str, str, str]  # key, value, option as it is called
GIVEN: Final = "distrib_launcher.given"  # where click's context keeps the list of `Given`

_SETTINGS: Final[tuple[tuple[tuple[str, ...], str, str], ...]] = (
    (("-n", "--nproc-per-node"), "launch.nproc_per_node", "Processes on this machine."),
    (("--device",), "device", "auto, cpu, cuda, ..."),
    (("--strategy",), "strategy", "auto, single, ddp, ..."),
    (("--mixed-precision",), "mixed_precision", "no, bf16, ..."),
    (("--global-batch-size",), "global_batch_size", "Samples of one optimizer step, over all ranks."),
    (
        ("--gradient-accumulation-steps",),
        "gradient_accumulation_steps",
        "Micro-batches of one optimizer step.",
    ),
    (("--seed",), "seed", "The seed that everything random follows from."),
    (("--master-port",), "launch.master_port", "Port at which the ranks meet; 0: any free one."),
    (("--grace",), "launch.grace_s", "Seconds between SIGTERM and SIGKILL."),
    (("--collective-timeout",), "watch.stall_timeout_s", "Seconds after which a collective fails."),
    (("--nnodes",), "launch.nnodes", "Machines: N or FEWEST:MOST."),
    (("--hostfile",), "launch.hostfile", "DeepSpeed's file of machines, with one line."),
    (("--backend",), "launch.backend", "What starts the processes."),
    (("--start-method",), "launch.start_method", "fork or spawn."),
    (("--max-restarts",), "launch.max_restarts", "Restarts after a failure."),
    (("--rdzv-timeout",), "launch.rdzv_timeout_s", "Seconds to wait for all machines."),
    (("--preload",), "launch.preload", "Modules to load once for all ranks, beside torch."),
    (("--log-dir",), "launch.log_dir", "Folder for each rank's output."),
    (
        ("--show-ranks",),
        "launch.show_ranks",
        "Ranks whose output is shown: 0, or 0,3.",
    ),
)
_OTHER_NAMES: Final = {  # Accelerate's, and the last one torchrun's, for the same keys
    "--num-processes": "launch.nproc_per_node",
    "--num-machines": "launch.nnodes",
    "--main-process-port": "launch.master_port",
    "--local-ranks-filter": "launch.show_ranks",
}
_SHORTCUTS: Final = {
    "--cpu": ("device", "cpu"),
    "--multi-gpu": ("strategy", "ddp"),
    "--use-deepspeed": ("strategy", "deepspeed"),
    "--numa": ("launch.numa", "true"),
}
_HERE: Final = ("localhost", "127.0.0.1")
_SEVERAL_MACHINES: Final[dict[str, tuple[str, ...]]] = {  # what they say where there is but one machine
    "--node-rank": ("0",),
    "--machine-rank": ("0",),
    "--master-addr": _HERE,
    "--main-process-ip": _HERE,
    "--rdzv-backend": ("static", "c10d"),
    "--rdzv-endpoint": (*_HERE, *(f"{host}:0" for host in _HERE)),
    "--rdzv-id": (),
    "--rdzv-conf": (),
}


def setting_options() -> list[click.Parameter]:
    """Return the options; each one that is given is noted in the context's `meta[GIVEN]`."""
    return [
        *(_option(names, key, about=about) for names, key, about in _SETTINGS),
        *(_option((name,), key, about=f"Another name of {key}.") for name, key in _OTHER_NAMES.items()),
        *(
            _option((name,), key, value, about=f"Set {key} to {value}.")
            for name, (key, value) in _SHORTCUTS.items()
        ),
        *(_of_several_machines(name, here) for name, here in _SEVERAL_MACHINES.items()),
        click.Option(
            ["--standalone"], is_flag=True, expose_value=False, hidden=True
        ),  # torchrun's: one machine
    ]


def _option(names: Sequence[str], key: str, value: str | None = None, *, about: str) -> click.Option:
    """Make an option that notes `value`, or, where that is None, each of the values that follow it."""

    def note(context: click.Context, _: click.Parameter, given: Any) -> None:
        values = given if value is None else [value] if given else []
        context.meta.setdefault(GIVEN, []).extend((key, each, names[-1]) for each in values)

    shape: dict[str, Any] = {"multiple": True, "metavar": "VALUE"} if value is None else {"is_flag": True}
    return click.Option(names, callback=note, expose_value=False, help=about, **shape)


def _of_several_machines(name: str, here: Collection[str]) -> click.Option:
    """Make an option that is refused, unless it says what is so on one machine anyway."""

    def refuse(_: click.Context, __: click.Parameter, given: str | None) -> None:
        if given is not None and given not in here:
            raise NotBuiltError(f"{name} {given}", where=name)

    return click.Option([name], callback=refuse, expose_value=False, hidden=True)


def flags(given: Iterable[Given], settings: Iterable[str]) -> dict[str, tuple[object, str]]:
    """Return what was given on the command line: key -> (value, option).

    Args:
        given: From options of their own.
        settings: "key=value", from `--set`.

    Raises:
        LaunchError: if a `--set` has no "=", or two options contradict each other.
    """
    found: dict[str, tuple[object, str]] = {}
    for key, value, option in [*given, *map(_split, settings)]:
        before, earlier = found.get(key, (value, option))
        if before == value:
            found[key] = (value, earlier)
        elif earlier == option:
            raise twice(option, before, value)
        else:
            raise LaunchError(
                "D0308",
                f"{earlier} says {before!r}, but {option} says {value!r}; expected one value for {key}",
                where=option,
                fix=f"leave one of them out: {earlier} or {option}",
            )
    return found


def twice(option: str, before: object, value: object) -> LaunchError:
    """Return the error for one option with two values."""
    return LaunchError(
        "D0308",
        f"{option} is given as {before!r} and as {value!r}; expected one value",
        where="distrib launch",
        fix="leave one of them out",
    )


def _split(setting: str) -> Given:
    key, equals, value = setting.partition("=")
    if not equals:
        raise LaunchError(
            "D0309",
            f"got {setting!r}; expected KEY=VALUE",
            where="--set",
            fix="write it as --set data.tail=pad",
        )
    return key.strip(), value, f"--set {key.strip()}"
