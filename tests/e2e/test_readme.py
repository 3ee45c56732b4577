"""The README's example on two ranks, and under `distrib launch` as the README says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file

from distrib.testing import run_ranks
from tests.arch.readme import MyModel, accuracy, example, run_example

ROOT = Path(__file__).parents[2]
STEPS = 10  # of an epoch: 600 samples in global batches of 2 x 32
SCRIPT = """
from tests.arch.readme import MyModel, dataset as make_dataset
dataset = make_dataset()
"""


def run_on_a_rank(folder: Path) -> tuple[int, int, bool]:
    (folder / "cpu.yaml").write_text("device: cpu\n")
    os.environ["DISTRIB_CONFIG_FILE"] = str(folder / "cpu.yaml")
    os.chdir(folder)
    left = run_example()
    return left["loader"].epoch, left["optimizer"].num_steps, "loss" in left


def accuracy_of_the_export(folder: Path) -> float:
    model = MyModel()
    model.load_state_dict(load_file(folder / "final" / "model.safetensors"))
    return accuracy(model)


def test_the_example_trains_on_two_ranks(tmp_path: Path):
    assert run_ranks(run_on_a_rank, 2, tmp_path) == [(3, 3 * STEPS, True)] * 2
    assert accuracy_of_the_export(tmp_path) > 0.9


def test_one_process_resumes_what_two_ranks_trained(tmp_path: Path):
    run_ranks(run_on_a_rank, 2, tmp_path)
    assert run_ranks(run_on_a_rank, 1, tmp_path) == [(3, 3 * STEPS, False)]


def test_the_example_trains_under_the_readmes_launch_command(tmp_path: Path):
    (tmp_path / "train.py").write_text(SCRIPT + example())
    env = {name: value for name, value in os.environ.items() if not name.startswith("DISTRIB_")}
    env["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'launcher'}"
    words = ["launch", "--nproc-per-node", "2", "--device", "cpu", "train.py"]
    done = subprocess.run(
        [sys.executable, "-m", "distrib", *words],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stderr
    assert accuracy_of_the_export(tmp_path) > 0.9
