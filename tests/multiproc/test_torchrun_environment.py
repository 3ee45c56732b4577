"""Our detection and rendezvous under the real torchrun, with two gloo processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

TORCHRUN = Path(sys.executable).with_name("torchrun")
SCRIPT = Path(__file__).with_name("scripts") / "meet_under_torchrun.py"

pytestmark = [
    pytest.mark.timeout(150),
    pytest.mark.skipif(not TORCHRUN.exists(), reason=f"needs torch's own launcher at {TORCHRUN}"),
]


def torchrun(
    results: Path, *flags: str, failing_attempt: int = -1, variables: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """Run the script on two ranks and return what each of them found, in rank order."""
    command = [str(TORCHRUN), "--nproc-per-node=2", *flags, str(SCRIPT), str(results), str(failing_attempt)]
    env = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", **(variables or {})}
    with subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            output, _ = process.communicate(timeout=90)
        except subprocess.TimeoutExpired:
            process.terminate()  # on SIGTERM torchrun ends its workers
            output, _ = process.communicate(timeout=40)
        finally:
            process.kill()
    assert process.returncode == 0, output
    return [json.loads((results / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]


def test_two_ranks_meet_in_the_agents_store(tmp_path: Path) -> None:
    expected = {"source": "torchrun", "hosted_by_agent": True, "met": [0, 1]}
    assert torchrun(tmp_path, "--standalone") == [expected, expected]


def test_ranks_that_torchrun_restarts_meet_again(tmp_path: Path) -> None:
    found = torchrun(tmp_path, "--standalone", "--max-restarts=1", failing_attempt=0)
    assert [rank["met"] for rank in found] == [[0, 1], [0, 1]]


def test_rank_0_serves_the_store_when_the_agent_does_not(tmp_path: Path) -> None:
    found = torchrun(tmp_path, "--standalone", variables={"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})
    expected = {"source": "torchrun", "hosted_by_agent": False, "met": [0, 1]}
    assert found == [expected, expected]
