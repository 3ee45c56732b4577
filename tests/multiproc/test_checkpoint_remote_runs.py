"""Whole runs whose checkpoints lie in an object store: resumed, kept to the newest few, and complete when a process ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from distrib import Accelerator, CheckpointError
from distrib.checkpoint import latest, verify
from distrib.checkpoint.location import locate
from distrib.checkpoint.store import Store
from distrib.testing import run_ranks
from tests.multiproc.test_checkpoint_remote import place, s3  # noqa: F401 (fixtures)


def train(url, variables, steps):
    """Train, saving after each step, half of them in the background; return where it began and the last weights."""
    os.environ.update(variables)
    accelerator = Accelerator(cpu=True, project_dir=url, seed=0)
    model = nn.Linear(4, 3)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    begun = accelerator.load_state()
    for step in range(steps):
        accelerator.backward(model(torch.ones(2, 4)).sum())
        optimizer.step()
        optimizer.zero_grad()
        accelerator.save_state(blocking=bool(step % 2))
    accelerator.end_training()
    return begun and str(begun), accelerator.unwrap_model(model).weight.tolist()


def test_a_run_goes_on_from_its_newest_checkpoint_and_keeps_three(place):  # noqa: F811
    url, variables = place
    first = run_ranks(train, 2, url, variables, 3)
    second = run_ranks(train, 2, url, variables, 2)
    unbroken = run_ranks(train, 2, f"{url}/unbroken", variables, 5)
    assert [begun for begun, _ in [*first, *second]] == [
        None,
        None,
        *[f"{url}/checkpoints/step-00000003"] * 2,
    ]
    assert second[0][1] == unbroken[0][1]
    names = [f"step-{step:08d}" for step in (3, 4, 5)]
    assert Store(locate(f"{url}/checkpoints")).names() == names


SCRIPT = """
import sys, threading
import torch
from torch import nn
from distrib import Accelerator, CheckpointError
from distrib.checkpoint import writer

accelerator = Accelerator(cpu=True, project_dir=sys.argv[1])
model = nn.Linear(4, 3)
model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
main, write = threading.main_thread(), writer.Saving._write

def late(self):
    main.join(2)  # as long as the interpreter takes to begin ending, if it does not wait
    if sys.argv[1].startswith("s3"):
        import s3fs
        s3fs.S3FileSystem.clear_instance_cache()  # so that names are looked up anew
    return write(self)

writer.Saving._write = late
accelerator.save_state(blocking=False)
"""


def test_a_background_save_is_complete_although_the_script_ends_without_waiting(place):  # noqa: F811
    url, variables = place
    endpoint = variables.get("AWS_ENDPOINT_URL", "").replace("127.0.0.1", "localhost")
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT, url],
        env={**os.environ, **variables, "AWS_ENDPOINT_URL": endpoint or "http://localhost"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert found.returncode == 0, found.stderr
    assert "not saved" not in found.stderr
    newest = latest(f"{url}/checkpoints")
    assert newest is not None, found.stderr
    verify(newest)


def test_a_bucket_that_is_not_there_is_an_error_of_every_rank(s3):  # noqa: F811
    with pytest.raises(AssertionError, match=r"D0743.*bucket"):
        run_ranks(train, 2, "s3://no-such-bucket/run", s3, 1)


def test_trackers_need_a_directory(tmp_path):
    accelerator = Accelerator(cpu=True, project_dir=f"local://{tmp_path}", log_with="jsonl")
    with pytest.raises(CheckpointError, match=r"D0741.*trackers"):
        accelerator.init_trackers("run")
