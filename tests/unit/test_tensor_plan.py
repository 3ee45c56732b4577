"""Which modules are divided over the ranks that share matrix products, and what is refused."""

from __future__ import annotations

import types

import pytest
from torch import nn

from distrib.errors import StrategyError
from distrib.strategies.sequence import find_parts
from distrib.strategies.tensor import find_plan


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(8, 8))

    def forward(self, x):
        return self.o_proj(self.v_proj(x))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = Attention()
        self.norm = nn.LayerNorm(8)
        self.up_proj, self.down_proj = nn.Linear(8, 16), nn.Linear(16, 8)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.head = nn.Linear(8, 10)


def test_common_names_are_divided_by_outputs_and_then_by_inputs():
    styles = find_plan(Model(), 2).styles
    assert styles["layers.1.attention.k_proj"] == styles["layers.0.up_proj"] == "colwise"
    assert styles["layers.1.attention.o_proj"] == styles["layers.0.down_proj"] == "rowwise"
    assert len(styles) == 12


def test_patterns_of_the_user_win_and_stand_for_all_that_fit():
    styles = find_plan(Model(), 2, ("layers.*.up_proj=colwise", "layers.*.down_proj=rowwise")).styles
    assert sorted(styles) == [f"layers.{i}.{name}" for i in range(2) for name in ("down_proj", "up_proj")]


def test_a_model_s_own_plan_is_taken_as_far_as_it_fits():
    model = Model()
    model._tp_plan = {"head": "colwise_rep", "embedding": "embedding_rowwise", "not.there": "odd"}
    plan = find_plan(model, 2)
    assert plan.styles == {"head": "colwise_gather_output", "embedding": "rowwise"}
    assert plan.reason == "the model's own plan"


def test_multihead_attention_of_torch_is_left_alone():
    model = nn.Module()
    model.attention = nn.MultiheadAttention(8, 2)
    with pytest.raises(StrategyError, match="D0833"):
        find_plan(model, 2)


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (("layers.*.upproj=colwise",), r"D0833.*'layers.\*.upproj' fits no module"),
        (("layers.0.norm=colwise",), "D0834.*layers.0.norm is a LayerNorm"),
        (("embedding=colwise",), "D0834.*embedding is a Embedding, which cannot be divided colwise"),
        (("embedding=rowwise",), r"D0834.*embedding has 10 inputs.*mesh.tensor \(3\)"),
        (("layers.0.up_proj=colwise",), "D0834.*layers.0.up_proj has 16 outputs"),
        (("layers.0.down_proj=rowwise",), "D0834.*layers.0.down_proj has 16 inputs"),
    ],
)
def test_what_cannot_be_divided_is_refused_by_name(plan, words):
    with pytest.raises(StrategyError, match=words):
        find_plan(Model(), 3, plan)


def test_a_style_of_another_kind_in_the_model_s_own_plan_is_refused():
    model = Model()
    model._tp_plan = {"layers.*.norm": "replicated_with_grad_allreduce"}
    with pytest.raises(StrategyError, match=r"D0833.*replicated_with_grad_allreduce"):
        find_plan(model, 2)


def test_heads_that_do_not_divide_are_refused():
    model = Model()
    model.config = types.SimpleNamespace(num_attention_heads=6, num_key_value_heads=3)
    with pytest.raises(StrategyError, match=r"D0834.*num_key_value_heads = 3"):
        find_plan(model, 2)


class Split(nn.Module):
    """A block whose products are in modules of their own, as sequence parallelism needs it."""

    def __init__(self):
        super().__init__()
        self.attention = Attention()
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))


class Stacked(nn.Module):
    def __init__(self, *kinds):
        super().__init__()
        self.layers = nn.ModuleList([kind() for kind in kinds])
        self.head = nn.Linear(8, 10)


OF_ATTENTION = ("*.[qkv]_proj=colwise", "*.o_proj=rowwise")


def parts_of(model: nn.Module, *plan: str):
    return find_parts(model, find_plan(model, 2, plan or None))


def test_hidden_states_are_gathered_by_the_modules_around_colwise_ones():
    parts = parts_of(
        Stacked(Split, Split), *OF_ATTENTION, "*.mlp.0=colwise", "*.mlp.2=rowwise", "head=colwise"
    )
    assert parts.stacks == (("layers.0", "layers.1"),)
    assert parts.regions == ("layers.0.attention", "layers.0.mlp", "layers.1.attention", "layers.1.mlp")


def test_blocks_of_two_lists_are_two_stacks():
    model = nn.Module()
    model.encoder, model.decoder = Stacked(Split, Split), Stacked(Split, Split, Split)
    assert list(map(len, parts_of(model).stacks)) == [2, 3]


@pytest.mark.parametrize(
    ("model", "plan", "why"),
    [
        (Model(), (), "the block itself is right around layers.0.up_proj"),
        (nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), ("0=colwise", "2=rowwise"), "no repeated blocks"),
        (Stacked(Split, Split), ("layers.0.*.q_proj=colwise", "layers.0.*.o_proj=rowwise"), "in layers.1 the plan"),
        (Stacked(Split, Split), ("*.q_proj=colwise_gather_output", *OF_ATTENTION[1:]), "in layers.0 the plan does not"),
        (
            Stacked(Split, Split),
            (*OF_ATTENTION, "*.mlp.0=colwise_gather_output"),
            "layers.0.mlp.0 is divided within a block, but its result is whole",
        ),
    ],
)  # fmt: skip
def test_models_in_which_hidden_states_cannot_be_followed_are_refused_with_the_reason(model, plan, why):
    with pytest.raises(StrategyError, match=f"D0851.*{why}"):
        parts_of(model, *plan)
