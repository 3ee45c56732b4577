"""Which modules are sharded on their own."""

from __future__ import annotations

import pytest
from torch import nn

from distrib.errors import StrategyError
from distrib.strategies.fsdp_state import prefetch
from distrib.strategies.fsdp_units import find_units


class Block(nn.Module):
    def __init__(self, size: int = 4):
        super().__init__()
        self.first, self.second = nn.Linear(size, size), nn.Linear(size, size)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.layers = nn.ModuleList([Block() for _ in range(3)])
        self.head = nn.Linear(4, 10, bias=False)


def names(model, wanted=None):
    return find_units(model, wanted).names


def test_repeated_blocks_are_units_and_the_rest_is_the_model_s():
    assert names(Model()) == ("layers.0", "layers.1", "layers.2")


def test_blocks_deep_inside_are_found_and_what_is_in_them_is_not():
    outer = nn.Module()
    outer.body = nn.Module()
    outer.body.stages = nn.ModuleList([nn.Sequential(Block(), Block()), nn.Sequential(Block(), Block())])
    assert names(outer) == tuple(f"body.stages.{i}.{j}" for i in range(2) for j in range(2))


def test_small_leaves_in_a_row_are_no_units_and_large_ones_are():
    small = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    large = nn.Sequential(nn.Linear(1000, 600), nn.Tanh(), nn.Linear(1000, 600))
    assert names(small) == ()
    assert names(large) == ("0", "2")


def test_modules_without_parameters_are_no_units():
    assert names(nn.Sequential(*(nn.Sequential(nn.ReLU()) for _ in range(3)))) == ()


def test_classes_that_must_not_be_split_win_over_repeated_blocks():
    model = Model()
    model._no_split_modules = ["Block", "NotThere"]
    units = find_units(model)
    assert units.names == ("layers.0", "layers.1", "layers.2")
    assert units.reason == "Block: not to be split"


def test_named_classes_are_units_also_within_each_other():
    assert names(Model(), ["Block", "Linear"])[:3] == ("layers.0", "layers.0.first", "layers.0.second")


def test_an_unknown_class_is_refused_with_the_nearest_name():
    with pytest.raises(StrategyError, match=r"D0830.*no module of class 'Blok'.*Block"):
        find_units(Model(), ["Blok"])


def test_a_weight_that_is_tied_across_units_belongs_to_what_is_around_them():
    model = Model()
    model.layers[0].first.weight = model.layers[2].first.weight
    assert names(model) == ("layers.1",)
    assert names(Model(), ["Embedding", "Linear"]) != ()
    tied = Model()
    tied.head.weight = tied.embedding.weight
    assert "embedding" not in names(tied, ["Embedding", "Linear"])
    assert "head" not in names(tied, ["Embedding", "Linear"])


def test_a_block_that_is_used_twice_is_one_unit():
    model = nn.Module()
    shared = Block()
    model.layers = nn.ModuleList([shared, shared, Block()])
    assert names(model) == ("layers.0", "layers.2")


class Recorder:
    """What torch's sharded modules are told."""

    def __init__(self, name):
        self.name = name

    def set_modules_to_forward_prefetch(self, modules):
        self.forward = "".join(x.name for x in modules)

    def set_modules_to_backward_prefetch(self, modules):
        self.backward = "".join(x.name for x in modules)


def test_units_ask_for_those_that_come_next_in_either_direction():
    units = list(map(Recorder, "mabcd"))  # the model, and its blocks
    prefetch(units, 2)
    assert [x.forward for x in units] == ["ab", "bc", "cd", "d", ""]
    assert [x.backward for x in units] == ["dc", "", "a", "ba", "cb"]
