"""Float8: where it is refused, which layers multiply in it, and that their parameters stay the same objects."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import nn

from distrib import Accelerator, RunConfig
from distrib.config.schema import PrecisionSection
from distrib.devices import DEVICES
from distrib.errors import StrategyError
from distrib.precision import PrecisionPolicy, policy, resolve_precision
from distrib.precision.fp8 import convert, head_of, restore, to_convert

FP8 = PrecisionPolicy("fp8", compute=torch.bfloat16, output=torch.float32, fp8=True)
WHERE = "run.yaml:3 (mixed_precision)"


class Hopper(DEVICES.get("cpu")):  # type: ignore[misc]
    """Stands in for a GPU that has float8."""

    def supports(self, dtype: torch.dtype) -> tuple[bool, str]:
        return True, "it has everything"


@pytest.mark.parametrize("setting", ["fp8", PrecisionSection(compute="fp8")])
def test_a_device_without_float8_refuses_it_with_its_reason(setting):
    words = "D0801.*cpu does not support fp8: torch does not train in torch.float8_e4m3fn on the CPU"
    with pytest.raises(StrategyError, match=words) as refused:
        resolve_precision(setting, DEVICES.get("cpu")(), where=WHERE)
    assert refused.value.where == WHERE


def test_without_torchao_it_is_refused_with_what_to_install(monkeypatch):
    monkeypatch.setattr(policy, "find_spec", lambda name: None)
    with pytest.raises(
        StrategyError, match=r"(?s)D0856.*run.yaml:3.*needs torchao.*fix: pip install torchao"
    ):
        resolve_precision("fp8", Hopper(), where=WHERE)


def test_all_but_the_matrix_products_is_as_in_bf16(monkeypatch):
    monkeypatch.setattr(policy, "find_spec", lambda name: name == "torchao")
    assert resolve_precision("fp8", Hopper()) == FP8
    spelled = resolve_precision(PrecisionSection(compute="fp8", fp32_modules=("*.norm",)), Hopper())
    assert (spelled.name, spelled.compute, spelled.fp8) == ("fp8", torch.bfloat16, True)
    assert spelled.fp32_modules == ("*.norm",)
    assert not resolve_precision("bf16", Hopper()).fp8


class Own(nn.Linear):
    """A class of the user, of whose forward nobody knows."""


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.odd = nn.Linear(32, 64), nn.Linear(64, 32, bias=False), nn.Linear(32, 40)
        self.gate = nn.Sequential(nn.Linear(32, 32))
        self.own = Own(32, 32)
        self.attention = nn.MultiheadAttention(32, 2)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(32, 48)


def test_plain_linear_layers_of_fitting_sizes_are_converted_and_not_the_head():
    found = to_convert(Model(), FP8)
    assert found == [f"layers.{i}.{name}" for i in range(2) for name in ("up", "down", "gate.0")]


def test_modules_that_compute_in_float32_are_left_out_with_what_is_in_them():
    patterns = ("layers.0.gate", "layers.*.up")
    found = to_convert(Model(), PrecisionPolicy("fp8", fp8=True, fp32_modules=patterns))
    assert found == ["layers.0.down", "layers.1.down", "layers.1.gate.0"]


def test_the_head_is_what_a_model_of_transformers_says():
    model = Model()
    model.get_output_embeddings = lambda: model.layers[0].up
    assert head_of(model) is model.layers[0].up
    assert "layers.0.up" not in to_convert(model, FP8)
    assert "head" in to_convert(model, FP8)


def test_a_model_that_is_one_layer_stays_as_it_is():
    assert to_convert(nn.Linear(32, 32), FP8) == []


class Float8Linear(nn.Linear):
    """Stands in for torchao's."""


@pytest.fixture
def torchao(monkeypatch):
    """Put a torchao in place that swaps layers as the real one (0.18) does; yields what it was called with."""
    calls = []

    def convert_to_float8_training(module, *, module_filter_fn=None, config=None):
        calls.append(module)
        for name, given in list(module.named_modules()):
            if isinstance(given, nn.Linear) and module_filter_fn(given, name):
                with torch.device("meta"):
                    made = Float8Linear(given.in_features, given.out_features, bias=False)
                made.weight, made.bias = given.weight, given.bias
                parent, _, leaf = name.rpartition(".")
                setattr(module.get_submodule(parent), leaf, made)
        return module

    found = types.ModuleType("torchao.float8")
    found.convert_to_float8_training = convert_to_float8_training
    monkeypatch.setitem(sys.modules, "torchao", types.ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.float8", found)
    return calls


def test_converted_layers_have_the_parameters_that_were_given_under_the_same_names(torchao):
    model = Model().eval()
    before = dict(model.named_parameters())
    names = convert(model, FP8)
    assert [name for name, x in model.named_modules() if type(x) is Float8Linear] == names
    assert len(torchao) == 1
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(after[name] is parameter for name, parameter in before.items())
    assert not any(module.training for module in model.modules())


def test_converting_twice_changes_nothing_more(torchao):
    model = Model()
    assert convert(model, FP8)
    assert convert(model, FP8) == []
    assert len(torchao) == 1


def test_the_given_layers_come_back_with_the_parameters_of_now(torchao):
    model = Model()
    given = dict(model.named_modules())
    convert(model, FP8)
    now = nn.Parameter(torch.zeros(64, 32))
    model.layers[0].up.weight = now  # as sharding does
    restore(model)
    assert dict(model.named_modules()) == given
    assert model.layers[0].up.weight is now


def test_a_run_in_fp8_converts_what_it_prepares_and_gives_it_back(torchao, monkeypatch, capsys):
    cpu = DEVICES.get("cpu")
    monkeypatch.setattr(cpu, "supports", Hopper.supports)
    monkeypatch.setattr(policy, "find_spec", lambda name: name == "torchao")
    accelerator = Accelerator(RunConfig(device="cpu", mixed_precision="fp8"))
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16))
    given, weight = model[0], model[0].weight
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert type(model[0]) is Float8Linear
    assert "fp8: 1 linear layer of Sequential multiply in float8" in capsys.readouterr().err
    accelerator.backward(model(torch.ones(2, 32)).square().mean())
    assert optimizer.param_groups[0]["params"][0] is weight
    assert weight.grad is not None
    assert accelerator.unwrap_model(model, keep_fp32_wrapper=False)[0] is given
    assert given.weight is weight
