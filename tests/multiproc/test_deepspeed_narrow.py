"""DeepSpeed in bf16 and fp16 where state is offloaded, parameters are divided twice, or ranks share sequences."""

from __future__ import annotations

import json
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distrib import Accelerator, RunConfig
from distrib.testing import run_ranks
from tests.multiproc.test_context_parallel import Decoder, sentences
from tests.multiproc.test_deepspeed import assert_close, float16_parameters
from tests.multiproc.test_deepspeed_layouts import needs_async_io, wide, wide_loss

if find_spec("deepspeed") is None:
    pytest.skip("pip install deepspeed==0.19.8", allow_module_level=True)

RANKS = 2
NEAR = {"bf16": 2e-3, "fp16": 2e-4}  # of float32, after steps of at most 1e-2 each: gradients are rounded
DDP: dict[str, Any] = {"strategy": "ddp"}


def decoder() -> nn.Module:
    torch.manual_seed(1)
    return Decoder()


def decoder_loss(model: nn.Module, reader: int) -> torch.Tensor:
    tokens = sentences()[reader * 2 : reader * 2 + 2]
    return F.cross_entropy(model(tokens[:, :-1]).float().transpose(1, 2), tokens[:, 1:])


MODELS: dict[str, Any] = {"wide": (wide, wide_loss), "decoder": (decoder, decoder_loss)}


class Run:
    """One training run of a model in one layout."""

    def __init__(self, kind: str, settings: dict[str, Any], precision: str):
        make, self.loss_of = MODELS[kind]
        self.accelerator = Accelerator(
            RunConfig(
                device="cpu", seed=3, mixed_precision=precision, gradient_accumulation_steps=2, **settings
            )
        )
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.scale = 1024.0
        model = make()
        self.model, self.optimizer = self.accelerator.prepare(
            model, torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-3)
        )
        self.reader = self.accelerator.process_index // settings.get("mesh", {}).get("context", 1)

    def step(self, factor: float = 1.0) -> None:
        for _ in range(2):
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(self.loss_of(self.model, self.reader) * factor)
                self.accelerator.clip_grad_norm_(self.model.parameters(), 0.1)
                self.optimizer.step()
                self.optimizer.zero_grad()

    def whole(self) -> dict[str, torch.Tensor]:
        return {name: x.clone() for name, x in self.accelerator.get_state_dict(self.model).items()}


def overflow_in(run: Run) -> dict[str, Any]:
    before, scale = run.whole(), run.accelerator.scaler.scale
    run.step(float("inf") if run.accelerator.process_index == RANKS - 1 else 1.0)
    after = run.whole()
    return {
        "skipped": run.accelerator.optimizer_step_was_skipped,
        "scale": run.accelerator.scaler.scale / scale,
        "unchanged": all(torch.equal(after[name], x) for name, x in before.items()),
    }


def there_and_back(folder: str, kind: str, settings: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Train, save, overflow, go on, go back; then load in another layout, train there, and come back."""
    seen: dict[str, Any] = {}
    for precision in ("bf16", "fp16"):
        first, second = f"{folder}/{precision}-1", f"{folder}/{precision}-2"
        with float16_parameters() if precision == "fp16" else nullcontext():
            run = Run(kind, settings, precision)
            found: dict[str, Any] = {"begun": run.whole()}
            run.step()
            run.step()
            run.accelerator.save_state(first, durable=False)
            found["saved"] = run.whole()
            if precision == "fp16":
                found["overflow"] = overflow_in(run)
                run.accelerator.load_state(first)
            run.step()
            found["on"] = run.whole()
            run.accelerator.load_state(first)
            run.step()
            found["again"] = run.whole()

            elsewhere = Run(kind, other, precision)
            elsewhere.accelerator.load_state(first)
            found["there"] = elsewhere.whole()
            elsewhere.step()
            elsewhere.accelerator.save_state(second, durable=False)
            found["then"] = elsewhere.whole()
            back = Run(kind, settings, precision)
            back.accelerator.load_state(second)
            found["back"] = back.whole()
            back.step()
            found["finally"] = back.whole()
        seen[precision] = found
    return seen


def plainly(kind: str, steps: int, readers: int) -> dict[str, torch.Tensor]:
    """Return the parameters of one process in float32."""
    make, loss_of = MODELS[kind]
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        (sum(loss_of(model, reader) for reader in range(readers)) / readers).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    return {name: x.detach() for name, x in model.state_dict().items()}


def in_stage(stage: int, **settings: Any) -> dict[str, Any]:
    return {"strategy": "deepspeed", "deepspeed": {"zero_stage": stage, **settings}}


def sharing(stage: int) -> dict[str, Any]:
    return {**in_stage(stage), "mesh": {"context": 2}}


CPU = {"offload_optimizer": "cpu"}
NVME = {"offload_optimizer": "nvme", "nvme_path": "disk"}
slow = pytest.mark.slow
CASES = [
    # model, layout, the other layout
    pytest.param("wide", in_stage(1, **CPU), in_stage(3), id="stage 1, optimizer on the CPU", marks=slow),
    pytest.param("wide", in_stage(2, **CPU), DDP, id="stage 2, optimizer on the CPU", marks=slow),
    pytest.param("wide", in_stage(3, **CPU, offload_param="cpu"), in_stage(1), id="stage 3, all on the CPU", marks=slow),
    pytest.param("wide", in_stage(3, **NVME), in_stage(2), id="optimizer on a disk", marks=[slow, needs_async_io]),
    pytest.param("wide", in_stage(3, offload_param="nvme", **NVME), DDP, id="all on a disk", marks=needs_async_io),
    pytest.param("wide", in_stage(3, config="hpz.json"), in_stage(2), id="parameters divided twice", marks=slow),
    *(
        pytest.param("decoder", sharing(stage), in_stage(3 - stage), id=f"shared sequences, stage {stage}", marks=slow)
        for stage in (0, 1, 2)
    ),
    pytest.param("decoder", sharing(3), DDP, id="shared sequences, stage 3"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "settings", "other"), CASES)
def test_in_sixteen_bits_layouts_resume_exactly_skip_overflows_and_exchange_checkpoints(
    tmp_path, monkeypatch, kind, settings, other
):
    monkeypatch.chdir(tmp_path)
    zero = {"stage": 3, "zero_hpz_partition_size": 2, "stage3_param_persistence_threshold": 0}
    Path("hpz.json").write_text(json.dumps({"zero_optimization": zero}))

    ranks = run_ranks(there_and_back, RANKS, str(tmp_path), kind, settings, other, timeout_s=110)

    readers = RANKS // settings.get("mesh", {}).get("context", 1)
    for precision, near in NEAR.items():
        for found in (rank[precision] for rank in ranks):
            assert_close(found["begun"], plainly(kind, 0, readers), rtol=0, atol=0)
            assert_close(found["saved"], plainly(kind, 2, readers), rtol=0, atol=near)
            assert_close(found["on"], plainly(kind, 3, readers), rtol=0, atol=near)
            for after, before in (("again", "on"), ("there", "saved"), ("back", "then")):
                assert_close(found[after], found[before], rtol=0, atol=0)
            assert any(not torch.equal(found["finally"][name], x) for name, x in found["back"].items())
    for found in (rank["fp16"] for rank in ranks):
        assert found["overflow"] == {"skipped": True, "scale": 0.5, "unchanged": True}
