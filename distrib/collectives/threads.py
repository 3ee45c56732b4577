"""Waiting for gloo's threads before the interpreter ends, and before it forks.

Such a thread lets go of an operation's tensors and callbacks a moment after the operation has been waited for. What
Python knows of them costs the thread the interpreter's lock, and the process aborts (exit code 134, after a run that
was right) if the interpreter is ending meanwhile. Ending the process group does not end the threads as long as a
DistributedDataParallel refers to it. torch 2.13 does not tell when they are done; the kernel does. A process that is forked at such a moment finds that lock's books locked, for ever.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Final

_NAME: Final = "pt_gloo_runloop"
_TASKS: Final = Path("/proc/self/task")
_STEP_S: Final = 0.001
_IN_A_ROW: Final = 3
_UNKNOWN_S: Final = 0.02


def let_threads_finish(within_s: float = 1.0) -> None:
    """Wait until gloo's threads have nothing to do, but not longer than `within_s` seconds.

    The interpreter's lock is free meanwhile, so a thread that wants it gets it, and sleeps again when it is done.
    """
    if sys.platform != "linux":
        time.sleep(_UNKNOWN_S)
        return
    end, idle = time.monotonic() + within_s, 0
    while idle < _IN_A_ROW and time.monotonic() < end:
        time.sleep(_STEP_S)
        idle = idle + 1 if _all_sleep() else 0


def _all_sleep() -> bool:
    for task in _TASKS.iterdir():
        try:
            name, state = (task / "comm").read_text(), (task / "stat").read_text()
        except OSError:  # it has ended
            continue
        if name.startswith(_NAME) and state.rpartition(") ")[2][0] != "S":
            return False
    return True
