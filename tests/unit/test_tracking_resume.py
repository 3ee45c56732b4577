"""Trackers of a resumed run: they go on with the run that the checkpoint names."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from distrib import Accelerator
from distrib.checkpoint import inspect
from distrib.tracking import Earlier, Tracker, tensorboard


class Service(Tracker):
    """A tracker as another package would write it."""

    name = "service"

    def __init__(self, fails: bool = False) -> None:
        self.fails, self.asked = fails, "not started"

    def start(self, project, folder, config, options) -> None:
        self.asked = self.earlier
        if self.fails:
            raise OSError("the server is away")
        self.run_id = self.earlier.run if self.earlier else f"{project}-1"

    def log(self, values, step=None) -> None:
        pass


class Plain(Service):
    """One that cannot go on with a run."""

    name = "plain"

    def start(self, project, folder, config, options) -> None:
        self.asked = self.earlier


class Writer:
    """Stands in for torch's SummaryWriter."""

    def __init__(self, **options) -> None:
        self.options = options

    def add_scalar(self, *args, **kwargs) -> None:
        pass

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def started(folder: Path, *trackers) -> Accelerator:
    accelerator = Accelerator(cpu=True, project_dir=folder, log_with=list(trackers) or None, seed=0)
    model = nn.Linear(2, 2)
    accelerator.prepare(model, torch.optim.SGD(model.parameters()))
    return accelerator


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "digits.jsonl").read_text().splitlines()]


def saved_at(folder: Path, *trackers, steps=(1, 2), after=(3,)) -> Path:
    """A run that has logged some steps, a checkpoint, and some more."""
    accelerator = started(folder, *trackers)
    accelerator.init_trackers("digits")
    for step in steps:
        accelerator.log({"loss": 1.0}, step=step)
    path = accelerator.save_state().path
    for step in after:
        accelerator.log({"loss": 1.0}, step=step)
    accelerator._tracking.finish()
    assert isinstance(path, Path)
    return path


def test_a_tracker_is_given_the_run_and_the_last_step_that_the_checkpoint_has(tmp_path: Path) -> None:
    path = saved_at(tmp_path, Service(), steps=(4, 2), after=(5,))
    assert inspect(path).info["trackers"] == {"service": {"run": "digits-1", "step": 4}}

    resumed = Service()
    accelerator = started(tmp_path, resumed)
    accelerator.load_state()
    accelerator.init_trackers("digits")
    assert resumed.asked == Earlier("digits-1", 4)
    assert resumed.run_id == "digits-1"


def test_a_checkpoint_right_after_a_resume_names_the_same_run_and_step(tmp_path: Path) -> None:
    saved_at(tmp_path, Service())
    accelerator = started(tmp_path, Service())
    accelerator.load_state()
    assert accelerator._tracking.stored() == {"trackers": {"service": {"run": "digits-1", "step": 2}}}
    accelerator.init_trackers("digits")
    assert accelerator._tracking.stored() == {"trackers": {"service": {"run": "digits-1", "step": 2}}}
    accelerator.log({"loss": 1.0}, step=1)
    accelerator.log({"loss": 1.0})
    accelerator.log({"loss": 1.0}, step=3)
    assert accelerator._tracking.stored() == {"trackers": {"service": {"run": "digits-1", "step": 3}}}


def test_the_run_is_given_once_and_a_second_start_begins_a_new_one(tmp_path: Path) -> None:
    saved_at(tmp_path, Service())
    tracker = Service()
    accelerator = started(tmp_path, tracker)
    accelerator.load_state()
    for expected in (Earlier("digits-1", 2), None):
        accelerator.init_trackers("digits")
        assert tracker.asked == expected


def test_without_a_loaded_checkpoint_a_run_is_a_new_one(tmp_path: Path) -> None:
    saved_at(tmp_path, Service())
    tracker = Service()
    started(tmp_path, tracker).init_trackers("digits")
    assert tracker.asked is None


def test_a_tracker_without_run_ids_is_not_in_the_checkpoint(tmp_path: Path) -> None:
    assert "trackers" not in inspect(saved_at(tmp_path, Plain())).info


def test_a_tracker_that_fails_to_go_on_does_not_lose_its_run(tmp_path: Path) -> None:
    saved_at(tmp_path, Service())
    accelerator = started(tmp_path, Service(fails=True))
    accelerator.load_state()
    accelerator.init_trackers("digits")
    assert accelerator._tracking.stored() == {"trackers": {"service": {"run": "digits-1", "step": 2}}}


def test_a_tracker_that_was_started_first_keeps_its_run_and_one_line_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved_at(tmp_path, "jsonl")
    accelerator = started(tmp_path, "jsonl")
    accelerator.init_trackers("digits")
    own = accelerator.get_tracker("jsonl").run_id
    capsys.readouterr()
    accelerator.load_state()
    told = capsys.readouterr().err
    assert f"the tracker jsonl has begun the run {own}" in told
    assert "call load_state before init_trackers" in told
    assert accelerator.get_tracker("jsonl").run_id == own


def test_a_jsonl_file_goes_on_with_a_line_that_says_after_which_step(tmp_path: Path) -> None:
    saved_at(tmp_path, "jsonl")
    accelerator = started(tmp_path, "jsonl")
    accelerator.load_state()
    accelerator.init_trackers("digits")
    accelerator.log({"loss": 2.0}, step=3)

    first, *logged, resumed, last = lines(tmp_path)
    assert "resumed_after" not in first
    assert [x["step"] for x in logged] == [1, 2, 3]
    assert (resumed["run"], resumed["resumed_after"]) == (first["run"], 2)
    assert (last["step"], last["values"]) == (3, {"loss": 2.0})


def test_two_runs_in_one_jsonl_file_have_ids_of_their_own(tmp_path: Path) -> None:
    for _ in range(2):
        started(tmp_path, "jsonl").init_trackers("digits")
    assert len({x["run"] for x in lines(tmp_path)}) == 2


def test_values_without_a_step_leave_none_in_the_checkpoint(tmp_path: Path) -> None:
    path = saved_at(tmp_path, Service(), steps=(None, 1.5))
    assert inspect(path).info["trackers"] == {"service": {"run": "digits-1", "step": None}}


@pytest.mark.parametrize(
    "stored", [None, 3, {"service": 3}, {"service": {"run": 3}}, {"service": {"step": 3}}, [["service", 1]]]
)
def test_words_of_a_checkpoint_that_make_no_sense_are_left_alone(tmp_path: Path, stored) -> None:
    tracker = Service()
    accelerator = started(tmp_path, tracker)
    accelerator._tracking.go_on({"trackers": stored})
    accelerator.init_trackers("digits")
    assert tracker.asked is None


@pytest.fixture
def writers(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setattr(tensorboard, "optional_module", lambda *args, **kwargs: module)


def resumed_tensorboard(folder: Path, project: str = "digits", **options) -> dict:
    accelerator = started(folder, "tensorboard")
    accelerator.load_state()
    accelerator.init_trackers(project, init_kwargs={"tensorboard": options})
    found: dict = accelerator.get_tracker("tensorboard", unwrap=True).options
    return found


@pytest.mark.usefixtures("writers")
def test_tensorboard_goes_on_in_its_folder_and_hides_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    saved_at(tmp_path, "tensorboard")
    assert resumed_tensorboard(tmp_path) == {"log_dir": str(tmp_path / "digits"), "purge_step": 3}
    assert resumed_tensorboard(tmp_path, purge_step=7)["purge_step"] == 7


@pytest.mark.usefixtures("writers")
def test_tensorboard_hides_nothing_in_a_folder_of_another_run_or_without_steps(tmp_path: Path) -> None:
    saved_at(tmp_path / "a", "tensorboard")
    assert "purge_step" not in resumed_tensorboard(tmp_path / "a", "letters")
    assert "purge_step" not in resumed_tensorboard(tmp_path / "a", log_dir=str(tmp_path / "b"))
    saved_at(tmp_path / "c", "tensorboard", steps=())
    assert "purge_step" not in resumed_tensorboard(tmp_path / "c")
