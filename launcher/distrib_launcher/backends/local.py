"""The ranks as processes of this machine."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

from distrib_launcher import report
from distrib_launcher.oom import count_oom_kills
from distrib_launcher.output import say
from distrib_launcher.plan import LaunchPlan
from distrib_launcher.process import Supervisor


def run(plan: LaunchPlan, env: Mapping[str, str]) -> int:
    """Start the plan's ranks, watch them to their end, and report. Call from the main thread.

    Args:
        plan: With the port that is reserved.
        env: The environment that the ranks inherit.

    Returns:
        The exit code.
    """
    before = count_oom_kills()
    supervisor = Supervisor(grace_s=plan.grace_s, notice=_notice, follows=report.follows)
    ended = supervisor.run(plan.workers(env))
    text = report.render(ended, socket.gethostname(), count_oom_kills().since(before))
    if text:
        say(text)
    return report.exit_code(ended)


def _notice(line: str) -> None:
    """Show a line below what the only rank has written to the terminal itself, and below a "^C"."""
    say(f"\n{line}" if os.isatty(2) else line)
