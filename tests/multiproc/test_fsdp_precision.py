"""Number formats of sharded models against those of whole replicas, with the same settings on the same ranks."""

from __future__ import annotations

import functools
import tempfile

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distrib import Accelerator, RunConfig
from distrib.testing import run_ranks
from tests.multiproc.test_fsdp_models import (
    IMAGES,
    TOKENS,
    Block,
    Conv,
    Net,
    X,
    Y,
    differences,
    mse,
    part,
    sgd,
)

BATCH = {"x": X.float(), "y": Y.float()}
PICTURES = {"x": IMAGES.float(), "y": Y.float()}
BF16 = {"compute": "bf16"}
ROUNDED = 2e-2  # norm weights are rounded to 8 bits on their way, which ddp does not do; Adam multiplies that


class Normed(Net):
    """With a norm whose weights are far from 1, and attention, which uses its output projection's weights itself."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        with torch.no_grad():
            self.norm.weight.copy_(torch.linspace(0.501, 2.003, 6))

    def forward(self, x):
        x = self.inp(x)
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)[:, None]
        return self.head(self.attention(x, x, x)[0][:, 0])


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(10, 6), nn.Linear(6, 10, bias=False)
        self.layers = nn.ModuleList([Block() for _ in range(2)])
        self.head.weight = self.embedding.weight

    def forward(self, x):
        x = self.embedding(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Quantized(Net):
    """Frozen integers that no floating-point format of 8 bits has."""

    def __init__(self):
        super().__init__()
        self.levels = nn.Parameter(torch.tensor([257, 1001, 70001, 3, 33, 113]), requires_grad=False)

    def forward(self, x):
        return super().forward(x * (self.levels % 4))


class Wide(nn.Module):
    """Its head keeps float64."""

    def __init__(self):
        super().__init__()
        self.inp, self.head = nn.Linear(6, 6), nn.Linear(6, 3).double()

    def forward(self, x):
        return self.head(self.inp(x).double())


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch["x"]).flatten(0, 1), batch["x"].flatten())


def accelerator_of(strategy, **settings):
    return Accelerator(RunConfig(strategy=strategy, device="cpu", seed=3, **settings))


def trained(strategy, build, batch, loss, precision, **settings) -> dict:
    """Return losses, state and an evaluation's output after four clipped steps."""
    accelerator = accelerator_of(strategy, mixed_precision=precision, **settings)
    torch.manual_seed(0)
    model = build()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    mine, losses = part(batch, accelerator), []
    for _ in range(4):
        value = loss(model, mine)
        accelerator.backward(value)
        accelerator.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(value.detach().float(), "mean"))
    model.eval()
    with torch.no_grad():
        output = model(batch["x"])
    state = {name: x.clone() for name, x in accelerator.get_state_dict(model).items()}
    scale = accelerator.scaler.scale if accelerator.scaler else 1.0
    return {**state, "losses": torch.stack(losses), "output": output, "scale": torch.tensor(scale)}


def apart(build, precision, batch=BATCH, loss=mse, tolerance=1e-5, **settings) -> list[str]:
    """Return what of a sharded run differs from that of replicas, dtypes included."""
    expected = trained("ddp", build, batch, loss, precision, **settings)
    found = trained("fsdp", build, batch, loss, precision, **settings)
    return differences(found, expected, atol=tolerance, rtol=tolerance)


FP32 = functools.partial(dict, BF16)
AS_DDP = {
    "no": functools.partial(apart, Net, "no"),
    "bf16": functools.partial(apart, Net, "bf16"),
    "fp16": functools.partial(apart, Net, "fp16"),
    "bf16 with norms": functools.partial(apart, Normed, "bf16", tolerance=ROUNDED),
    "bf16 with tied weights": functools.partial(
        apart, Tied, "bf16", batch={"x": TOKENS % 10}, loss=cross_entropy, tolerance=2 * ROUNDED
    ),  # what an embedding gives is rounded too, and with it all that blocks add to
    "bf16 with frozen integers": functools.partial(apart, Quantized, "bf16"),
    "bf16 of a bf16 model": functools.partial(apart, lambda: Net().bfloat16(), "bf16", tolerance=ROUNDED),
    "outputs in bf16": functools.partial(apart, Net, {**BF16, "output": "bf16"}),
    "gradients reduced in bf16": functools.partial(apart, Net, {**BF16, "reduce": "bf16"}, tolerance=ROUNDED),
    "parameters in bf16": functools.partial(apart, Net, {**BF16, "param": "bf16"}, tolerance=ROUNDED),
    "all in bf16": functools.partial(
        apart,
        Net,
        {"param": "bf16", "compute": "bf16", "reduce": "bf16", "output": "bf16"},
        tolerance=ROUNDED,
    ),
    "a head in float32": functools.partial(apart, Net, FP32(fp32_modules=["head"])),
    "blocks and parts of blocks in float32": functools.partial(
        apart, Net, FP32(fp32_modules=["layers.*.a", "layers.1"])
    ),
    "norms in float32": functools.partial(apart, Normed, FP32(fp32_modules=["norm", "attention"])),
    "all modules in float32": functools.partial(apart, Net, FP32(fp32_modules=["*"])),
    "an output projection in float32": functools.partial(
        apart, Normed, FP32(fp32_modules=["*.out_proj"]), tolerance=ROUNDED
    ),
    "bf16 with synchronized BatchNorm": functools.partial(
        apart, Conv, "bf16", batch=PICTURES, tolerance=ROUNDED, sync_batchnorm=True
    ),
}
DEFECTS = {
    "a tied head in float32": (
        functools.partial(
            apart, Tied, FP32(fp32_modules=["head"]), batch={"x": TOKENS % 10}, loss=cross_entropy,
            tolerance=ROUNDED,
        ),
        "refused (D0838): a weight travels in one format; ddp trains",
    ),
    "bf16 with BatchNorm": (
        functools.partial(apart, Conv, "bf16", batch=PICTURES, tolerance=ROUNDED),
        "documented: in evaluation each rank has the running statistics of its own; ddp takes those of rank 0",
    ),
    "bf16 with a float64 head": (
        functools.partial(apart, Wide, "bf16", loss=lambda m, b: mse(m, b).float()),
        "refused (D0838): a unit travels in one format; ddp trains",
    ),
}  # fmt: skip


def two_scaled_windows(strategy) -> dict:
    """Two pairs with windows of two micro-steps that begin apart: the scale falls while the first one's is open."""
    accelerator = accelerator_of(strategy, mixed_precision="fp16", gradient_accumulation_steps=2)
    torch.manual_seed(0)
    models = Net(), Net()
    first, second, *optimizers = accelerator.prepare(*models, *map(sgd, models))
    mine = part(BATCH, accelerator)
    for index in range(8):
        for model, optimizer, begins in ((first, optimizers[0], 0), (second, optimizers[1], 1)):
            if index >= begins:
                with accelerator.accumulate(model):
                    overflow = model is second and index == 2
                    accelerator.backward(mse(model, mine) * (float("inf") if overflow else 1.0))
                    optimizer.step()
                    optimizer.zero_grad()
    states = [accelerator.get_state_dict(model) for model in (first, second)]
    return {f"{i}.{name}": x.clone() for i, state in enumerate(states) for name, x in state.items()}


AS_DDP["a loss scale that falls in another optimizer's window"] = lambda: differences(
    two_scaled_windows("fsdp"), two_scaled_windows("ddp"), atol=2e-3, rtol=0
)


def overflow_in_a_window(strategy) -> dict:
    accelerator = accelerator_of(strategy, mixed_precision="fp16", gradient_accumulation_steps=2)
    torch.manual_seed(0)
    model = Net()
    model, optimizer = accelerator.prepare(model, sgd(model))
    mine = part(BATCH, accelerator)
    for index in range(6):
        with accelerator.accumulate(model):
            overflow = index == 2 and accelerator.process_index == 1
            accelerator.backward(mse(model, mine) * (float("inf") if overflow else 1.0))
            optimizer.step()
            optimizer.zero_grad()
    state = {name: x.clone() for name, x in accelerator.get_state_dict(model).items()}
    return {**state, "scale": torch.tensor(accelerator.scaler.scale)}


AS_DDP["an overflow on one rank in a window's first micro-step"] = lambda: differences(
    overflow_in_a_window("fsdp"), overflow_in_a_window("ddp"), atol=2e-3, rtol=0
)


def outcomes() -> dict[str, str]:
    """Run all cases on this rank; return what went wrong in each."""
    found = {}
    for claim, function in {**AS_DDP, **{name: x[0] for name, x in DEFECTS.items()}}.items():
        try:
            found[claim] = ", ".join(function())
        except Exception as error:  # the next case has an accelerator of its own
            found[claim] = f"{type(error).__name__}: {error}"
    return found


@functools.cache
def outcomes_on_two_ranks() -> list[dict[str, str]]:
    return run_ranks(outcomes, 2)


@pytest.mark.parametrize(
    "claim",
    [
        *AS_DDP,
        *(
            pytest.param(claim, marks=pytest.mark.xfail(strict=True, reason=reason))
            for claim, (_, reason) in DEFECTS.items()
        ),
    ],
)
def test_numbers_have_the_formats_and_values_of_ddp(claim):
    assert [found[claim] for found in outcomes_on_two_ranks()] == ["", ""]


def scale_before_and_after_resume(folder: str) -> tuple[float, float]:
    scales = []
    for number in range(2):
        accelerator = accelerator_of("fsdp", mixed_precision="fp16")
        model = Net()
        model, optimizer = accelerator.prepare(model, sgd(model))
        if number == 0:
            loss = mse(model, part(BATCH, accelerator))
            accelerator.backward(loss * (float("inf") if accelerator.process_index else 1.0))
            optimizer.step()
            accelerator.save_state(folder)
        else:
            accelerator.load_state(folder)
        scales.append(accelerator.scaler.scale)
    return tuple(scales)


def test_the_loss_scale_goes_on_after_a_resume():
    with tempfile.TemporaryDirectory() as folder:
        assert run_ranks(scale_before_and_after_resume, 2, f"{folder}/checkpoint") == [(32768.0, 32768.0)] * 2


def evaluated_under(precision) -> list[str]:
    accelerator = accelerator_of("fsdp", mixed_precision=precision)
    model = accelerator.prepare(Net())
    with torch.no_grad():
        whole = model(BATCH["x"])
    with accelerator.gathered(model) as plain, torch.no_grad():
        inside = plain(BATCH["x"])
    return [str(whole.dtype), str(inside.dtype), str(accelerator.get_state_dict(model)["head.weight"].dtype)]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_outputs_and_stored_weights_are_float32_before_any_training(precision):
    assert run_ranks(evaluated_under, 2, precision) == [["torch.float32"] * 3] * 2
