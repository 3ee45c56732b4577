"""What else models do on XLA: ties, number formats, whole parameters, averages, noise, compilation, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from distrib import Accelerator, RunConfig, init_empty
from distrib.errors import StrategyError
from tests.contract.plain import loader_for, make_model, per_sample_loss
from tests.tpu.running import ONE, SHARDED, on_xla


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(12, 8), nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.head(self.drop(self.embed(x)))


def start(settings, model=None, *, make=lambda p: torch.optim.SGD(p, lr=0.1), **more):
    accelerator = Accelerator(RunConfig(seed=7, **{**settings, **more}))
    model = make_model(torch.float32) if model is None else model
    return accelerator, *accelerator.prepare(model, make(model.parameters()))


def step(accelerator, model, optimizer, batch):
    accelerator.backward(per_sample_loss(model, batch).mean())
    optimizer.step()
    optimizer.zero_grad()


def batch_on(accelerator):
    batch = next(iter(loader_for(8, 8, dtype=torch.float32)))
    return {name: value.to(accelerator.device) for name, value in batch.items()}


def ties():
    accelerator, model, optimizer = start(ONE, Tied())
    before = model.embed.weight.detach().cpu()
    accelerator.backward(model(torch.arange(8).to(accelerator.device)).sum())
    optimizer.step()
    return model.head.weight is model.embed.weight, float((model.embed.weight.cpu() - before).abs().max())


def formats(settings):
    seen, losses = {}, {}
    for name in ("no", "bf16"):
        accelerator, model, optimizer = start(settings, mixed_precision=name)
        plain = accelerator.unwrap_model(model)
        plain[0].register_forward_hook(lambda _, __, y, name=name: seen.__setitem__(name, y.dtype))
        batch = batch_on(accelerator)
        seen[f"{name} out"] = model(batch["x"]).dtype
        for _ in range(20):
            step(accelerator, model, optimizer, batch)
        losses[name] = float(per_sample_loss(model, batch).mean().detach().cpu())
    return seen, losses


def whole(settings):
    """Change parameters inside of `gathered`, average, export; return what is needed to tell whether it was right."""
    import torch_xla

    accelerator, model, optimizer = start(settings, make=lambda p: torch.optim.AdamW(p, lr=0.1))
    batch, found = batch_on(accelerator), {}
    average = accelerator.prepare(AveragedModel(accelerator.unwrap_model(model)))
    step(accelerator, model, optimizer, batch)
    average.update_parameters(accelerator.unwrap_model(model))
    spec = torch_xla._XLAC._get_xla_sharding_spec
    inner = accelerator.unwrap_model(model)
    before = {name: spec(x) for name, x in inner.named_parameters()}
    with accelerator.gathered(model) as plain:
        found["names"] = list(plain.state_dict())
        with torch.no_grad():
            for x in plain.parameters():
                x.copy_(torch.ones(x.shape).to(x.device))
    found["sharding kept"] = {name: spec(x) for name, x in inner.named_parameters()} == before
    found["values"] = {float(x.min()) for x in accelerator.get_state_dict(model).values()}
    step(accelerator, model, optimizer, batch)
    held = (inner[0].weight, optimizer.state[inner[0].weight]["exp_avg"])
    found["divided"] = ["devices=[4" in (spec(x) or "") for x in held]
    found["moved"] = float((inner[0].weight.cpu() - 1).abs().max())
    found["average"] = float(
        (average.module[0].weight.cpu() - make_model(torch.float32)[0].weight).abs().max()
    )
    return found


def exported(settings, folder):
    from safetensors.torch import load_file

    accelerator, model, optimizer = start(settings)
    step(accelerator, model, optimizer, batch_on(accelerator))
    accelerator.save_model(model, folder)
    there = load_file(Path(folder) / "model.safetensors")
    return {name: torch.equal(there[name], x) for name, x in accelerator.get_state_dict(model).items()}


def noise(folder):
    """Return what dropout zeroes: before a save, after it, after its load, and under the same seed in a new run."""
    accelerator, model, _ = start(ONE, Tied())

    def drawn():
        return model.drop(torch.ones(64, device=accelerator.device)).cpu().tolist()

    first = drawn()
    accelerator.save_state(folder)
    second = drawn()
    accelerator.load_state(folder)
    third = drawn()
    from distrib import set_seed

    set_seed(7)
    return first, second, third, drawn()


def compiled(folder):
    import torch_xla  # noqa: F401

    found = {}
    settings = {**ONE, "xla": {"compile_cache": folder}}
    accelerator, model, optimizer = start(settings, compile={"scope": "model"})
    batch = batch_on(accelerator)
    for _ in range(3):
        step(accelerator, model, optimizer, batch)
    found["compiled"] = {name: x.cpu() for name, x in accelerator.get_state_dict(model).items()}
    accelerator, model, optimizer = start(settings)
    for _ in range(3):
        step(accelerator, model, optimizer, batch)
    found["plain"] = {name: x.cpu() for name, x in accelerator.get_state_dict(model).items()}
    found["cached"] = len(list(Path(folder).iterdir()))
    with init_empty():
        empty = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    accelerator, model, optimizer = start(settings, empty)
    step(accelerator, model, optimizer, batch)
    found["empty"] = all(bool(x.isfinite().all()) for x in accelerator.get_state_dict(model).values())
    found["evaluated"] = float(
        accelerator.prepare_model(make_model(torch.float32), evaluation_mode=True)(batch["x"]).sum().cpu()
    )
    return found


def on_one(folder):
    """Return what all of the functions above return on one device; a compile cache has to come first."""
    found = {"compiled": compiled(f"{folder}/cache"), "ties": ties(), "noise": noise(f"{folder}/noise")}
    try:
        start({**ONE, "xla": {"compile_cache": f"{folder}/another"}})
    except StrategyError as error:
        found["too late"] = error.code
    return {**found, **in_each(ONE, folder)}


def in_each(settings, folder):
    return {
        "formats": formats(settings),
        "whole": whole(settings),
        "exported": exported(settings, f"{folder}/export"),
    }


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return on_xla(on_one, str(tmp_path_factory.mktemp("one")))[0]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return on_xla(in_each, SHARDED, str(tmp_path_factory.mktemp("shards")), devices=4)[0]


@pytest.fixture(params=["one", "shards"])
def each(request):
    return request.getfixturevalue(request.param)


def test_tied_parameters_stay_tied_and_are_stepped(one):
    tied, moved = one["ties"]
    assert tied
    assert moved > 0.01


def test_bf16_computes_in_bfloat16_and_learns_as_float32_does(each):
    seen, losses = each["formats"]
    assert seen == {
        "no": torch.float32,
        "no out": torch.float32,
        "bf16": torch.bfloat16,
        "bf16 out": torch.float32,
    }
    assert losses["bf16"] != losses["no"]
    assert losses["bf16"] == pytest.approx(losses["no"], abs=0.02)


def test_changes_of_whole_parameters_stay_and_do_not_undo_the_sharding(each):
    found = each["whole"]
    assert found["names"] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert found["sharding kept"]
    assert found["values"] == {1.0}
    assert found["moved"] > 0.01
    assert found["average"] > 0.01


def test_parameters_and_optimizer_state_are_divided_only_with_shards(one, shards):
    assert one["whole"]["divided"] == [False, False]
    assert shards["whole"]["divided"] == [True, True]


def test_save_model_writes_whole_parameters_under_plain_names(each):
    assert each["exported"] == {"0.weight": True, "0.bias": True, "2.weight": True, "2.bias": True}


def test_noise_goes_on_after_a_load_and_follows_the_seed(one):
    first, second, third, fourth = one["noise"]
    assert first != second
    assert third == second
    assert fourth == first


def test_torch_compile_models_without_memory_and_the_compile_cache_work(one):
    found = one["compiled"]
    for name, value in found["plain"].items():
        torch.testing.assert_close(found["compiled"][name], value)
    assert found["cached"] > 0
    assert found["empty"]
    assert found["evaluated"] != 0


def test_a_second_compile_cache_of_a_process_is_refused(one):
    assert one["too late"] == "D0899"


def too_early():
    nn.Linear(2, 2)(torch.ones(1, 2)).sum().backward()  # on the CPU
    accelerator, model, optimizer = start(ONE)
    with pytest.raises(StrategyError) as caught:
        step(accelerator, model, optimizer, batch_on(accelerator))
    return caught.value.code


def test_a_backward_before_the_accelerator_is_told_apart():
    assert on_xla(too_early)[0] == "D0893"
