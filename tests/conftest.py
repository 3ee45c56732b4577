"""What every test may rely on: no process that it started outlives it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from importlib.util import find_spec

import psutil
import pytest

_OURS = (
    "forkserver",
    "resource_tracker",
)  # helpers of multiprocessing, which live as long as the test session

# They run in a virtual environment of their own, which has an older torch: `make test-tpu`.
collect_ignore = [] if find_spec("torch_xla") else ["tpu"]

# A shell has what it starts in the background ignore these, and so would every process that a test starts.
for _number, _default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGQUIT, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _default)


def _children() -> set[psutil.Process]:
    found = psutil.Process().children(recursive=True)
    return {child for child in found if child.is_running() and not _is_helper(child)}


def _is_helper(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE or any(
            name in " ".join(process.cmdline()) for name in _OURS
        )
    except psutil.NoSuchProcess:
        return True


@pytest.fixture(autouse=True)
def no_process_outlives_its_test() -> Iterator[None]:
    before = _children()
    yield
    left = _children() - before
    if left:
        _, left_now = psutil.wait_procs(list(left), timeout=2)
        names = [" ".join(process.cmdline())[:100] for process in left_now if process.is_running()]
        for process in left_now:
            process.kill()
        assert not left_now, f"processes left behind: {names}"


@pytest.fixture
def plain_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launch around us, and no rank that another test left."""
    from distrib import seeding  # most tests of the launcher need no torch

    for name in [*os.environ]:
        if name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") or name.startswith(("DISTRIB_", "SLURM_")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(seeding, "_noise_rank", 0)
