"""The same script under what other launchers set: two real processes, no launcher of ours."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

SCRIPT = """
    import torch
    from distrib import Accelerator

    accelerator = Accelerator(cpu=True)
    ranks = accelerator.gather(torch.tensor([accelerator.process_index]))
    print(accelerator.topology.source, ranks.tolist())
    accelerator.end_training()
"""


def mpirun_like(rank: int, port: int) -> dict[str, str]:
    variables = {"RANK": rank, "SIZE": 2, "LOCAL_RANK": rank, "LOCAL_SIZE": 2}
    job = {"PMIX_NAMESPACE": f"prterun-{port}@1", "OMPI_COMM_WORLD_NODE_RANK": str(rank)}
    return {**{f"OMPI_COMM_WORLD_{name}": str(value) for name, value in variables.items()}, **job}


def mpiexec_like(rank: int, port: int) -> dict[str, str]:
    mine = {"PMI_RANK": str(rank), "PMI_SIZE": "2", "MPI_LOCALRANKID": str(rank), "MPI_LOCALNRANKS": "2"}
    return {**mine, "MASTER_PORT": str(port)}


def slurm_like(rank: int, port: int) -> dict[str, str]:
    return {
        "SLURM_JOB_ID": str(port),
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_NODEID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_STEP_NODELIST": "localhost",
    }


@pytest.mark.timeout(90)
@pytest.mark.parametrize(
    ("variables", "source"), [(mpirun_like, "MPI"), (mpiexec_like, "MPI"), (slurm_like, "Slurm")]
)
def test_two_processes_meet(tmp_path: Path, variables, source: str) -> None:
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(SCRIPT))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script)],
            env={
                "PYTHONPATH": os.pathsep.join(sys.path),
                "PATH": os.environ["PATH"],
                **variables(rank, port),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        told = [rank.communicate(timeout=60) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()

    assert [rank.returncode for rank in ranks] == [0, 0], told
    assert [out for out, _ in told] == [f"{source} [0, 1]\n"] * 2
