"""Hooks of save_state and load_state, and pickled objects, on several ranks: one outcome for all of them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from distrib import Accelerator, CheckpointError
from distrib.checkpoint import inspect, latest, verify
from distrib.testing import ranks, run_ranks


def started(folder, seed=0):
    """Two prepared models that have stepped once."""
    accelerator = Accelerator(cpu=True, project_dir=folder, seed=0)
    torch.manual_seed(seed)
    one, two = nn.Linear(3, 4), nn.Linear(4, 2)
    optimizer = torch.optim.AdamW([*one.parameters(), *two.parameters()])
    one, two, optimizer = accelerator.prepare(one, two, optimizer)
    accelerator.backward(two(one(torch.ones(1, 3))).sum())
    optimizer.step()
    optimizer.zero_grad()
    return accelerator, one, two


def save_as_diffusers_scripts_do(folder):
    """Only the main rank saves the models and takes the weights out."""
    accelerator, one, two = started(folder)

    def hook(models, weights, output_dir):
        if accelerator.is_main_process:
            for index, model in enumerate(models):
                torch.save(
                    accelerator.unwrap_model(model).state_dict(), Path(output_dir) / f"model_{index}.pt"
                )
                weights.pop()

    accelerator.register_save_state_pre_hook(hook)
    path = accelerator.save_state().path
    accelerator.end_training()
    return str(path), [accelerator.unwrap_model(x).weight.tolist() for x in (one, two)]


def load_as_diffusers_scripts_do(folder):
    accelerator, one, two = started(folder, seed=1)

    def hook(models, input_dir):
        while models:
            model = models.pop()
            file = Path(input_dir) / f"model_{len(models)}.pt"
            state = torch.load(file, weights_only=True)
            accelerator.unwrap_model(model).load_state_dict(state)

    accelerator.register_load_state_pre_hook(hook)
    accelerator.load_state()
    accelerator.end_training()
    return [accelerator.unwrap_model(x).weight.tolist() for x in (one, two)]


@pytest.mark.parametrize(("writers", "readers"), [(2, 1), (1, 2), (2, 3)])
def test_scripts_whose_main_rank_saves_all_models_resume_at_any_world_size(tmp_path, writers, readers):
    saved = run_ranks(save_as_diffusers_scripts_do, writers, tmp_path)
    path, weights = saved[0]
    assert {x.partition("/")[0] for x in inspect(path).tensors} == {"optimizer"}
    assert run_ranks(load_as_diffusers_scripts_do, readers, tmp_path) == [weights] * readers


@ranks(2, 3)
def test_a_hook_that_fails_on_one_rank_fails_the_save_on_all_and_the_next_one_succeeds(tmp_path):
    accelerator, _, _ = started(tmp_path)

    def broken(models, weights, folder):
        Path(folder, "half").write_text("x")
        if accelerator.is_last_process:
            raise ValueError("no adapter")

    handle = accelerator.register_save_state_pre_hook(broken)
    last = accelerator.num_processes - 1
    with pytest.raises(
        CheckpointError, match=rf"D0763.*rank {last}: .*broken failed: ValueError: no adapter"
    ):
        accelerator.save_state()
    accelerator.wait_for_everyone()
    assert not (tmp_path / "checkpoints").exists()
    handle.remove()
    accelerator.save_state()
    assert latest(tmp_path / "checkpoints") is not None


@ranks(2)
def test_a_hook_that_fails_on_one_rank_fails_the_load_on_all_and_nothing_is_loaded(tmp_path):
    saved, _, _ = started(tmp_path)
    saved.save_state()
    accelerator, one, _ = started(tmp_path, seed=1)
    before = accelerator.unwrap_model(one).weight.detach().clone()

    def broken(models, folder):
        if accelerator.is_last_process:
            raise ValueError("no adapter")

    accelerator.register_load_state_pre_hook(broken)
    with pytest.raises(CheckpointError, match=r"D0763.*rank 1: the load_state hook"):
        accelerator.load_state()
    assert torch.equal(accelerator.unwrap_model(one).weight, before)


@ranks(2)
def test_every_rank_adds_its_files_and_of_one_name_the_lowest_ranks_is_taken(tmp_path):
    accelerator, _, _ = started(tmp_path)
    rank = accelerator.process_index

    def hook(models, weights, folder):
        Path(folder, "each").mkdir()
        Path(folder, "each", f"of-{rank}.txt").write_text(str(rank))
        if rank:
            Path(folder, "some.txt").write_text(str(rank))
        Path(folder, "same.txt").write_text(str(rank))

    accelerator.register_save_state_pre_hook(hook)
    path = accelerator.save_state(blocking=False).wait()
    found = {x: (path / x).read_text() for x in ("each/of-0.txt", "each/of-1.txt", "some.txt", "same.txt")}
    assert found == {"each/of-0.txt": "0", "each/of-1.txt": "1", "some.txt": "1", "same.txt": "0"}
    verify(path)


@ranks(2)
def test_ranks_with_other_hooks_are_refused_on_all(tmp_path):
    accelerator, _, _ = started(tmp_path)
    if accelerator.is_main_process:
        accelerator.register_save_state_pre_hook(lambda *_: None)
    with pytest.raises(CheckpointError, match=r"D0764.*rank 0 has registered 1 hooks, rank 1 has 0"):
        accelerator.save_state()


@ranks(2)
def test_a_load_hook_that_takes_a_model_on_one_rank_only_is_refused_on_all(tmp_path):
    accelerator, _, _ = started(tmp_path)
    accelerator.save_state()

    def hook(models, folder):
        if accelerator.is_main_process:
            models.pop()

    accelerator.register_load_state_pre_hook(hook)
    with pytest.raises(CheckpointError, match=r"D0764.*\[1\] out of the list on rank 0, \[\] on rank 1"):
        accelerator.load_state()


class Keeper:
    """A registered object with any state; on some rank its state_dict fails."""

    def __init__(self, state=None, fails=False):
        self.state, self.fails = state, fails

    def state_dict(self):
        if self.fails:
            raise ValueError("not now")
        return self.state

    def load_state_dict(self, state):
        self.state = state


@ranks(2)
def test_a_pickled_state_is_rank_0s_on_every_rank(tmp_path):
    accelerator, _, _ = started(tmp_path)
    keeper = Keeper({"path": Path(f"rank-{accelerator.process_index}")})
    accelerator.register_for_checkpointing(keeper)
    path = accelerator.save_state(allow_pickle=True).path
    assert len(inspect(path).pickles()) == 1
    with pytest.raises(CheckpointError, match="D0761"):
        accelerator.load_state()
    accelerator.load_state(allow_pickle=True)
    assert keeper.state == {"path": Path("rank-0")}


@ranks(2)
def test_a_state_dict_that_fails_on_one_rank_is_an_error_on_all(tmp_path):
    accelerator, _, _ = started(tmp_path)
    accelerator.register_for_checkpointing(Keeper(1, fails=accelerator.is_last_process))
    with pytest.raises(CheckpointError, match=r"D0714.*rank 1.*not now"):
        accelerator.save_state()


def peft_model():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    return get_peft_model(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), LoraConfig(target_modules=["0"]))


def train_adapter(folder, *, steps, resume=False):
    """Train a LoRA adapter whose hooks save and load it alone; returns its values."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    accelerator = Accelerator(cpu=True, project_dir=folder, seed=0)
    model = peft_model()
    optimizer = torch.optim.AdamW([x for x in model.parameters() if x.requires_grad], lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)

    def save(models, weights, output_dir):
        if accelerator.is_main_process:
            accelerator.unwrap_model(models[0]).save_pretrained(output_dir)
            weights.pop()

    def load(models, input_dir):
        values = load_file(Path(input_dir) / "adapter_model.safetensors")
        set_peft_model_state_dict(accelerator.unwrap_model(models.pop()), values)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
    if resume:
        accelerator.load_state()
    for _ in range(steps):
        accelerator.backward(model(torch.ones(2, 4)).sum())
        optimizer.step()
        optimizer.zero_grad()
        accelerator.save_state()
    found = get_peft_model_state_dict(accelerator.unwrap_model(model))
    accelerator.end_training()
    return {name: x.tolist() for name, x in found.items()}


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
def test_a_peft_adapter_saved_by_hooks_alone_goes_on_as_if_nothing_had_happened(tmp_path):
    whole = run_ranks(train_adapter, 1, tmp_path / "whole", steps=4)[0]
    run_ranks(train_adapter, 2, tmp_path / "parts", steps=2)
    resumed = run_ranks(train_adapter, 1, tmp_path / "parts", steps=2, resume=True)[0]
    path = latest(tmp_path / "parts" / "checkpoints")
    assert (path.name, (path / "adapter_config.json").exists()) == ("step-00000004", True)
    assert not [x for x in inspect(path).tensors if x.startswith("model")]
    assert resumed == whole
