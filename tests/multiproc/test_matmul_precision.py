"""The setting `matmul_precision`: how torch multiplies float32 matrices."""

from __future__ import annotations

import contextlib
import io

import torch

from distrib import Accelerator, RunConfig
from distrib.testing import run_ranks


def started(precisions: list[str | None]) -> list[tuple[str, str]]:
    found = []
    for precision in precisions:
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            Accelerator(RunConfig(device="cpu", matmul_precision=precision))
        found.append((torch.get_float32_matmul_precision(), said.getvalue()))
    return found


def test_it_is_applied_on_every_rank_and_in_the_line_that_tells_of_the_start():
    precisions = ["high", "medium", "highest"]
    main, other = run_ranks(started, 2, precisions)
    for precision, (found, said), (also, _) in zip(precisions, main, other, strict=True):
        assert found == also == precision
        assert f", precision no, matmul precision {precision}, " in said


def test_without_it_torch_stays_as_it_is():
    before = torch.get_float32_matmul_precision()
    (((found, said),),) = run_ranks(started, 1, [None])
    assert found == before
    assert "matmul" not in said
