"""What a launch will do, settled before anything is started. Immutable values and pure functions."""

from __future__ import annotations

import difflib
import importlib.machinery
import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from distrib.errors import LaunchError
from distrib_launcher.numa import Binding
from distrib_launcher.rendezvous import HOST
from distrib_launcher.starting import WorkerSpec
from distrib_launcher.worker import BINDING

_OTHER_LAUNCHERS = (
    "TORCHELASTIC_",
    "PMI_",
    "PMIX_",
    "OMPI_COMM_",
    "MV2_COMM_",
    "MPI_LOCAL",
)  # would tell a rank that it is another one's
_EXTENSIONS = (".py", ".pyc", ".zip", ".pyz")


@dataclass(frozen=True)
class Program:
    """The user's program.

    Attributes:
        kind: "script", "module", "command" or "function".
        target: The script's path, the module's dotted name, the command, or the file with the function.
        args: Its arguments, as they were given.
        title: What to call it; by default what one would type.
    """

    kind: str
    target: str
    args: tuple[str, ...] = ()
    title: str = ""

    @property
    def words(self) -> tuple[str, ...]:
        """The program and its arguments."""
        return (self.target, *self.args)

    @property
    def command(self) -> str:
        """The program as one would type it."""
        return self.shown(list)

    def shown(self, redact: Callable[[Sequence[str]], list[str]]) -> str:
        """As `command`, with the words that `redact` makes of the program's."""
        if self.title:
            return self.title
        start = {"script": ["python"], "module": ["python", "-m"], "command": []}[self.kind]
        return shlex.join([*start, *redact(self.words)])


@dataclass(frozen=True)
class Machine:
    """This machine among those of the job, each of which has a launcher of its own.

    Attributes:
        index: Its number; the first one's ranks come first, and all ranks meet there.
        count: How many there are, all with equally many ranks.
        reason: Who says so.
        main_host: The first one's address.
    """

    index: int = 0
    count: int = 1
    reason: str = "one machine"
    main_host: str = HOST


@dataclass(frozen=True)
class LaunchPlan:
    """One launch on this machine.

    Attributes:
        program: What every rank runs.
        num_processes: How many ranks on this machine.
        threads: CPU threads for each rank.
        master_addr: Address at which the ranks meet.
        master_port: Its port; 0 while it is not chosen yet.
        config: The configuration for the workers, as JSON.
        grace_s: Seconds between asking a rank to end and killing it.
        start_method: "fork" or "spawn".
        preload: Modules that are loaded once, before forking, beside torch.
        max_restarts: How often the ranks are started again after a failure.
        attempt: How often they have been.
        port_from: What asked for the port, to be named in an error; None if nobody did.
        log_dir: Folder for the logs of launches; None: keep none.
        shown_ranks: Whose output is shown; None: everybody's.
        bindings: What each rank is bound to; empty: to nothing.
        serves_store: Whether the launcher's side serves the store at the address.
        machine: Which of several this is.
        device_variables: What each rank here gets for its device, by local rank; empty: nothing.
        exclusive: Device files that no other program may have open.
    """

    program: Program
    num_processes: int
    threads: int
    master_addr: str
    master_port: int
    config: str
    grace_s: float
    start_method: str = "spawn"
    preload: tuple[str, ...] = ()
    max_restarts: int = 0
    attempt: int = 0
    port_from: str | None = None
    log_dir: Path | None = None
    shown_ranks: frozenset[int] | None = None
    bindings: tuple[Binding, ...] = ()
    serves_store: bool = False
    machine: Machine = Machine()
    device_variables: tuple[Mapping[str, str], ...] = ()
    exclusive: tuple[str, ...] = ()

    @property
    def world_size(self) -> int:
        """The ranks of all machines."""
        return self.num_processes * self.machine.count

    @property
    def ranks(self) -> range:
        """The ranks of this machine."""
        first = self.num_processes * self.machine.index
        return range(first, first + self.num_processes)

    def variables(self, local_rank: int) -> dict[str, str]:
        """Return the environment variables that a rank of this machine gets from the launcher."""
        return {
            "RANK": str(self.ranks[local_rank]),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(local_rank),
            "LOCAL_WORLD_SIZE": str(self.num_processes),
            "NODE_RANK": str(self.machine.index),
            "GROUP_RANK": str(self.machine.index),
            "GROUP_WORLD_SIZE": str(self.machine.count),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
            "OMP_NUM_THREADS": str(self.threads),
            "DISTRIB_CONFIG": self.config,
            "TORCHELASTIC_RESTART_COUNT": str(self.attempt),
            "TORCHELASTIC_MAX_RESTARTS": str(self.max_restarts),
            **({BINDING: json.dumps(self.bindings[local_rank])} if self.bindings else {}),
            # torch's own name for "every rank is a client of the store, rank 0 too"
            **({"TORCHELASTIC_USE_AGENT_STORE": "True"} if self.serves_store else {}),
            **(self.device_variables[local_rank] if self.device_variables else {}),
        }

    def workers(self, env: Mapping[str, str]) -> tuple[WorkerSpec, ...]:
        """Return the processes to start.

        Args:
            env: The launcher's environment, which the workers inherit but for other launchers' variables.
        """
        inherited = {name: value for name, value in env.items() if not name.startswith(_OTHER_LAUNCHERS)}
        return tuple(
            WorkerSpec(
                rank, self.program.kind, self.program.words, {**inherited, **self.variables(local_rank)}
            )
            for local_rank, rank in enumerate(self.ranks)
        )


def find_program(kind: str, words: Sequence[str], env: Mapping[str, str]) -> Program:
    """Check that the program is there before anything is started.

    Args:
        kind: "script", "module" or "command".
        words: The program and its arguments.
        env: Its PATH is where a command is looked for.

    Raises:
        LaunchError: if the program is missing, with the nearest name.
    """
    if not words:
        raise LaunchError(
            "D0303",
            "there is no program to launch",
            where="distrib launch",
            fix="name one after the options: distrib launch train.py, or distrib launch -m package.module",
        )
    program = Program(kind, words[0], tuple(words[1:]))
    {"script": _check_script, "module": _check_module, "command": _check_command}[kind](program.target, env)
    return program


def _check_script(target: str, env: Mapping[str, str]) -> None:
    path = Path(target)
    if path.is_dir() and not (path / "__main__.py").is_file():
        raise _missing(f"{target} is a directory without a __main__.py", "name the script in it")
    if not path.exists():
        near = _near_script(path)
        command = " or --no-python for a command" if shutil.which(target, path=env.get("PATH")) else ""
        raise _missing(f"there is no script {target} in {Path.cwd()}{near}", f"correct the path{command}")
    if not os.access(path, os.R_OK):
        raise _missing(f"the script {target} cannot be read", "give yourself permission to read it")


def _near_script(path: Path) -> str:
    try:
        names = [each.name for each in path.parent.iterdir() if each.suffix in _EXTENSIONS]
    except OSError:
        return ""
    by_stem = {
        Path(name).stem: name for name in names
    }  # the extension, which all share, would make any two alike
    near = difflib.get_close_matches(path.stem, by_stem, n=1)
    return f"; did you mean {by_stem[near[0]]!r}?" if near else ""


def _check_module(target: str, env: Mapping[str, str]) -> None:
    """Look for the first part of the name only: to look further would import it."""
    first = target.partition(".")[0]
    places = [str(Path.cwd()), *env.get("PYTHONPATH", "").split(os.pathsep), *sys.path]
    known = first in sys.builtin_module_names or importlib.machinery.FrozenImporter.find_spec(first)
    if not (known or importlib.machinery.PathFinder.find_spec(first, places)):
        raise _missing(
            f"there is no module {target}: {first} is neither in {Path.cwd()} nor installed",
            "correct the name, install the package, or start from the directory that holds it",
        )


def _check_command(target: str, env: Mapping[str, str]) -> None:
    if shutil.which(target, path=env.get("PATH")) is None:
        raise _missing(f"there is no command {target}", "correct it, or leave --no-python out for a script")


def _missing(problem: str, fix: str) -> LaunchError:
    return LaunchError("D0304", problem, where="distrib launch", fix=fix)
