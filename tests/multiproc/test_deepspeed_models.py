"""DeepSpeed with other people's parts: offload, its CPUAdam, transformers' models, files of its own, its old locks."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distrib import Accelerator, RunConfig, StrategyError
from distrib.strategies.deepspeed import configure, init_sharded
from distrib.testing import run_ranks

if find_spec("deepspeed") is None:
    pytest.skip("pip install deepspeed==0.19.8", allow_module_level=True)


def model_of() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 3))


def trained_plainly(steps: int, ranks: int) -> dict[str, torch.Tensor]:
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        for rank in range(ranks):
            (loss_of(model, rank) / ranks).backward()
        optimizer.step()
    return {name: x.detach().clone() for name, x in model.state_dict().items()}


def loss_of(model: nn.Module, rank: int) -> torch.Tensor:
    return model(torch.linspace(-1, 1 + rank, 10).view(2, 5)).square().mean()


def assert_close(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], atol: float = 2e-6
) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=atol, msg=name)


def offloaded(settings: dict[str, Any], optimizer_name: str, folder: str) -> dict[str, torch.Tensor]:
    """Train two steps, save, train more, go back to what was saved, and train a third step."""
    accelerator = Accelerator(
        RunConfig(strategy="deepspeed", device="cpu", seed=3, project_dir=folder, deepspeed=settings,
                  gradient_accumulation_steps=2)
    )  # fmt: skip
    model = model_of()
    if optimizer_name == "CPUAdam":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        optimizer = DeepSpeedCPUAdam(model.parameters(), lr=0.05, weight_decay=0.01)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    model, optimizer = accelerator.prepare(model, optimizer)

    def step() -> None:
        for _ in range(2):
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, accelerator.process_index))
                accelerator.clip_grad_norm_(model.parameters(), 1e6)
                optimizer.step()
                optimizer.zero_grad()

    step()
    step()
    accelerator.save_state(durable=False)
    step()
    step()
    accelerator.load_state()
    step()
    return {name: x.clone() for name, x in accelerator.get_state_dict(model).items()}


OFFLOADS = [
    pytest.param({"zero_stage": 1, "offload_optimizer": "cpu"}, "AdamW", id="stage 1"),
    pytest.param({"zero_stage": 2, "offload_optimizer": "cpu"}, "AdamW", id="stage 2"),
    pytest.param({"zero_stage": 3, "offload_optimizer": "cpu", "offload_param": "cpu"}, "AdamW", id="stage 3"),
    pytest.param({"zero_stage": 2, "offload_optimizer": "cpu"}, "CPUAdam", id="CPUAdam", marks=pytest.mark.slow),
    pytest.param({"zero_stage": 3, "offload_optimizer": "cpu"}, "CPUAdam", id="CPUAdam, stage 3", marks=pytest.mark.slow),
]  # fmt: skip


@pytest.mark.timeout(900)  # CPUAdam is compiled if it has not been: `make` does that ahead
@pytest.mark.parametrize(("settings", "optimizer"), OFFLOADS)
def test_offloaded_state_trains_saves_and_resumes_as_in_one_process(tmp_path, settings, optimizer):
    for found in run_ranks(offloaded, 2, settings, optimizer, str(tmp_path), timeout_s=800):
        assert_close(found, trained_plainly(3, 2), atol=2e-6 if optimizer == "AdamW" else 2e-5)


def tiny_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def llama(folder: str) -> tuple[list, torch.Tensor, list[float]]:
    (Path(folder) / "ds.json").write_text(
        json.dumps(
            {
                "train_batch_size": "auto",
                "zero_optimization": {
                    "stage": 3,
                    "reduce_bucket_size": "auto",
                    "stage3_prefetch_bucket_size": "auto",
                    "stage3_param_persistence_threshold": 0,
                },
            }
        )
    )
    accelerator = Accelerator(
        RunConfig(strategy="deepspeed", device="cpu", seed=3, project_dir=folder,
                  deepspeed={"config": f"{folder}/ds.json"})
    )  # fmt: skip
    model = tiny_llama()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    tokens = torch.arange(12).view(2, 6) * (accelerator.process_index + 3) % 64
    losses = []
    for _ in range(3):
        loss = model(input_ids=tokens, labels=tokens).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(accelerator.reduce(loss.detach(), "mean")))
    prompt = torch.tensor([[1, 2, 3]])
    with accelerator.gathered(model) as plain, torch.no_grad():
        written = plain.generate(prompt, max_new_tokens=4, do_sample=False).tolist()
    with torch.no_grad():
        logits = model(input_ids=prompt).logits
    accelerator.save_model(model, f"{folder}/saved")
    saved = accelerator.save_state(f"{folder}/state", durable=False).path
    manifest = "".join(path.read_text() for path in Path(str(saved)).glob("*.json"))
    return written, logits, losses, "deepspeed.engines" in manifest


def test_a_llama_under_stage_3_trains_generates_and_is_saved_as_from_pretrained_loads_it(tmp_path):
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    expected = []
    for _ in range(3):
        optimizer.zero_grad()
        losses = [
            model(input_ids=tokens, labels=tokens).loss
            for tokens in (torch.arange(12).view(2, 6) * (rank + 3) % 64 for rank in range(2))
        ]
        (sum(losses) / 2).backward()
        optimizer.step()
        expected.append(float(sum(losses).detach() / 2))
    for written, logits, losses, stores_config in run_ranks(llama, 2, str(tmp_path), timeout_s=100):
        assert losses == pytest.approx(expected, abs=1e-5)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        prompt = torch.tensor([[1, 2, 3]])
        with torch.no_grad():
            torch.testing.assert_close(loaded(input_ids=prompt).logits, logits, rtol=0, atol=1e-5)
        assert loaded.generate(prompt, max_new_tokens=4, do_sample=False).tolist() == written
        assert stores_config


def loaded_sharded(folder: str) -> tuple[bool, dict[str, torch.Tensor]]:
    """Return whether the model was divided when it came from its files, and what it is after a step."""
    import transformers

    accelerator = Accelerator(
        RunConfig(strategy="deepspeed", device="cpu", seed=3, deepspeed={"zero_stage": 3})
    )
    with init_sharded(accelerator):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    largest = max(x.ds_numel for x in model.parameters())
    is_divided = all(x.numel() == 0 and x.ds_tensor.numel() <= (largest + 1) // 2 for x in model.parameters())
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    tokens = torch.arange(12).view(2, 6) * (accelerator.process_index + 3) % 64
    accelerator.backward(model(input_ids=tokens, labels=tokens).loss)
    optimizer.step()
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder)  # outside, it is whole again
    assert all(x.numel() > 0 for x in plain.parameters())
    return is_divided, {name: x.clone() for name, x in accelerator.get_state_dict(model).items()}


def test_a_model_that_is_loaded_inside_init_sharded_is_never_whole_and_trains_the_same(tmp_path):
    pytest.importorskip("transformers", reason="pip install transformers")
    pytest.importorskip("accelerate", reason="pip install accelerate: transformers' integration needs it")
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for rank in range(2):
        tokens = torch.arange(12).view(2, 6) * (rank + 3) % 64
        (model(input_ids=tokens, labels=tokens).loss / 2).backward()
    optimizer.step()
    expected = {name: x.detach() for name, x in model.state_dict().items()}
    for is_divided, found in run_ranks(loaded_sharded, 2, str(tmp_path), timeout_s=100):
        assert is_divided
        assert_close(found, expected, atol=1e-5)


def resumed(stage: int, precision: str, folder: str) -> list[dict[str, torch.Tensor]]:
    """Return the parameters after four steps, and after two of them that follow a checkpoint of the second."""
    accelerator = Accelerator(
        RunConfig(strategy="deepspeed", device="cpu", seed=3, project_dir=folder, mixed_precision=precision,
                  deepspeed={"zero_stage": stage})
    )  # fmt: skip
    model = model_of()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.05))

    def two_steps() -> None:
        for _ in range(2):
            accelerator.backward(loss_of(model, accelerator.process_index))
            optimizer.step()
            optimizer.zero_grad()

    found = []
    two_steps()
    accelerator.save_state(durable=False)
    for load in (False, True):
        if load:
            accelerator.load_state()
        two_steps()
        found.append({name: x.clone() for name, x in accelerator.get_state_dict(model).items()})
    return found


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_run_in_bf16_goes_on_bit_for_bit_at_the_same_world_size(tmp_path, stage):
    for first, second in run_ranks(resumed, 2, stage, "bf16", str(tmp_path)):
        assert_close(second, first, atol=0)
        assert not torch.equal(first["0.weight"], model_of().state_dict()["0.weight"])


QUIET = """
import sys
import torch
from distrib import Accelerator, RunConfig, StrategyError
a = Accelerator(RunConfig(strategy="deepspeed", device="cpu", deepspeed={"zero_stage": int(sys.argv[1])}))
m = torch.nn.Linear(3, 2)
m, o = a.prepare(m, torch.optim.AdamW(m.parameters()))
for _ in range(2):
    a.backward(m(torch.ones(1, 3)).sum())
    o.step()
    o.zero_grad()
"""


@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_shows_nothing_of_what_deepspeed_says_at_every_start(stage):
    done = subprocess.run(
        [sys.executable, "-c", QUIET, str(stage)], capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert [x for x in (done.stdout + done.stderr).splitlines() if not x.startswith("distrib: ")] == []


def clipped_together(stages: list[int]) -> Any:
    """Train two models with engines of their own stages, whose gradients are clipped by one norm."""
    accelerator = Accelerator(RunConfig(strategy="deepspeed", device="cpu", seed=3))
    models = [model_of() for _ in stages]
    for model, stage in zip(models, stages, strict=True):
        configure(model, {"zero_optimization": {"stage": stage}})
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.05) for model in models]
    optimizers = accelerator.prepare(*models, *optimizers)[len(models) :]
    norms = []
    for _ in range(2):
        accelerator.backward(sum(k * loss_of(m, accelerator.process_index) for k, m in enumerate(models, 1)))
        norms.append(float(accelerator.clip_grad_norm_([x for m in models for x in m.parameters()], 0.1)))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    accelerator.save_state(durable=False)
    code = ""
    try:
        configure(models[0], {})
    except StrategyError as error:
        code = error.code
    states = [{name: x.clone() for name, x in accelerator.get_state_dict(m).items()} for m in models]
    return states, norms, accelerator._strategy.describe(), code


@pytest.mark.parametrize("stages", [[0, 3], [1, 2]], ids=str)
def test_engines_with_configurations_of_their_own_equal_one_process(tmp_path, monkeypatch, stages):
    monkeypatch.chdir(tmp_path)
    models = [model_of() for _ in stages]
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.05) for model in models]
    expected = []
    for _ in range(2):
        sum(k * loss_of(m, rank) / 2 for k, m in enumerate(models, 1) for rank in range(2)).backward()
        expected.append(float(nn.utils.clip_grad_norm_([x for m in models for x in m.parameters()], 0.1)))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for states, norms, described, code in run_ranks(clipped_together, 2, stages, timeout_s=100):
        assert norms == pytest.approx(expected, rel=1e-5)
        for state, model in zip(states, models, strict=True):
            assert_close(state, {name: x.detach() for name, x in model.state_dict().items()})
        assert all(f"stage {n}," in line for n, line in zip(stages, described.splitlines(), strict=True))
        assert code == "D0949"
