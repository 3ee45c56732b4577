"""Universal checkpoints, as DeepSpeed's own tool makes them, are imported like its plain ones."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from distrib.checkpoint.convert import convert
from distrib.errors import CheckpointError
from distrib.testing import run_ranks
from tests.multiproc.test_checkpoint_convert import Frozen, adamw_of_trained, deepspeed_rank, resume

if find_spec("deepspeed") is None:
    pytest.skip("pip install deepspeed==0.19.8", allow_module_level=True)


def made_universal(folder: Path, stage: int) -> tuple[dict, dict]:
    """Train with DeepSpeed and convert with its tool; return the weights and the state of one process beside it."""
    expected = run_ranks(deepspeed_rank, 2, str(folder / "own"), stage, {}, timeout_s=110)[0]
    tool = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state",
            "--num_extract_workers", "1", "--num_merge_workers", "1",
            "--input_folder", str(folder / "own" / "global_step3"), "--output_folder", str(folder / "universal")]  # fmt: skip
    done = subprocess.run(tool, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    return expected


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 2, 3])
def test_a_universal_checkpoint_equals_one_process_and_loads(tmp_path, stage):
    weights, state = made_universal(tmp_path, stage)

    made = convert(tmp_path / "universal", tmp_path / "out")
    model = Frozen()
    optimizer = adamw_of_trained(model)
    resume(tmp_path / "out", model, optimizer)

    assert (made.kind, made.step) == ("deepspeed universal", 3)
    for name, value in weights.items():  # sums of two ranks' gradients round otherwise than one process's
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=1e-6)
    for name, parameter in model.named_parameters():
        for key, value in state.get(name, {}).items():
            torch.testing.assert_close(optimizer.state[parameter][key], value, rtol=0, atol=1e-6)

    (tmp_path / "universal" / "zero" / "b.weight" / "fp32.pt").unlink()
    with pytest.raises(CheckpointError, match=r"D0723.*b\.weight"):
        convert(tmp_path / "universal", tmp_path / "again")
