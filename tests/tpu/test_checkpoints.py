"""Checkpoints of XLA go on elsewhere and others go on under XLA, with optimizer, schedule and data; also under another torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.arch.sources import ROOT
from tests.tpu.crossing import parts
from tests.tpu.running import LAYOUTS, ONE, on_xla

BEFORE, AFTER = 7, 6  # steps; the checkpoint lies in the second epoch
_VENV = ROOT / ".venv/bin/python"  # with the torch of `make test`
OTHER = os.environ.get("DISTRIB_OTHER_PYTHON") or (str(_VENV) if _VENV.exists() else sys.executable)
ON_CPU = {"ddp": {"strategy": "ddp", "device": "cpu"}, "fsdp": {"strategy": "fsdp", "device": "cpu"}}
PAIRS = [
    ("ddp", "one device"),
    ("fsdp", "4 shards"),
    ("fsdp", "2 replicas"),
    ("one device", "fsdp"),
    ("4 shards", "fsdp"),
    ("2 replicas", "ddp"),
    ("2 x 2", "4 shards"),
]


def started(layout):
    """Return which processes run a layout: those of one kind run all its parts one after the other."""
    if layout in ON_CPU:
        return "the other environment"
    return layout if layout in ("one device", "2 replicas") else "4 devices"


def job(layout, load, steps, save):
    if layout in ON_CPU:
        return [ON_CPU[layout], 4, load, steps, save]
    return [LAYOUTS.get(layout, (ONE,))[0], 4 if layout == "2 replicas" else 8, load, steps, save]


def run(where, jobs, folder):
    """Return what rank 0 of these processes has after each of the jobs."""
    if where == "the other environment":
        path, out = os.pathsep.join([str(ROOT), str(ROOT / "launcher")]), folder / "out.pt"
        env = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
        command = [OTHER, "-m", "tests.tpu.crossing", json.dumps(jobs), str(out)]
        subprocess.run(command, check=True, cwd=ROOT, env=env, timeout=110)
        return torch.load(out)
    ranks, devices = (2, 1) if where == "2 replicas" else (1, 4 if where == "4 devices" else 1)
    return on_xla(parts, jobs, ranks=ranks, devices=devices)[0]


class Runs:
    """Runs that are interrupted: first all the beginnings, then all that go on elsewhere."""

    def __init__(self, folder):
        self.folder, self._ends = folder, {}
        writers = dict.fromkeys(writer for writer, _ in PAIRS)
        self.written = {writer: str(folder / writer.replace(" ", "-")) for writer in writers}
        begin = [(writer, job(writer, None, BEFORE, place)) for writer, place in self.written.items()]
        begin.append(("ddp", job("ddp", None, BEFORE + AFTER, None)))
        self.uninterrupted = self._run(begin)[-1]

    def end(self, writer, reader):
        if not self._ends:
            jobs = [(to, job(to, self.written[origin], AFTER, None)) for origin, to in PAIRS]
            self._ends = dict(zip(PAIRS, self._run(jobs), strict=True))
        return self._ends[writer, reader]

    def _run(self, jobs):
        found = {}
        for where in dict.fromkeys(started(layout) for layout, _ in jobs):
            here = [index for index, (layout, _) in enumerate(jobs) if started(layout) == where]
            found.update(zip(here, run(where, [jobs[index][1] for index in here], self.folder), strict=True))
        return [found[index] for index in range(len(jobs))]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize(("writer", "reader"), PAIRS, ids=lambda x: x.replace(" ", "-"))
def test_a_run_goes_on_in_another_layout(writer, reader, runs):
    found, steps = runs.end(writer, reader)
    expected, all_steps = runs.uninterrupted
    assert steps == all_steps == BEFORE + AFTER
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=2e-5, msg=name)


def test_a_checkpoint_stores_no_option_that_only_xla_has(runs):
    objects = json.loads((Path(runs.written["one device"]) / "objects.json").read_text())
    (group,) = objects["optimizer"]["param_groups"]
    assert not group["capturable"]
    assert isinstance(group["lr"], float)


def test_the_other_environment_has_another_torch_where_it_is_there():
    said = subprocess.run(
        [OTHER, "-c", "import torch; print(torch.__version__)"], check=True, capture_output=True, text=True
    )
    assert (said.stdout.strip() != torch.__version__) == (sys.executable != OTHER)
