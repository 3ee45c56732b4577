"""The ranks as processes of this machine."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

from distrib.errors import LaunchError
from distrib_launcher import report
from distrib_launcher.backends import Request, no_such_format
from distrib_launcher.describing import config_lines, plan_lines, start_up_lines
from distrib_launcher.limits import limits_behind
from distrib_launcher.oom import count_oom_kills
from distrib_launcher.output import Display, say, show, wants_color
from distrib_launcher.plan import LaunchPlan, find_program
from distrib_launcher.planning import make_plan
from distrib_launcher.process import Ended, Supervisor
from distrib_launcher.redaction import Redactor
from distrib_launcher.rendezvous import ReservedPort
from distrib_launcher.run_folder import RunFolder
from distrib_launcher.starting import Forker, PreloadFailed, StartRefused
from distrib_launcher.tpu import refuse_if_held

_NO_ROOM: Final = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE)
# What the ranks would import one by one. torch._dynamo comes with the first DistributedDataParallel.
_PRELOADED: Final = ("torch", "torch.distributed", "torch._dynamo", "distrib.accelerator")


def run(request: Request) -> int:
    """Start the ranks of this machine, watch them to their end, and report; after a failure, perhaps, once more.

    Call from the main thread.

    Args:
        request: What to start, or to show.

    Returns:
        The exit code.

    Raises:
        LaunchError: if the port is taken, the folder for logs cannot be made, or the system refuses the processes.
        ConfigError, TopologyError: as `make_plan`.
    """
    if request.format != "text":
        raise no_such_format(request, "local", ("text",))
    config, env = request.config, request.env
    plan, reasons = make_plan(find_program(request.kind, request.words, env), config, env)
    redactor = Redactor(env, plan.program.words)
    if request.dry_run:
        lines = [*plan_lines(plan, reasons, redactor), *config_lines(config)]
        return show(redactor.text("\n".join(lines)))
    return Launch(plan, env).run("\n".join(start_up_lines(plan, reasons, config, redactor)))


class Launch:
    """One launch: its attempts, and what is told of them. Errors as of the function `run`.

    Args:
        plan: What to start.
        env: The environment that the ranks inherit.
        embedded: Whether this process has a life of its own, as a notebook's.

    Attributes:
        headline: The first line of the last report; empty if all went well.
        interrupted: The signal that ended the launch from outside; 0 if none.
    """

    def __init__(self, plan: LaunchPlan, env: Mapping[str, str], *, embedded: bool = False) -> None:
        self._plan, self._env, self._embedded = plan, env, embedded
        self.headline, self.interrupted, self._is_closed = "", 0, False
        self._redactor = Redactor(env, plan.program.words)
        self._redact = self._redactor.text
        refuse_if_held(plan.exclusive)
        self._port = self._reserve()
        self._folder = self._make_folder(plan.log_dir) if plan.log_dir else None

    def run(self, announce: str) -> int:
        """Run it to its end; return the exit code.

        Args:
            announce: What to say when nothing stands against the start any more.
        """
        where = f"\ndistrib: logs in {self._folder.path}" if self._folder else ""
        say(self._redact(announce + where))
        plan = self._plan
        code = LaunchError.exit_code
        try:
            with self._supervisor() as supervisor:
                if plan.start_method == "fork":
                    workers = plan.workers(self._env)
                    supervisor.use(Forker(workers, supervisor.marker, _PRELOADED, plan.preload))
                code = self._attempts(supervisor)
        except StartRefused as refusal:
            raise _refused(refusal.error) from refusal
        except PreloadFailed as why:
            raise _not_started(str(why), "start it again, or set --start-method spawn") from why
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            raise _refused(error) from error
        finally:
            self._release()
            self._close(code)
        return code

    def _supervisor(self) -> Supervisor:
        return Supervisor(
            grace_s=self._plan.grace_s, notice=_notice, follows=report.follows, embedded=self._embedded
        )

    def _close(self, code: int) -> None:
        if not self._folder or self._is_closed:
            return
        self._is_closed, why = True, self._folder.close(code)
        if why:
            say(f"distrib: warning: its logs do not say that the launch has ended: {why}")

    def _attempts(self, supervisor: Supervisor) -> int:
        plan = self._plan
        while True:
            before = count_oom_kills()
            ended = self._attempt(plan, supervisor)
            restarts = report.is_worth_a_restart(ended) and plan.attempt < plan.max_restarts
            if not restarts:
                self._close(report.exit_code(ended))  # the report is the last thing on the screen
            self._report(
                ended,
                report.Circumstances(
                    hostname=socket.gethostname(),
                    oom_kills=count_oom_kills().since(before),
                    attempt=plan.attempt,
                    max_restarts=plan.max_restarts,
                    restarts=restarts,
                    logs=self._logs(plan),
                    redact=self._redact,
                ),
            )
            if not restarts:
                return report.exit_code(ended)
            plan = replace(plan, attempt=plan.attempt + 1)
            self._release()
            self._port = self._reserve()

    def _attempt(self, plan: LaunchPlan, supervisor: Supervisor) -> Ended:
        if not supervisor.prepare():
            return Ended((), supervisor.interrupted)
        port = self._port
        serves = port is not None and supervisor.serves_store
        listening = port.listen() if port is not None and serves else None
        plan = replace(plan, master_port=port.port if port else plan.master_port, serves_store=serves)
        log = partial(self._folder.new_log, plan.attempt) if self._folder else None
        display = Display(plan.shown_ranks, log, wants_color(self._env))
        handed_over = port.let_go if port is not None and serves else _nothing
        return supervisor.run(plan.workers(self._env), display, listening, handed_over)

    def _reserve(self) -> ReservedPort | None:
        """Take the port at which all ranks meet; None where that is another machine's."""
        plan = self._plan
        if plan.machine.index:
            return None
        return ReservedPort(plan.master_port, where=plan.port_from, for_others=plan.machine.count > 1)

    def _release(self) -> None:
        if self._port is not None:
            self._port.release()

    def _make_folder(self, log_dir: Path) -> RunFolder:
        plan = self._plan
        about = {
            "command": plan.program.shown(self._redactor.words),
            "num_processes": plan.num_processes,
            "world_size": plan.world_size,
            "max_restarts": plan.max_restarts,
        }
        return RunFolder.create(log_dir, about)

    def _logs(self, plan: LaunchPlan) -> dict[int, str]:
        folder = self._folder
        if folder is None:
            return {}
        paths = {rank: folder.log_path(plan.attempt, rank) for rank in plan.ranks}
        return {rank: str(path) for rank, path in paths.items() if path.exists()}  # else it could not be made

    def _report(self, ended: Ended, around: report.Circumstances) -> None:
        text = report.render(ended, around)
        self.headline = text.partition("\n")[0] if report.exit_code(ended) else ""
        self.interrupted = ended.interrupted
        if not text:
            return
        columns = shutil.get_terminal_size().columns if os.isatty(2) else None
        say(
            report.render(
                ended, replace(around, columns=columns, color=os.isatty(2) and wants_color(self._env))
            )
        )
        if self._folder and self.headline:
            facts = json.dumps(report.facts(ended, around), indent=1)
            folder = self._folder.path
            with suppress(OSError):  # a full disk: the report stands on the screen
                for place in (folder / f"attempt-{around.attempt}", *([] if around.restarts else [folder])):
                    (place / "report.txt").write_text(text + "\n", encoding="utf-8")
                    (place / "failure.json").write_text(facts + "\n", encoding="utf-8")


def _refused(error: OSError) -> LaunchError:
    """Return the error for a start for which the system has no room."""
    return _not_started(
        str(error.strerror), "start fewer processes, raise the limit, or free what is used up"
    )


def _not_started(why: str, fix: str) -> LaunchError:
    return LaunchError(
        "D0313",
        f"the ranks cannot be started: {why}",
        where="; ".join(limits_behind(why)) or "distrib launch",
        fix=fix,
    )


def _nothing() -> None:
    """Nobody has taken the port over."""


def _notice(line: str) -> None:
    """Show a line below what the only rank has written to the terminal itself, and below a "^C"."""
    say(f"\n{line}" if os.isatty(2) else line)
