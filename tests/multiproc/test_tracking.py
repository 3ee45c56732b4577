"""Values logged by every rank: reduced as declared, in one operation, and written once."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import math

import numpy as np
import pytest
import torch

from distrib import Accelerator, RunConfig
from distrib.errors import CollectiveError, DataError, StrategyError
from distrib.testing import ranks
from distrib.tracking import Max, Mean, Min, Sum, Tracker
from tests.multiproc.counting import operations


class Recorder(Tracker):
    name = "recorder"

    def __init__(self):
        self.calls: list = []

    def start(self, project, folder, config, options):
        self.calls.append(("start", project, folder, config, options))

    def log(self, values, step=None):
        self.calls.append(("log", values, step))

    def finish(self):
        self.calls.append(("finish",))


class Failing(Recorder):
    name = "failing"

    def log(self, values, step=None):
        raise OSError("the server is away")


def started(*trackers, folder=".", **tracking) -> Accelerator:
    accelerator = Accelerator(
        RunConfig(device="cpu", project_dir=str(folder), **({"tracking": tracking} if tracking else {})),
        log_with=list(trackers) or None,
    )
    accelerator.init_trackers("digits", {"lr": 0.1})
    return accelerator


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@ranks(1, 2, 3)
def test_each_value_is_reduced_as_declared_and_equal_on_every_rank():
    accelerator = started(Recorder())
    rank, world_size = accelerator.process_index, accelerator.num_processes
    found = accelerator.log(
        {
            "bare": rank,
            "tensor": torch.tensor([float(rank)]),
            "numpy": np.float32(rank),
            "weighted": Mean(10.0 * rank, weight=rank),
            "left out": Mean(float("nan") if rank else 4.0, weight=0 if rank else 1),
            "sum": Sum(rank + 1),
            "max": Max(rank),
            "min": Min(-rank),
            "part": {"inner": {"loss": 2.0}},
            "bad": Max(float("nan") if rank == 0 else 1.0),
        },
        step=3,
    )
    many = range(world_size)
    mean = sum(many) / world_size
    weighted = sum(10.0 * r * r for r in many) / sum(many) if world_size > 1 else math.nan
    assert list(found)[:3] == ["bare", "tensor", "numpy"]
    assert found["bare"] == found["tensor"] == found["numpy"] == pytest.approx(mean, rel=1e-15)
    assert found["weighted"] == pytest.approx(weighted, rel=1e-15, nan_ok=True)
    assert found["left out"] == 4.0
    assert (found["sum"], found["max"], found["min"]) == (
        sum(r + 1 for r in many),
        world_size - 1,
        1 - world_size,
    )
    assert found["part/inner/loss"] == 2.0
    assert math.isnan(found["bad"])
    everyone = accelerator.gather_object(repr(found))
    assert everyone == [everyone[0]] * world_size


@ranks(2)
def test_a_call_of_log_is_one_operation_however_many_values():
    accelerator = started(Recorder())
    values = {f"value {i}": Sum(i) for i in range(20)}
    assert operations(lambda: accelerator.log(values)) == 1


@ranks(2)
def test_ranks_that_log_other_names_or_reductions_are_an_error_on_all():
    accelerator = started(Recorder())
    last = accelerator.is_last_process
    with pytest.raises(CollectiveError, match="D0401"):
        accelerator.log({"loss" if last else "los": 1.0})
    with pytest.raises(CollectiveError, match="D0401"):
        accelerator.log({"loss": Sum(1.0) if last else 1.0})
    with pytest.raises(CollectiveError, match="D0401"):
        accelerator.log({"loss": 1.0} if last else {})


@ranks(1, 2)
def test_all_ranks_may_log_nothing():
    assert started(Recorder()).log({}) == {}


@pytest.mark.parametrize("value", ["high", None, [1.0, 2.0], torch.ones(2), np.ones(3), torch.tensor(1j)])
@ranks(1, 2)
def test_a_value_that_is_no_number_is_refused_by_name(value):
    with pytest.raises(DataError, match=r"D0511.*as eval/loss"):
        started(Recorder()).log({"eval": {"loss": value}})


@ranks(2)
def test_only_the_main_ranks_tracker_is_called(tmp_path):
    mine = Recorder()
    accelerator = started(mine, folder=tmp_path)
    accelerator.log({"loss": float(accelerator.process_index)}, step=7)
    tracker = accelerator.get_tracker("recorder")
    tracker.log({"by hand": 1.0}, step=8)
    assert len(accelerator.trackers) == 1
    accelerator.end_training()
    accelerator.end_training()
    expected = [
        ("start", "digits", tmp_path, {"lr": 0.1}, {}),
        ("log", {"loss": 0.5}, 7),
        ("log", {"by hand": 1.0}, 8),
        ("finish",),
    ]
    assert mine.calls == (expected if accelerator.is_main_process else [])
    assert (tracker is mine) == accelerator.is_main_process


@ranks(2)
def test_the_file_goes_on_after_a_restart_and_loses_a_torn_line(tmp_path):
    path = tmp_path / "digits.jsonl"
    for value in (0.25, float("inf")):
        accelerator = started("jsonl", folder=tmp_path)
        accelerator.log({"loss": value, "eval": {"loss": 1.0}}, step=1)
        accelerator._tracking.finish()
        if accelerator.is_main_process and value == 0.25:
            with path.open("a") as file:
                file.write('{"time": 1, "st')
        accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        first, logged, second, last = lines(path)
        assert (
            (first["project"], first["config"])
            == (second["project"], second["config"])
            == ("digits", {"lr": 0.1})
        )
        assert (logged["step"], logged["values"]) == (1, {"loss": 0.25, "eval/loss": 1.0})
        assert float(last["values"]["loss"]) == math.inf


@ranks(2)
def test_a_tracker_that_fails_is_told_once_and_does_not_end_the_training():
    other = Recorder()
    accelerator = started(Failing(), other)
    told = io.StringIO()
    with contextlib.redirect_stderr(told):
        for step in range(3):
            assert accelerator.log({"loss": 1.0}, step=step) == {"loss": 1.0}
    if accelerator.is_main_process:
        assert told.getvalue().count("the tracker failing failed") == 1
        assert "OSError: the server is away" in told.getvalue()
        assert len([call for call in other.calls if call[0] == "log"]) == 3


@ranks(2)
def test_what_no_tracker_has_is_refused_on_every_rank(tmp_path):
    accelerator = started("jsonl", folder=tmp_path)
    with pytest.raises(StrategyError, match=r"D0818.*no tracker 'jsonll'.*did you mean 'jsonl'"):
        accelerator.get_tracker("jsonll")
    with pytest.raises(StrategyError, match=r"D0820.*'jsonll'"):
        accelerator.init_trackers("digits", init_kwargs={"jsonll": {}})
    with pytest.raises(StrategyError, match=r"D0820.*'flush'"):
        accelerator.init_trackers("digits", init_kwargs={"jsonl": {"flush": 1}})
    with pytest.raises(StrategyError, match="D0820"):
        Accelerator(cpu=True, log_with=[3])


@ranks(1)
def test_values_that_go_nowhere_are_told_once():
    accelerator = Accelerator(cpu=True)
    told = io.StringIO()
    with contextlib.redirect_stderr(told):
        accelerator.log({"loss": 1.0})
        accelerator.log({"loss": 1.0})
    assert told.getvalue().count("init_trackers has not been called") == 1


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is not None, reason="tensorboard is installed")
@ranks(2)
def test_a_tracker_whose_package_is_missing_names_the_extra_on_every_rank(tmp_path):
    with pytest.raises(StrategyError, match=r"(?s)D0817.*pip install 'distrib\[tensorboard\]'"):
        started("tensorboard", folder=tmp_path)
