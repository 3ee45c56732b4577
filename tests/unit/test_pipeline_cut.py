"""How a model is cut into stages, and the orders in which ranks compute and talk."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn

from distrib import RunConfig, StrategyError
from distrib.collectives.single import SingleCollectives
from distrib.errors import ConfigError
from distrib.precision import PrecisionPolicy
from distrib.startup import _mesh
from distrib.strategies import STRATEGIES
from distrib.strategies.pipeline import Cut, PipelineOptions, Pipelining, units_of
from distrib.strategies.pipeline_plan import Action, Schedule, actions, deal, parts_of

WITH_BACKWARD = ("gpipe", "1f1b", "interleaved_1f1b")
PLANS = [
    (schedule, ranks, per_rank, parts)
    for schedule in get_args(Schedule)
    for ranks in (2, 3, 4)
    for per_rank in ((1,) if schedule == "1f1b" else (1, 2, 3))
    for parts in (1, 2, 3, 5, 8, 13)
]


def smallest_largest(sizes: list[int], stages: int) -> int:
    cuts = itertools.combinations(range(1, len(sizes)), stages - 1)
    return min(max(sum(sizes[a:b]) for a, b in itertools.pairwise([0, *inner, len(sizes)])) for inner in cuts)


@given(st.data())
def test_the_largest_stage_is_as_small_as_it_can_be(data):
    sizes = data.draw(st.lists(st.integers(0, 50), min_size=1, max_size=8))
    stages = data.draw(st.integers(1, len(sizes)))
    found = deal(sizes, stages)
    assert [i for part in found for i in part] == list(range(len(sizes)))
    assert len(found) == stages
    assert all(found)
    assert max(sum(sizes[i] for i in part) for part in found) == smallest_largest(sizes, stages)


@given(st.integers(1, 60), st.integers(1, 60))
def test_microbatches_have_all_rows_once_and_equal_sizes_but_for_one_row(rows, wanted):
    found = parts_of(rows, wanted)
    assert [i for part in found for i in part] == list(range(rows))
    assert len(found) == min(rows, wanted)
    assert max(map(len, found)) - min(map(len, found)) <= 1


@pytest.mark.parametrize(("schedule", "ranks", "per_rank", "parts"), PLANS)
def test_every_stage_runs_every_microbatch_once_on_its_rank(schedule, ranks, per_rank, parts):
    for rank, order in enumerate(actions(schedule, ranks, per_rank, parts)):
        own = range(rank, ranks * per_rank, ranks)
        wanted = sorted(itertools.product(own, range(parts)))
        assert sorted((s, i) for op, s, i in order if op == "forward") == wanted
        backwards = sorted((s, i) for op, s, i in order if op == "backward")
        assert backwards == ([] if schedule == "forward" else wanted)


def run_with_meetings(orders: tuple[tuple[Action, ...], ...], last: int) -> list[Action]:
    """Execute orders where each transfer waits until both ranks have come to it; return what was computed."""
    ranks = len(orders)
    place, computed = [0] * ranks, []
    partner = {"send": ("receive", 1), "send_back": ("receive_back", -1)}
    while any(place[rank] < len(orders[rank]) for rank in range(ranks)):
        before = list(place)
        for rank in range(ranks):
            if place[rank] == len(orders[rank]):
                continue
            action = orders[rank][place[rank]]
            if action.operation in ("forward", "backward"):
                computed.append(action)
                place[rank] += 1
            elif action.operation in partner:
                operation, by = partner[action.operation]
                other = (action.stage + by) % ranks
                theirs = orders[other][place[other]] if place[other] < len(orders[other]) else None
                if theirs == Action(operation, action.stage + by, action.part):
                    place[rank] += 1
                    place[other] += 1
        assert place != before, "deadlock"
    return computed


@pytest.mark.parametrize(("schedule", "ranks", "per_rank", "parts"), PLANS)
def test_ranks_never_wait_for_each_other_in_a_ring(schedule, ranks, per_rank, parts):
    last = ranks * per_rank - 1
    computed = run_with_meetings(actions(schedule, ranks, per_rank, parts), last)
    at = {action: i for i, action in enumerate(computed)}
    for (operation, stage, part), i in at.items():
        if operation == "forward" and stage:
            assert at[Action("forward", stage - 1, part)] < i
        if operation == "backward":
            assert at[Action("forward", stage, part)] < i
            assert stage == last or at[Action("backward", stage + 1, part)] < i


def most_kept(order: tuple[Action, ...]) -> int:
    kept = most = 0
    for action in order:
        kept += (action.operation == "forward") - (action.operation == "backward")
        most = max(most, kept)
    return most


def test_1f1b_keeps_at_most_as_many_microbatches_as_stages_follow_and_gpipe_keeps_all():
    assert [most_kept(order) for order in actions("1f1b", 4, 1, 12)] == [4, 3, 2, 1]
    assert [most_kept(order) for order in actions("gpipe", 4, 1, 12)] == [12] * 4


@pytest.mark.parametrize("schedule", WITH_BACKWARD)
def test_a_stage_s_backwards_come_in_the_order_of_the_rows(schedule):
    per_rank = 2 if schedule == "interleaved_1f1b" else 1
    for order in actions(schedule, 3, per_rank, 7):
        for stage in {action.stage for action in order}:
            assert [x.part for x in order if x.operation == "backward" and x.stage == stage] == list(range(7))


class Cutting(SimpleNamespace):
    """What a `Cut` asks of its `Pipelining`, for one rank that nobody talks to."""

    def __init__(self, rank: int, ranks: int, per_rank: int = 1):
        peers = SingleCollectives()
        peers.rank, peers.world_size = rank, ranks
        super().__init__(
            ranks=ranks,
            stages=ranks * per_rank,
            microbatches=4,
            peers=peers,
            options=PipelineOptions(stages_per_rank=per_rank),
            runtime=SimpleNamespace(precision=PrecisionPolicy(), device=torch.device("cpu")),
        )


def cut(model: nn.Module, rank: int = 0, ranks: int = 2, per_rank: int = 1) -> Cut:
    return Cut(Cutting(rank, ranks, per_rank), model)  # type: ignore[arg-type]


def nested() -> nn.Module:
    return nn.Sequential(
        nn.Sequential(nn.Linear(2, 3), nn.Tanh()), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1)
    )


class Blocks(nn.Module):
    """A model that says itself where it can be cut."""

    def __init__(self, extra: nn.Parameter | None = None):
        super().__init__()
        self.inner = nn.ModuleDict({"second": nn.Linear(2, 2), "first": nn.Linear(2, 2)})
        self.extra = extra

    def pipeline_units(self) -> list[Any]:
        return [self.inner["first"], self.inner["second"]]

    def forward(self, x):
        return self.inner["second"](self.inner["first"](x))


def test_sequences_in_a_sequence_are_opened_once():
    assert [name for name, _ in units_of(nested())] == ["0.0", "0.1", "1", "2", "3"]


def test_a_model_may_name_its_units_in_the_order_of_its_forward():
    assert [name for name, _ in units_of(Blocks())] == ["inner.first", "inner.second"]


def test_a_sequence_with_hooks_of_its_own_stays_one_unit():
    model = nested()
    model[0].register_forward_hook(lambda *_: None)
    assert [name for name, _ in units_of(model)] == ["0", "1", "2", "3"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_keeps_memory_for_its_own_stage_only(rank):
    model = nested()
    part = cut(model, rank)
    part.keep_own_part(moves=False)
    for name, x in model.named_parameters():
        assert x.is_meta != part.holds(name)
    assert {"0.0.weight": (3, 2), "3.weight": (1, 3)}.items() <= {
        name: tuple(x.shape) for name, x in model.named_parameters()
    }.items()


def test_stages_of_one_rank_alternate_with_those_of_the_others():
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(4)))
    assert [stage.index for stage in cut(model, rank=1, per_rank=2).stages] == [1, 3]


def test_weights_that_are_tied_inside_a_stage_stay_tied_where_there_is_no_memory():
    model = nn.Sequential(nn.Linear(9, 9), nn.Linear(2, 2), nn.Linear(2, 2))
    model[2].weight = model[1].weight
    cut(model, rank=0).keep_own_part(moves=False)
    assert model[2].weight is model[1].weight
    assert model[2].weight.is_meta


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(9, 9), nn.Linear(2, 2))
    model[2].weight = model[0].weight
    return model


def hooked() -> nn.Module:
    model = nested()
    model.register_forward_hook(lambda *_: None)
    return model


class Foreign(Blocks):
    def pipeline_units(self):
        return [self.inner["first"], nn.Tanh()]


@pytest.mark.parametrize(
    ("model", "ranks", "says"),
    [
        (nested(), 6, r"it has 5 units, but mesh.pipeline \(6\)"),
        (tied(), 2, r"0.weight, 2.weight are tied"),
        (hooked(), 2, "has hooks of its own"),
        (nn.ModuleList([nn.Linear(2, 2)]), 2, "no method pipeline_units"),
        (Foreign(), 2, r"pipeline_units\(\) returns Tanh, which is not a module inside"),
        (Blocks(nn.Parameter(torch.ones(1))), 2, "extra is in none of its units"),
    ],
    ids=["too many stages", "tied", "hooks", "no sequence", "foreign unit", "outside"],
)
def test_what_cannot_be_cut_is_refused_with_its_names(model, ranks, says):
    with pytest.raises(StrategyError, match=rf"D0842.*{says}"):
        cut(model, ranks=ranks)


def mesh_of(world_size: int, **settings: Any):
    config = RunConfig(strategy="fsdp", **settings)
    return _mesh(config, "fsdp", STRATEGIES.get("fsdp").capabilities, world_size)


@pytest.mark.parametrize("other", ["tensor", "context"])
def test_a_pipeline_does_not_go_together_with_other_ways_to_divide_a_sample(other):
    with pytest.raises(StrategyError, match=rf"D0841.*mesh.pipeline is 2 and mesh.{other} is 2"):
        mesh_of(4, mesh={"pipeline": 2, other: 2})


def test_a_pipeline_setting_without_a_pipeline_is_refused():
    with pytest.raises(ConfigError, match=r"D0107.*pipeline.schedule does nothing, since mesh.pipeline is 1"):
        mesh_of(2, pipeline={"schedule": "gpipe"})


def test_ranks_that_are_left_shard():
    assert mesh_of(6, mesh={"pipeline": 2}).size("shard") == 3


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"pipeline": {"stages_per_rank": 2}}, r"schedule is 1f1b, but pipeline.stages_per_rank is 2"),
        ({"pipeline": {"schedule": "interleaved_1f1b"}}, r"stages_per_rank is 1; expected at least 2"),
        ({"sync_batchnorm": True}, "sync_batchnorm does not go together with mesh.pipeline"),
        ({"compile": {"scope": "model"}}, "compile does not go together with mesh.pipeline"),
    ],
)
def test_settings_that_do_not_fit_stages_are_refused(options, says):
    with pytest.raises(StrategyError, match=rf"D0841.*{says}"):
        Pipelining(SimpleNamespace(), options)  # type: ignore[arg-type]
