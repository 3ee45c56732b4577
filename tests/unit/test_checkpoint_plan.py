import pytest
import torch
from hypothesis import given, strategies as st

from distrib.checkpoint.plan import (
    Held,
    Share,
    canonical,
    coverage_problem,
    numel,
    overlaps,
    pieces,
    plan_writes,
    size_of,
    whole_box,
)
from distrib.errors import CheckpointError
from distrib.state import Box, Interval
from tests.unit.checkpointing import cut, interval, rows

shapes = st.lists(st.integers(1, 6), max_size=4).map(tuple)
SIZES = {"F32": 4, "U8": 1}


@st.composite
def wheres(draw, shape):
    if draw(st.booleans()):
        a, b = sorted(draw(st.tuples(*[st.integers(0, numel(shape))] * 2)))
        return Interval(a, b)
    bounds = [sorted(draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
    return Box(tuple(a for a, _ in bounds), tuple(b - a for a, b in bounds))


def numbers(shape):
    return torch.arange(numel(shape)).reshape(shape)


def view(full, box):
    return full[tuple(slice(a, a + n) for a, n in zip(box.start, box.size, strict=True))]


@given(st.data(), shapes)
def test_the_boxes_of_an_interval_are_its_elements_in_order(data, shape):
    a, b = sorted(data.draw(st.tuples(*[st.integers(0, numel(shape))] * 2)))
    found = pieces(Interval(a, b), shape)
    flat = [x for box, _ in found for x in view(numbers(shape), box).reshape(-1).tolist()]
    assert flat == list(range(a, b))
    assert len(found) <= max(2 * len(shape) - 1, 1)


@given(st.data(), shapes)
def test_copying_the_overlaps_copies_exactly_what_two_slices_share(data, shape):
    source, target = data.draw(wheres(shape)), data.draw(wheres(shape))
    full = numbers(shape)
    found = [x for o in overlaps(source, target, shape) for x in view(full, o.box).reshape(-1).tolist()]
    shared = set(cut(full, source).reshape(-1).tolist()) & set(cut(full, target).reshape(-1).tolist())
    assert sorted(found) == sorted(shared)


@given(st.data(), shapes)
def test_an_interval_that_is_a_box_equals_that_box(data, shape):
    a, b = sorted(data.draw(st.tuples(*[st.integers(0, numel(shape))] * 2)))
    where = canonical(Interval(a, b), shape)
    assert cut(numbers(shape), where).reshape(-1).tolist() == list(range(a, b))
    assert isinstance(where, Box) == (len(pieces(Interval(a, b), shape)) == 1)


@given(shapes.filter(bool), st.integers(1, 5), st.sampled_from([rows, interval]))
def test_the_shares_of_all_ranks_cover_a_tensor(shape, world_size, layout):
    assert coverage_problem(shape, [layout(shape, rank, world_size) for rank in range(world_size)]) is None


@given(st.data(), shapes)
def test_coverage_is_judged_as_counting_every_element_does(data, shape):
    slices = data.draw(st.lists(wheres(shape), max_size=3))
    counts = torch.zeros(shape)
    for where in slices:
        for box, _ in pieces(where, shape):
            view(counts, box).add_(1)
    assert (coverage_problem(shape, slices) is None) == bool((counts == 1).all())


@given(st.lists(st.tuples(shapes, st.sampled_from(["F32", "U8"])), max_size=12), st.integers(1, 5))
def test_replicated_tensors_are_written_once_and_evenly(tensors, world_size):
    held = tuple(
        Held(f"model/{i}", shape, dtype, whole_box(shape)) for i, (shape, dtype) in enumerate(tensors)
    )
    plan = plan_writes([Share(tuple(range(world_size)), held)], SIZES)
    assert sorted(x for owned in plan.owned for x in owned) == sorted(held)
    sizes = [size_of(x.where) * SIZES[x.dtype] for x in held]
    loads = [sum(size_of(x.where) * SIZES[x.dtype] for x in owned) for owned in plan.owned]
    assert max(loads) <= sum(sizes) / world_size + max(sizes, default=0)


@given(shapes.filter(bool), st.integers(2, 4))
def test_sharded_and_replicated_tensors_mix(shape, world_size):
    shares = [
        Share((r,), (Held("model/a", shape, "F32", interval(shape, r, world_size)),
                     Held("model/b", shape, "F32", whole_box(shape))))
        for r in range(world_size)
    ]  # fmt: skip
    plan = plan_writes(shares, SIZES)
    items = [x for owned in plan.owned for x in owned]
    assert sum(size_of(x.where) for x in items if x.name == "model/a") == numel(shape)
    assert [x.where for x in items if x.name == "model/b"] == [whole_box(shape)]


def refusal(*shares):
    with pytest.raises(CheckpointError) as caught:
        plan_writes(shares, SIZES)
    return str(caught.value)


def test_a_gap_names_tensor_and_count():
    message = refusal(Share((0,), (Held("model/w", (4, 2), "F32", Box((0, 0), (3, 2))),)))
    assert "'model/w'" in message
    assert "6 of 8 elements" in message


def test_an_overlap_names_both_slices():
    held = [Held("model/w", (4, 2), "F32", Box((start, 0), (3, 2))) for start in (0, 1)]
    assert "[0:3, 0:2] and [1:4, 0:2] overlap" in refusal(Share((0,), (held[0],)), Share((1,), (held[1],)))


def test_a_tensor_of_which_every_slice_is_empty_is_not_lost_in_silence():
    assert "all slices of it are empty" in refusal(
        Share((0,), (Held("model/w", (4,), "F32", Interval(0, 0)),))
    )


def test_ranks_with_other_dtypes_are_refused():
    held = [Held("model/w", (4,), dtype, Box((0,), (4,))) for dtype in SIZES]
    assert "ranks disagree on tensor 'model/w'" in refusal(Share((0,), (held[0],)), Share((1,), (held[1],)))


def test_ten_thousand_row_shards_are_planned_fast():
    shape = (10_000, 4)
    shares = [Share((r,), (Held("model/w", shape, "F32", rows(shape, r, 10_000)),)) for r in range(10_000)]
    assert all(len(owned) == 1 for owned in plan_writes(shares, SIZES).owned)
