"""`distrib launch`, a notebook's launcher and the health check with torch-xla itself, on its CPU client."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.faults.launching import script
from tests.tpu.test_examples import run

NOTEBOOK = """
import json
import sys

def train(path):
    import torch_xla.runtime as xr
    from distrib import Accelerator
    accelerator = Accelerator()
    seen = [accelerator.process_index, accelerator.device.type, xr.global_runtime_device_count()]
    with open(f"{path}-{accelerator.process_index}", "w") as file:
        json.dump(seen, file)

if __name__ == "__main__":
    from distrib import notebook_launcher
    notebook_launcher(train, (sys.argv[1],), num_processes=int(sys.argv[2]) or None)
    assert "torch_xla" not in sys.modules, "the notebook itself must not hold a TPU"
"""


@pytest.mark.parametrize(
    ("processes", "env", "expected"),
    [
        (0, {"CPU_NUM_DEVICES": "4", "DISTRIB_XLA__SPMD": "true"}, [[0, "xla", 4]]),
        (2, {}, [[0, "xla", 1], [1, "xla", 1]]),
    ],
    ids=["spmd", "replicas"],
)
def test_a_notebook_starts_a_process_for_each_device_or_one_for_all(
    tmp_path: Path, processes: int, env: dict[str, str], expected: list[list[object]]
):
    program = script(tmp_path, NOTEBOOK)

    run([sys.executable, str(program), str(tmp_path / "seen"), str(processes)], tmp_path, **env)

    assert [json.loads(file.read_text()) for file in sorted(tmp_path.glob("seen-*"))] == expected


def test_the_health_check_finds_this_installation_well(tmp_path: Path):
    code = "import os; from distrib.strategies import xla_health; raise SystemExit(xla_health.main([], os.environ))"

    out, _ = run([sys.executable, "-c", code], tmp_path)

    lines = out.splitlines()
    assert lines[0].startswith("ok    torch_xla      2.9.0, which fits torch 2.9.0")
    assert lines[1] == "ok    PJRT device    CPU, from PJRT_DEVICE"
