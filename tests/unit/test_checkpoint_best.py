"""The best checkpoints by a metric stay, and so do those of every so many steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from distrib import Accelerator, CheckpointError, ConfigError, RunConfig
from distrib.checkpoint import open_checkpoint
from distrib.collectives.single import SingleCollectives


def kept(folder: Path, losses: list[float], **checkpoint: object) -> list[int]:
    config = RunConfig(project_dir=folder, device="cpu", checkpoint={"keep_last": 1, **checkpoint})
    accelerator = Accelerator(config)
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    for loss in losses:
        model(torch.ones(1, 1)).sum().backward()
        optimizer.step()
        accelerator.save_state(metrics={"loss": loss, "other": 1})
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").iterdir())


LOSSES = [3.0, 1.0, 2.0, float("nan"), 1.0, 4.0, 5.0]


@pytest.mark.parametrize(
    ("checkpoint", "steps"),
    [
        ({}, [7]),
        ({"keep_every": 3}, [3, 6, 7]),
        ({"keep_best": 1, "best_metric": "loss"}, [5, 7]),  # of equal ones the newest
        ({"keep_best": 3, "best_metric": "loss"}, [2, 3, 5, 7]),
        ({"keep_best": 2, "best_metric": "loss", "best_mode": "max"}, [6, 7]),
        ({"keep_last": 2, "keep_best": 1, "keep_every": 4, "best_metric": "loss"}, [4, 5, 6, 7]),
        ({"keep_last": None, "keep_best": 1, "best_metric": "loss"}, [1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_what_stays(tmp_path: Path, checkpoint: dict[str, object], steps: list[int]) -> None:
    assert kept(tmp_path, LOSSES, **checkpoint) == steps


def test_the_metrics_are_in_the_manifest(tmp_path: Path) -> None:
    kept(tmp_path, [0.5])
    with open_checkpoint(tmp_path / "checkpoints/step-00000001", SingleCollectives()) as reader:
        assert reader.counters["metrics"] == {"loss": 0.5, "other": 1.0}


def test_a_save_without_the_metric_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"D0751.*'accuracy'.*loss"):
        kept(tmp_path, [1.0], keep_best=1, best_metric="accuracy")
    assert not (tmp_path / "checkpoints").exists()


def test_the_best_by_nothing_is_a_wrong_configuration() -> None:
    with pytest.raises(ConfigError, match=r"D0107.*best_metric"):
        RunConfig(checkpoint={"keep_best": 2})
