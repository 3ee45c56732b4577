"""A run that was killed goes on as if nothing had happened, at any world size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distrib.testing import RanksFailed, run_ranks
from tests.multiproc.resuming import run


def killed(world_size: int, folder: Path, **options) -> None:
    with pytest.raises(RanksFailed, match="killed by SIGKILL"):
        run_ranks(run, world_size, folder, 30, save_at=(4, 9), kill_at=11, **options)


def assert_continues(resumed, whole, *, bitwise: bool):
    first, history, parameters, seen = resumed
    _, expected, true_parameters, true_seen = whole
    assert first == 9
    assert [entry[:2] for entry in history] == [
        tuple(entry[:2]) for entry in expected[9:]
    ]  # step and sample ids
    assert [entry[3] for entry in history] == [entry[3] for entry in expected[9:]]  # learning rate
    assert seen == true_seen
    rtol = 0 if bitwise else 1e-9
    losses = torch.tensor(
        [[entry[2] for entry in history], [entry[2] for entry in expected[9:]]], dtype=torch.float64
    )
    torch.testing.assert_close(losses[0], losses[1], rtol=rtol, atol=0)
    for name, value in true_parameters.items():
        torch.testing.assert_close(parameters[name], value, rtol=rtol, atol=0 if bitwise else 1e-12)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_goes_on_bitwise_at_the_same_world_size(tmp_path, world_size, workers):
    options = {"dropout": 0.2, "accumulation": 2, "workers": workers}
    whole = run_ranks(run, world_size, tmp_path / "whole", 29, **options)
    (tmp_path / "cut").mkdir()
    killed(world_size, tmp_path / "cut", **options)
    resumed = run_ranks(run, world_size, tmp_path / "cut", 29, **options)
    assert_continues(resumed[0], whole[0], bitwise=True)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3), (3, 2)])
def test_a_killed_run_goes_on_at_another_world_size(tmp_path, before, after):
    whole = run_ranks(run, before, tmp_path / "whole", 29, global_batch=12)
    (tmp_path / "cut").mkdir()
    killed(before, tmp_path / "cut", global_batch=12)
    resumed = run_ranks(run, after, tmp_path / "cut", 29, global_batch=12)
    assert_continues(resumed[0], whole[0], bitwise=False)


def test_a_resume_keeps_the_global_batch_of_the_first_start(tmp_path):
    killed(1, tmp_path, accumulation=6)  # 2 x 1 x 6 = 12 samples per step
    _, history, *_ = run_ranks(run, 3, tmp_path, 12, accumulation=1)[0]
    assert [len(ids) for _, ids, *_ in history] == [5, 12, 12]  # the epoch's tail, then whole global batches


def test_float32_stays_within_rounding_at_another_world_size(tmp_path):
    whole = run_ranks(run, 1, tmp_path / "whole", 29, global_batch=12, dtype=torch.float32)
    (tmp_path / "cut").mkdir()
    killed(1, tmp_path / "cut", global_batch=12, dtype=torch.float32)
    _, history, parameters, _ = run_ranks(run, 2, tmp_path / "cut", 29, global_batch=12, dtype=torch.float32)[
        0
    ]
    assert len(history) == 20
    for name, value in whole[0][2].items():
        torch.testing.assert_close(parameters[name], value, rtol=0, atol=2e-5)
