"""The README's code is code, and its example trains."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from distrib import seeding
from tests.arch.readme import MyModel, accuracy, example, python_blocks, run_example

STEPS = 19  # of an epoch: 600 samples in global batches of 32


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory whose runs stay on the CPU, whatever the machine has."""
    (tmp_path / "cpu.yaml").write_text("device: cpu\n")
    monkeypatch.setenv("DISTRIB_CONFIG_FILE", str(tmp_path / "cpu.yaml"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(seeding, "_noise_rank", 0)
    return tmp_path


@pytest.mark.parametrize("block", python_blocks(), ids=lambda block: block.splitlines()[0])
def test_a_python_block_compiles(block: str):
    compile(block, "README.md", "exec")


def test_the_example_has_at_most_25_lines():
    assert len(example().splitlines()) <= 25


def test_the_example_trains_saves_and_exports(folder: Path):
    left = run_example()
    final = MyModel()
    final.load_state_dict(load_file(folder / "final" / "model.safetensors"))

    assert left["loader"].epoch == 3
    assert sorted(x.name for x in (folder / "checkpoints").iterdir()) == [
        f"step-{STEPS * epoch:08d}" for epoch in (1, 2, 3)
    ]
    assert accuracy(MyModel()) < 0.4 < 0.9 < accuracy(final)


def test_the_example_started_again_has_nothing_left_to_do(folder: Path):
    run_example()
    (folder / "final" / "model.safetensors").unlink()
    again = run_example()

    assert again["optimizer"].num_steps == 3 * STEPS
    assert "loss" not in again
    assert (folder / "final" / "model.safetensors").is_file()
