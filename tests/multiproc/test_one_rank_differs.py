"""What goes wrong on one rank only is an error of all of them at once, also where the script catches it and goes on.

Rank 0 or 1 does something else than the other; both stay, so that a rank that waited for its peer would wait until the
test's time is up.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distrib import Accelerator, CheckpointError, RunConfig
from distrib.testing import ranks, run_ranks


class Kept:
    """An object with a state that cannot be loaded where `refuses` is set."""

    def __init__(self, *, refuses=False):
        self.value, self.refuses = 0, refuses

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        if self.refuses and state["value"]:
            raise ValueError("this one is not for me")
        self.value = state["value"]


def prepared(project_dir, checkpoint=None, **config):
    config = RunConfig(project_dir=str(project_dir), device="cpu", checkpoint=checkpoint or {}, **config)
    accelerator = Accelerator(config)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3))
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    return accelerator, model, optimizer


def error_of(accelerator, function, *args, **kwargs):
    """Return the error's text; that of rank 0 is the other's too, apart from the place."""
    with pytest.raises(CheckpointError) as caught:
        function(*args, **kwargs)
    accelerator.wait_for_everyone()
    return str(caught.value)


@ranks(2)
def test_metrics_of_rank_0_are_enough_and_without_them_all_are_told(tmp_path):
    accelerator, *_ = prepared(tmp_path, {"keep_best": 1, "best_metric": "loss"})
    main = accelerator.is_main_process
    accelerator.save_state(metrics={"loss": 0.5} if main else None)
    assert "D0751" in error_of(accelerator, accelerator.save_state, metrics=None if main else {"loss": 0.5})
    assert "abc" in error_of(accelerator, accelerator.save_state, metrics={"loss": "abc" if main else 1})


@ranks(1)
def test_a_directory_of_ones_own_needs_no_metrics(tmp_path):
    accelerator, *_ = prepared(tmp_path, {"keep_best": 1, "best_metric": "loss"})
    accelerator.save_state(tmp_path / "final")
    assert accelerator.load_state(tmp_path / "final") == tmp_path / "final"


@ranks(2)
def test_a_folder_that_cannot_be_listed_is_told_on_all_ranks(tmp_path):
    (tmp_path / "checkpoints").touch()
    accelerator, *_ = prepared(tmp_path)
    assert "checkpoints" in error_of(accelerator, accelerator.load_state)


@ranks(2)
def test_an_object_registered_on_one_rank_is_refused_when_it_is_saved(tmp_path):
    accelerator, *_ = prepared(tmp_path)
    if accelerator.is_main_process:
        accelerator.register_for_checkpointing(Kept())
    text = error_of(accelerator, accelerator.save_state, tmp_path / "c")
    assert "D0792" in text
    assert "rank 0 has registered 1 objects, rank 1 has 0" in text
    assert not (tmp_path / "c").exists()


@ranks(2)
def test_a_state_that_one_rank_cannot_load_leaves_all_ranks_as_they_were(tmp_path):
    accelerator, model, _ = prepared(tmp_path)
    kept = Kept(refuses=accelerator.process_index == 1)
    accelerator.register_for_checkpointing(kept)
    kept.value = 7
    accelerator.save_state(tmp_path / "c")

    kept.value = 0
    nn.init.zeros_(accelerator.unwrap_model(model)[0].weight)
    text = error_of(accelerator, accelerator.load_state, tmp_path / "c")
    assert "rank 1" in text
    assert "this one is not for me" in text
    assert kept.value == 0
    assert not accelerator.unwrap_model(model)[0].weight.any()


def pipelined(project_dir, pattern):
    accelerator, *_ = prepared(project_dir, strategy="fsdp", mesh={"pipeline": 2})
    accelerator.save_state(project_dir / "c")
    try:
        accelerator.load_state(project_dir / "c", ignore=[pattern])
    except CheckpointError as error:
        return error.code
    return "loaded"


@pytest.mark.parametrize(("pattern", "expected"), [("model/1.*", "loaded"), ("model/2.*", "D0740")])
def test_a_pattern_may_fit_what_another_rank_holds(tmp_path, pattern, expected):
    assert run_ranks(pipelined, 2, tmp_path, pattern) == [expected] * 2
