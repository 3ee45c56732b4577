import json
import logging
import os
import random
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from distrib.checkpoint import Contents, inspect, latest, open_checkpoint, retain, rng, save, verify
from distrib.checkpoint.storage import Storage
from distrib.errors import CheckpointError
from distrib.state import Box, Interval, LoaderPosition, ShardedState, Slice, whole
from tests.unit.checkpointing import (
    ALONE,
    NoExchange,
    contents,
    cut,
    interval,
    on_ranks,
    rows,
    sample,
    sharded,
    state_of,
    values,
    zeros_like,
)


def loaded(path, like, collectives=ALONE):
    state = state_of(zeros_like(like))
    with open_checkpoint(path, collectives) as reader:
        reader.fill(state)
    return values(state)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert found[name].dtype is x.dtype
        assert torch.equal(found[name], x), name


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def hidden(directory):
    return [name for name in names(directory) if name.startswith(".")]


def error_of(action):
    with pytest.raises(CheckpointError) as caught:
        action()
    return caught.value


def test_what_was_saved_comes_back_bitwise(tmp_path):
    save(tmp_path / "step-1", contents(sample()), ALONE)
    assert_same(loaded(tmp_path / "step-1", sample()), sample())


def test_everything_else_comes_back_too(tmp_path):
    given = Contents(
        state=ShardedState({}, {"optimizer/groups": [{"lr": 0.1, "betas": (0.9, 0.95)}]}),
        loaders=[LoaderPosition(1, 2, 3, 4)],
        schedulers=[{"best": float("inf"), "milestones": {3: 1}}],
        scaler={"scale": 65536.0},
        custom=[{"ema": torch.arange(5000.0)}, {"names": {"a"}}],
        counters={"step": 7, "steps": [7, 3]},
        config={"seed": 1},
        info={"strategy": "ddp"},
    )
    save(tmp_path / "c", given, ALONE)
    with open_checkpoint(tmp_path / "c", ALONE) as reader:
        assert reader.objects == given.state.objects
        assert reader.loaders == given.loaders
        assert reader.schedulers == given.schedulers
        assert reader.scaler == given.scaler
        assert torch.equal(reader.custom[0]["ema"], torch.arange(5000.0))
        assert reader.custom[1] == {"names": {"a"}}
        assert (reader.counters, reader.config, reader.world_size) == (given.counters, given.config, 1)
        assert reader.manifest.info["strategy"] == "ddp"
        assert reader.specs() == {}


def test_a_missing_scaler_is_none(tmp_path):
    save(tmp_path / "c", contents(sample()), ALONE)
    with open_checkpoint(tmp_path / "c", ALONE) as reader:
        assert reader.scaler is None


def test_random_states_come_back_per_rank(tmp_path):
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    save(tmp_path / "c", Contents(ShardedState({}), rng=rng.capture()), ALONE)
    expected = draw()
    with open_checkpoint(tmp_path / "c", ALONE) as reader:
        rng.restore(reader.rng(0))
        assert draw() == expected
        assert "rng/rank-00001.json" in str(error_of(lambda: reader.rng(1)))


def test_whole_tensors_are_readable_with_plain_safetensors(tmp_path):
    save(tmp_path / "c", contents(sample()), ALONE)
    found = safetensors.torch.load_file(tmp_path / "c/model/rank-00000.safetensors")
    assert_same(found, {k.removeprefix("model/"): x for k, x in sample().items() if k.startswith("model/")})


@pytest.mark.parametrize("writer", [rows, interval])
@pytest.mark.parametrize("reader", [rows, interval])
@pytest.mark.parametrize(("n", "m"), [(1, 3), (3, 2), (2, 4)])
def test_any_layout_on_any_number_of_ranks_loads_into_any_other(tmp_path, writer, reader, n, m):
    tensors = {name: x for name, x in sample().items() if x.dim() and x.numel()}
    on_ranks(n, lambda c: save(tmp_path / "c", Contents(sharded(tensors, c.rank, n, writer)), c))

    def load(c):
        state = sharded(zeros_like(tensors), c.rank, m, reader)
        with open_checkpoint(tmp_path / "c", c) as opened:
            assert opened.check(state) == tensors.keys()
            opened.fill(state)
        return [(s.get(), cut(tensors[s.name], s.where)) for parts in state.tensors.values() for s in parts]

    for found in on_ranks(m, load):
        assert all(torch.equal(got, expected) for got, expected in found)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_slices_cut_anywhere_reshard_exactly(tmp_path_factory, data):
    shape = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple))
    full = torch.randn(shape)
    size = full.numel()
    cuts = [0, *sorted(data.draw(st.lists(st.integers(0, size), max_size=3))), size]
    parts = tuple(
        Slice("model/w", shape, full.dtype, w, lambda w=w: cut(full, w))
        for w in map(Interval, cuts, cuts[1:])
    )
    path = save(
        tmp_path_factory.mktemp("c") / "c", Contents(ShardedState({"model/w": parts})), ALONE, durable=False
    )
    bounds = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
    box = Box(tuple(a for a, _ in bounds), tuple(b - a for a, b in bounds))
    target = torch.zeros(box.size)
    with open_checkpoint(path, ALONE) as reader:
        reader.fill(ShardedState({"model/w": (Slice("model/w", shape, full.dtype, box, lambda: target),)}))
    assert torch.equal(target, cut(full, box))


def test_replicated_state_is_divided_over_the_ranks(tmp_path):
    tensors = {f"model/{i}": torch.full((100,), float(i)) for i in range(6)}
    on_ranks(3, lambda c: save(tmp_path / "c", contents(tensors), c))
    sizes = [(tmp_path / f"c/model/rank-{r:05d}.safetensors").stat().st_size for r in range(3)]
    assert max(sizes) - min(sizes) <= 64
    assert_same(loaded(tmp_path / "c", tensors), tensors)


def test_a_snapshot_is_committed_after_the_load(tmp_path):
    save(tmp_path / "c", contents({"model/w": torch.ones(3)}), ALONE)
    committed = []
    part = Slice("model/w", (3,), torch.float32, Box((0,), (3,)), lambda: torch.zeros(3), committed.append)
    with open_checkpoint(tmp_path / "c", ALONE) as reader:
        reader.fill(ShardedState({"model/w": (part,)}))
    assert torch.equal(committed[0], torch.ones(3))


def test_parameters_are_filled_in_place(tmp_path):
    save(tmp_path / "c", contents({"model/w": torch.ones(2, 3)}), ALONE)
    parameter = torch.nn.Parameter(torch.zeros(3, 2).T)
    with open_checkpoint(tmp_path / "c", ALONE) as reader:
        reader.fill(ShardedState({"model/w": (whole("model/w", parameter),)}))
    assert torch.equal(parameter.detach(), torch.ones(2, 3))


def test_a_tied_tensor_is_stored_once_and_found_under_both_names(tmp_path):
    state = state_of({"model/emb": torch.ones(3)}, aliases={"model/head": "model/emb"})
    save(tmp_path / "c", Contents(state), ALONE)
    untied = state_of({"model/emb": torch.zeros(3), "model/head": torch.zeros(3)})
    with open_checkpoint(tmp_path / "c", ALONE) as reader:
        assert list(reader.specs()) == ["model/emb"]
        reader.check(untied)
        reader.fill(untied)
    assert torch.equal(values(untied)["model/head"], torch.ones(3))


def test_a_tensor_that_is_tied_now_is_not_unexpected(tmp_path):
    save(tmp_path / "c", contents({"model/emb": torch.ones(3), "model/head": torch.ones(3)}), ALONE)
    with open_checkpoint(tmp_path / "c", ALONE) as reader:
        reader.check(state_of({"model/emb": torch.zeros(3)}, aliases={"model/head": "model/emb"}))


def test_objects_of_the_ranks_are_united(tmp_path):
    def run(c):
        return save(tmp_path / "c", Contents(ShardedState({}, {"step": {f"p{c.rank}": 3}, "lr": 0.1})), c)

    on_ranks(2, run)
    with open_checkpoint(tmp_path / "c", ALONE) as reader:
        assert reader.objects == {"step": {"p0": 3, "p1": 3}, "lr": 0.1}


def test_objects_on_which_ranks_disagree_are_refused_on_all(tmp_path):
    errors = on_ranks(2, lambda c: save(tmp_path / "c", Contents(ShardedState({}, {"g": {"lr": c.rank}})), c))
    assert [e.code for e in errors] == ["D0718"] * 2
    assert "the objects['g']['lr']: 0 and 1" in errors[0].problem


# Fitting


def test_all_that_does_not_fit_is_listed_before_anything_changes(tmp_path):
    save(
        tmp_path / "c",
        contents({"model/weight": torch.ones(3), "model/a": torch.ones(2), "model/b": torch.ones(2)}),
        ALONE,
    )
    wanted = {"model/wieght": torch.zeros(3), "model/a": torch.zeros(5), "model/b": torch.zeros(2).int()}
    with open_checkpoint(tmp_path / "c", ALONE) as reader:
        error = error_of(lambda: reader.check(state_of(wanted)))
    assert error.code == "D0708"
    for line in (
        "missing: 'model/wieght' float32 (3,) is not stored; did you mean 'model/weight'?",
        "mismatch: 'model/a' is stored as float32 (2,), but is float32 (5,) here",
        "mismatch: 'model/b' is stored as float32 (2,), but is int32 (2,) here",
        "unexpected: 'model/weight' float32 (3,) is stored, but has no place here; did you mean 'model/wieght'?",
    ):
        assert line in error.problem
    assert not any(x.any() for x in wanted.values())


def test_fill_checks_before_it_touches(tmp_path):
    save(tmp_path / "c", contents({"model/a": torch.ones(2)}), ALONE)
    state = state_of({"model/a": torch.zeros(2), "model/b": torch.zeros(2)})
    with open_checkpoint(tmp_path / "c", ALONE) as reader:
        error_of(lambda: reader.fill(state))
    assert not values(state)["model/a"].any()


def test_what_may_be_left_out_is_left_out(tmp_path):
    save(tmp_path / "c", contents({"model/a": torch.ones(2), "model/old": torch.ones(2)}), ALONE)
    state = state_of({"model/a": torch.zeros(2), "model/head.w": torch.zeros(4)})
    with open_checkpoint(tmp_path / "c", ALONE) as reader:
        names = reader.check(state, ignore=["model/head.*", "model/old"])
        assert names == reader.check(state, strict=False) == {"model/a"}
        reader.fill(state, only=names)
    assert values(state)["model/a"].all()


def test_a_misfit_on_one_rank_is_refused_on_all(tmp_path):
    save(tmp_path / "c", contents({"model/a": torch.ones(2)}), ALONE)

    def load(c):
        with open_checkpoint(tmp_path / "c", c) as reader:
            reader.check(state_of({"model/a": torch.zeros(2 + c.rank)}))

    assert [e.code for e in on_ranks(2, load)] == ["D0708"] * 2


# Writing


def test_an_older_checkpoint_is_replaced_and_nothing_is_left_over(tmp_path):
    for seed in (0, 1):
        save(tmp_path / "c", contents(sample(seed)), ALONE)
    assert_same(loaded(tmp_path / "c", sample()), sample(1))
    assert names(tmp_path) == ["c"]


def test_replacing_works_where_directories_cannot_be_swapped(tmp_path):
    for seed in (0, 1):
        save(tmp_path / "c", contents(sample(seed)), ALONE, storage=NoExchange())
    assert_same(loaded(tmp_path / "c", sample()), sample(1))
    assert names(tmp_path) == ["c"]


def test_an_empty_directory_may_be_the_target(tmp_path):
    (tmp_path / "c").mkdir()
    save(tmp_path / "c", contents(sample()), ALONE)
    verify(tmp_path / "c")


@pytest.mark.parametrize("kind", ["directory with files", "file", "link", "dangling link"])
def test_what_is_no_checkpoint_is_not_replaced(tmp_path, kind):
    target, other = tmp_path / "c", tmp_path / "other"
    other.mkdir()
    (other / "mine").write_text("x")
    if kind == "directory with files":
        target = other
    elif kind == "file":
        target.write_text("x")
    else:
        target.symlink_to(other if kind == "link" else tmp_path / "nowhere")
    error = error_of(lambda: save(target, contents(sample()), ALONE))
    assert (error.code, error.where) == ("D0711", str(target))
    assert (other / "mine").read_text() == "x"
    assert hidden(tmp_path) == []


def test_a_second_job_is_told_who_the_owner_is(tmp_path):
    save(tmp_path / "c", contents(sample()), ALONE)
    storage = Storage()
    lock = storage.lock(tmp_path / ".c.lock")
    error = error_of(lambda: save(tmp_path / "c", contents(sample(1)), ALONE))
    storage.close(lock)
    assert error.code == "D0712"
    assert f"process {os.getpid()} on host" in error.problem
    assert_same(loaded(tmp_path / "c", sample()), sample())


def test_what_dead_jobs_left_is_removed_by_the_next_save(tmp_path):
    dead = Storage()
    dead.close(dead.lock(tmp_path / ".step-5.lock"))
    (tmp_path / ".step-5.tmp-0123456789ab/model").mkdir(parents=True)
    (tmp_path / ".step-5.tmp-0123456789ab/model/half").write_text("x")
    save(tmp_path / "step-9", contents(sample()), ALONE)
    assert names(tmp_path) == ["step-9"]


def test_hidden_names_of_others_are_left_alone(tmp_path):
    (tmp_path / ".git.tmp-0123456789ab").mkdir()
    (tmp_path / ".git.lock").write_text("theirs")
    save(tmp_path / "c", contents(sample()), ALONE)
    assert names(tmp_path) == [".git.lock", ".git.tmp-0123456789ab", "c"]


def test_a_checkpoint_that_was_moved_aside_comes_back(tmp_path):
    save(tmp_path / "step-3", contents(sample()), ALONE)
    (tmp_path / "step-3").rename(tmp_path / ".step-3.old-0123456789ab")
    assert latest(tmp_path) == tmp_path / "step-3"
    assert_same(loaded(tmp_path / "step-3", sample()), sample())


def test_a_full_disk_is_seen_before_anything_is_written(tmp_path):
    class Full(Storage):
        def free_bytes(self, path):
            return 1000

    error = error_of(lambda: save(tmp_path / "c", contents(sample()), ALONE, storage=Full()))
    assert error.code == "D0713"
    assert names(tmp_path) == []


def test_a_failure_on_one_rank_is_raised_on_all_and_leaves_the_old_one(tmp_path):
    class Broken(Storage):
        def write(self, file, data):
            raise OSError(28, "No space left on device")

    save(tmp_path / "c", contents(sample()), ALONE)
    errors = on_ranks(
        3, lambda c: save(tmp_path / "c", contents(sample(1)), c, storage=Broken() if c.rank == 1 else None)
    )
    assert [e.problem for e in errors] == [
        "rank 1: writing the checkpoint failed: No space left on device"
    ] * 3
    assert_same(loaded(tmp_path / "c", sample()), sample())
    assert names(tmp_path) == ["c"]


def test_a_value_that_cannot_be_stored_is_refused_on_all_ranks(tmp_path):
    def run(c):
        return save(
            tmp_path / "c", Contents(ShardedState({}), custom=[{"f": print if c.rank == 0 else 1}]), c
        )

    errors = on_ranks(2, run)
    assert [e.code for e in errors] == ["D0709"] * 2
    assert "custom[0]['f']" in errors[1].problem


def test_a_dtype_that_safetensors_lacks_is_refused_by_name(tmp_path):
    state = state_of({"model/w": torch.zeros(2, dtype=torch.complex128)})
    assert (
        "'model/w' has dtype torch.complex128"
        in error_of(lambda: save(tmp_path / "c", Contents(state), ALONE)).problem
    )


@pytest.mark.parametrize("name", ["weight", "rng/x", "../x/y", "custom/w", "/w"])
def test_a_tensor_name_that_makes_no_folder_is_refused(tmp_path, name):
    assert error_of(lambda: save(tmp_path / "c", contents({name: torch.zeros(1)}), ALONE)).code == "D0716"
    assert names(tmp_path) == []


def test_durable_saves_sync_every_file_and_directory_and_others_none(tmp_path):
    class Counting(Storage):
        def __init__(self):
            self.files, self.folders = 0, []

        def sync(self, file):
            self.files += 1
            super().sync(file)

        def sync_dir(self, path):
            self.folders.append(path)
            super().sync_dir(path)

    durable, fast = Counting(), Counting()
    save(tmp_path / "a", contents(sample()), ALONE, storage=durable)
    save(tmp_path / "b", contents(sample()), ALONE, storage=fast, durable=False)
    assert durable.files == sum(len(names) for _, _, names in os.walk(tmp_path / "a"))
    assert tmp_path in durable.folders
    assert len(durable.folders) == 1 + sum(1 for _ in os.walk(tmp_path / "a"))
    assert (fast.files, fast.folders) == (0, [])


# Finding and keeping


def make(directory, *numbers):
    for number in numbers:
        save(directory / f"step-{number}", contents({"model/w": torch.tensor(number)}), ALONE, durable=False)


def test_the_latest_is_found_by_number(tmp_path):
    make(tmp_path, 9, 10, 2)
    assert latest(tmp_path) == tmp_path / "step-10"
    assert latest(tmp_path / "nowhere") is None


def test_an_incomplete_one_is_not_the_latest(tmp_path, caplog):
    make(tmp_path, 1, 2, 3, 4)
    (tmp_path / "step-4/manifest.json").unlink()
    (tmp_path / "step-3/model/rank-00000.safetensors").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        assert latest(tmp_path) == tmp_path / "step-2"
    assert "step-3" in caplog.text


def test_a_copied_checkpoint_is_still_complete(tmp_path):
    make(tmp_path, 1)
    shutil.copytree(tmp_path / "step-1", tmp_path / "elsewhere/step-7")
    assert latest(tmp_path / "elsewhere") == tmp_path / "elsewhere/step-7"
    verify(tmp_path / "elsewhere/step-7")


def test_only_the_newest_are_kept(tmp_path):
    make(tmp_path, 1, 2, 10)
    assert retain(tmp_path, 2) == [tmp_path / "step-1"]
    assert names(tmp_path) == ["step-10", "step-2"]
    assert retain(tmp_path, 5) == []


def test_what_is_not_ours_is_never_removed(tmp_path):
    make(tmp_path, 5, 6)
    (tmp_path / "step-1").mkdir()
    (tmp_path / "step-1/notes.txt").write_text("mine")
    (tmp_path / "step-2").symlink_to(tmp_path / "step-5")
    save(tmp_path / "best", contents(sample()), ALONE)
    assert retain(tmp_path, 1) == [tmp_path / "step-5"]
    assert names(tmp_path) == ["best", "step-1", "step-2", "step-6"]


def test_an_incomplete_one_does_not_count_as_kept(tmp_path):
    make(tmp_path, 1, 2)
    (tmp_path / "step-2/model/rank-00000.safetensors").unlink()
    assert retain(tmp_path, 1) == []
    assert latest(tmp_path) == tmp_path / "step-1"


def test_keeping_none_is_refused(tmp_path):
    assert error_of(lambda: retain(tmp_path, 0)).code == "D0720"


def test_inspect_opens_no_other_file(tmp_path):
    make(tmp_path, 3)
    (tmp_path / "step-3/model/rank-00000.safetensors").unlink()
    assert inspect(tmp_path / "step-3").specs()["model/w"].shape == ()


def test_the_manifest_is_plain_json(tmp_path):
    make(tmp_path, 3)
    body = json.loads((tmp_path / "step-3/manifest.json").read_text())["body"]
    assert body["tensors"]["model/w"]["dtype"] == "I64"
