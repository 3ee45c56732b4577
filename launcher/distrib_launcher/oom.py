"""Was the kernel's out-of-memory killer at work? Its counters can be read by everybody; its log cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class OomKills:
    """How many processes the kernel has killed for lack of memory; None where it does not tell.

    Attributes:
        group: Processes of our control group (the container, the job's step), whichever limit it was.
        machine: Processes of the whole machine, ours included.
    """

    group: int | None = None
    machine: int | None = None

    def since(self, before: OomKills) -> OomKills:
        """Return how many were added since an earlier count."""
        return OomKills(_difference(self.group, before.group), _difference(self.machine, before.machine))

    def explain_sigkill(self) -> str:
        """Say what a SIGKILL that came in the time counted most likely was."""
        if self.group:
            return (
                f"out of memory: the kernel killed {self.group} of this job's processes for it; "
                "fewer data-loader workers or a smaller batch need less"
            )
        if self.machine:
            return f"out of memory: the kernel killed {self.machine} processes of this machine for it; `dmesg` names them"
        if self.machine == 0:
            return (
                "a user, a scheduler or a script sent it; the kernel's out-of-memory killer was not at work"
            )
        return "often the kernel's out-of-memory killer: `dmesg` names the process"


def count_oom_kills(read: Callable[[str], str | None] | None = None) -> OomKills:
    """Read the kernel's counters.

    Args:
        read: Path -> contents of the file, None where it cannot be read; the real files by default.

    See https://docs.kernel.org/admin-guide/cgroup-v2.html (memory.events), .../cgroup-v1/memory.html
    (memory.oom_control), and `oom_kill` in /proc/vmstat since Linux 4.13.
    """
    read = read or _read
    counts = (_counter(read(path)) for path in _group_files(read("/proc/self/cgroup") or ""))
    group = next((count for count in counts if count is not None), None)
    return OomKills(group, _counter(read("/proc/vmstat")))


def _group_files(proc_self_cgroup: str) -> Iterator[str]:
    """Yield where our group's counter may be; in a container the path may be one of the host."""
    for line in proc_self_cgroup.splitlines():
        _, controllers, group = line.split(":", 2)
        if "memory" in controllers.split(","):
            yield f"/sys/fs/cgroup/memory{group.rstrip('/')}/memory.oom_control"
            yield "/sys/fs/cgroup/memory/memory.oom_control"
        elif not controllers:
            yield f"/sys/fs/cgroup{group.rstrip('/')}/memory.events"
            yield "/sys/fs/cgroup/memory.events"


def _counter(text: str | None) -> int | None:
    rows = (line.split() for line in (text or "").splitlines())
    return next((int(row[1]) for row in rows if row[:1] == ["oom_kill"] and len(row) > 1), None)


def _difference(now: int | None, before: int | None) -> int | None:
    return None if now is None or before is None else now - before


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
