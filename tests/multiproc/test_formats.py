"""`mixed_precision` spelled out: a number format for each role."""

from __future__ import annotations

import contextlib
import io

import pytest
import torch
from torch import nn

from distrib import Accelerator, RunConfig
from distrib.errors import ConfigError
from distrib.testing import ranks


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 1)
        self.register_buffer("mean", torch.zeros(4))
        self.seen: list = []

    def forward(self, x):
        hidden = self.first(x - self.mean)
        self.seen.append(hidden.dtype)
        return self.last(hidden)


def run(**formats):
    """Return what is kept, computed in, put out and in `.grad`, after a step that must lower the loss."""
    accelerator = Accelerator(RunConfig(device="cpu", mixed_precision=formats, seed=0))
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(accelerator.process_index))
    losses = []
    for _ in range(3):
        found = model(x)
        loss = found.float().square().mean()
        losses.append(loss.item())
        accelerator.backward(loss)
        plain = accelerator.unwrap_model(model)
        gradient = plain.last.weight.grad
        optimizer.step()
        everyone = accelerator.gather(gradient.float())
        torch.testing.assert_close(everyone[:1], everyone[-1:])
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert plain.mean.dtype is torch.float32
    return plain.last.weight.dtype, plain.seen[0], found.dtype, gradient.dtype


FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@ranks(1, 2)
def test_each_role_has_its_format():
    assert run(compute="bf16") == (FP32, BF16, FP32, FP32)
    assert run(param="bf16", compute="bf16") == (BF16, BF16, FP32, BF16)
    assert run(param="bf16", compute="bf16", reduce="bf16", output="bf16") == (BF16, BF16, BF16, BF16)
    assert run(compute="fp16", output="fp16", loss_scaling="dynamic") == (FP32, FP16, FP16, FP32)
    assert run(compute="bf16", reduce="bf16") == (FP32, BF16, FP32, FP32)
    assert run(compute="fp32") == (FP32, FP32, FP32, FP32)


@ranks(1)
def test_masters_of_a_model_in_half_precision_are_float32():
    accelerator = Accelerator(RunConfig(device="cpu", mixed_precision={"compute": "bf16"}))
    model = nn.Linear(2, 2).to(torch.bfloat16)
    before = model.weight
    model = accelerator.prepare(model)
    assert (model.weight.dtype, model.weight is before) == (FP32, True)


@pytest.mark.parametrize(
    "formats", [{"param": "bf16", "compute": "fp16"}, {"compute": "bf16", "loss_scaling": "dynamic"}]
)
@ranks(1)
def test_formats_that_do_not_fit_together_are_refused(formats):
    with pytest.raises(ConfigError, match="D0124"):
        Accelerator(RunConfig(device="cpu", mixed_precision=formats))


@ranks(1, 2)
def test_modules_named_by_a_pattern_compute_in_float32():
    formats = {"compute": "bf16", "fp32_modules": ["last", "*.head", "nowhere*"]}
    accelerator = Accelerator(RunConfig(device="cpu", mixed_precision=formats))
    seen = {}
    inner = Model()
    inner.last.register_forward_hook(lambda _, x, y: seen.update(last=(x[0].dtype, y.dtype)))
    whole = nn.Sequential()
    whole.add_module("inner", inner)
    whole.add_module("last", nn.Linear(1, 1))
    whole.last.register_forward_hook(lambda _, x, y: seen.update(outer=(x[0].dtype, y.dtype)))
    told = io.StringIO()
    with contextlib.redirect_stderr(told):
        prepared = accelerator.prepare(whole)
    prepared(torch.ones(2, 4)).sum().backward()
    assert seen == {"last": (BF16, BF16), "outer": (BF16, FP32)}
    plain = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert plain(torch.ones(2, 4)).dtype is FP32
    assert seen["last"] == (FP32, FP32)
    if accelerator.is_main_process:
        assert "'nowhere*' fits no module of Sequential" in told.getvalue()
        assert "'*.head' fits no module" in told.getvalue()
        assert "'last' fits no module" not in told.getvalue()
