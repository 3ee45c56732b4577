from __future__ import annotations

import json

import pytest
import torch

from distrib.checkpoint import inspect, open_checkpoint, retain, save
from distrib.checkpoint.compare import differences, values_problem
from distrib.checkpoint.damage import damage
from distrib.checkpoint.describe import json_of, lines_of, size_text, table
from distrib.checkpoint.inventory import inventory, inventory_lines
from distrib.checkpoint.progress import watched
from distrib.checkpoint.stored import stored_state
from distrib.errors import CheckpointError
from tests.unit.checkpointing import ALONE, contents, interval, on_ranks, rows, sample, sharded, state_of

INFO = {"strategy": "Single", "config": {"seed": 1}}


def saved(path, tensors=None, **kwargs):
    tensors = sample() if tensors is None else tensors
    kwargs = {"info": INFO, "counters": {"step": 7}, **kwargs}
    return save(path, contents(tensors, **kwargs), ALONE)


def opened(path):
    return open_checkpoint(path, ALONE)


def compared(a, b):
    with opened(a) as one, opened(b) as other:
        return list(differences(one, other))


def test_columns_of_a_table_are_aligned_and_numbers_end_below_each_other():
    assert table(("name", "size"), [("a", "1"), ("longer", "1000")], right=(1,)) == [
        "name    size",
        "a          1",
        "longer  1000",
    ]


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (38_100, "37.2 KiB"), (2**50 * 3, "3072.0 TiB")],
)
def test_sizes_are_said_in_units_that_fit(num_bytes, text):
    assert size_text(num_bytes) == text


def test_a_checkpoint_is_described_with_its_step_writer_settings_and_every_tensor(tmp_path):
    manifest = inspect(saved(tmp_path / "a"))
    lines = lines_of(manifest, "a")

    assert lines[0] == "a"
    for start in ("  step ", "  strategy ", "  host ", "  saved_at ", "config:", "  seed  1"):
        assert any(line.startswith(start) for line in lines), start
    rows_ = [line.split() for line in lines[lines.index("") + 2 : -1]]
    assert [row[0] for row in rows_] == sorted(manifest.tensors)
    assert ["model/weight", "[7,", "5]", "float32", "140", "B", "1"] in rows_
    assert lines[-1] == "6 tensors, 1001 B"


def test_a_tied_tensor_is_shown_with_the_name_that_holds_it(tmp_path):
    state = state_of({"model/a": torch.ones(2)}, aliases={"model/b": "model/a"})
    save(tmp_path / "a", type(contents({}))(state), ALONE)

    assert any(line.split() == ["model/b", "=", "model/a"] for line in lines_of(inspect(tmp_path / "a"), "a"))


def test_the_json_form_says_where_each_slice_lies(tmp_path):
    tensors = {"model/w": torch.randn(7, 2)}
    on_ranks(2, lambda c: save(tmp_path / "a", type(contents({}))(sharded(tensors, c.rank, 2, rows)), c))
    found = json.loads(json.dumps(json_of(inspect(tmp_path / "a"), "a")))["tensors"]["model/w"]

    assert (found["shape"], found["dtype"], found["bytes"]) == ([7, 2], "F32", 56)
    assert [(x["where"], x["file"]) for x in found["slices"]] == [
        ("[0:4, 0:2]", "model/rank-00000.safetensors"),
        ("[4:7, 0:2]", "model/rank-00001.safetensors"),
    ]


def test_a_folder_s_checkpoints_are_listed_newest_last_with_their_state(tmp_path):
    for step in (2, 10):
        saved(tmp_path / f"step-{step:08d}", counters={"step": step})
    next((tmp_path / "step-00000002" / "model").iterdir()).unlink()
    (tmp_path / "step-00000004").mkdir()
    (tmp_path / "notes").mkdir()
    found = {x.path.name: x for x in inventory(tmp_path)}

    assert list(found) == sorted(found, key=lambda name: (found[name].saved_at, found[name].step))
    assert {name: x.step for name, x in found.items()} == {
        "step-00000002": 2,
        "step-00000010": 10,
        "step-00000004": 4,
    }
    assert found["step-00000010"].problem is None
    assert found["step-00000002"].problem == "model/rank-00000.safetensors is missing"
    assert "no complete checkpoint" in found["step-00000004"].problem
    head, *lines = inventory_lines(list(found.values()))
    assert head.split() == ["checkpoint", "step", "size", "saved", "at", "ranks", "strategy", "state"]
    assert any(line.startswith("step-00000010    10") and line.endswith("complete") for line in lines)


def test_a_checkpoint_by_itself_is_listed_alone(tmp_path):
    assert [x.path for x in inventory(saved(tmp_path / "best"))] == [tmp_path / "best"]


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        inventory(tmp_path / "nowhere")


def test_every_damaged_file_and_tensor_is_found(tmp_path):
    path = saved(
        tmp_path / "a", {"model/a": torch.ones(9), "model/b": torch.ones(9), "optimizer/s.a": torch.ones(9)}
    )
    manifest = inspect(path)
    file = path / manifest.tensors["model/a"].slices[0].file
    data = bytearray(file.read_bytes())
    for name in ("model/a", "model/b"):
        data[manifest.tensors[name].slices[0].offset] ^= 1
    file.write_bytes(data)
    (path / "loaders.json").unlink()
    cut = path / manifest.tensors["optimizer/s.a"].slices[0].file
    cut.write_bytes(cut.read_bytes()[:-1])

    found = list(damage(path))

    assert sorted(error.code for error in found) == ["D0704", "D0705", "D0706", "D0706"]
    text = "\n".join(map(str, found))
    for name in ("loaders.json", str(cut), "'model/a'", "'model/b'"):
        assert name in text


def test_a_whole_checkpoint_has_no_damage_and_all_of_its_bytes_are_counted(tmp_path):
    told = []
    path = saved(tmp_path / "a")

    assert list(damage(path, lambda done, total: told.append((done, total)))) == []
    assert told[-1] == (sum(x.size for x in inspect(path).files.values()),) * 2
    assert told == sorted(told)


def test_copies_of_one_state_have_no_differences_whatever_wrote_them(tmp_path):
    tensors = sample()
    saved(tmp_path / "a", tensors, rng={"torch": 9})

    def save_share(c):
        state = sharded(tensors, c.rank, 3, interval)
        given = {"counters": {"step": 7}, "info": INFO, "rng": {"torch": c.rank}}
        return save(tmp_path / "b", type(contents({}))(state, **given), c)

    on_ranks(3, save_share)
    assert compared(tmp_path / "a", tmp_path / "b") == []


def test_each_kind_of_difference_is_named(tmp_path):
    mine = {
        "model/a": torch.tensor([1.0, 2.0, torch.nan]),
        "model/b": torch.ones(2),
        "model/c": torch.ones(2),
    }
    theirs = {
        "model/a": torch.tensor([1.0, 2.5, torch.nan]),
        "model/b": torch.ones(3),
        "model/c": torch.ones(2).double(),
        "model/d": torch.ones(1),
    }
    saved(tmp_path / "a", mine, rng={"torch": 1})
    saved(tmp_path / "b", theirs, rng={"torch": 2}, counters={"step": 8}, info={"config": {"seed": 2}})

    assert compared(tmp_path / "a", tmp_path / "b") == [
        "shape: model/b float32 [2] -> float32 [3]",
        "dtype: model/c float32 [2] -> float64 [2]",
        f"only in {tmp_path / 'b'}: model/d float32 [1]",
        "values: model/a 1 of 3 differ, by at most 0.5",
        "setting: counters.step 7 -> 8",
        "setting: config.seed 1 -> 2",
        "random states of rank 0 differ",
    ]


def test_a_tied_tensor_equals_two_that_are_stored_apart(tmp_path):
    a = torch.randn(3)
    state = state_of({"model/a": a}, aliases={"model/b": "model/a"})
    save(tmp_path / "a", type(contents({}))(state), ALONE)
    save(tmp_path / "b", contents({"model/a": a, "model/b": a.clone()}), ALONE)
    save(tmp_path / "c", contents({"model/a": a, "model/b": a + 1}), ALONE)

    assert compared(tmp_path / "a", tmp_path / "b") == []
    assert [line.split()[1] for line in compared(tmp_path / "a", tmp_path / "c")] == ["model/b"]


@pytest.mark.parametrize(
    ("a", "b", "problem"),
    [
        (torch.tensor([2**62]), torch.tensor([2**62 + 1]), "1 of 1 differ, by less than float64 can tell"),
        (torch.tensor([True, False]), torch.tensor([True, True]), "1 of 2 differ, by at most 1"),
        (torch.tensor([torch.inf]), torch.tensor([-torch.inf]), "1 of 1 differ, by at most inf"),
        (torch.tensor([torch.nan]), torch.tensor([0.0]), "1 of 1 differ, by at most inf"),
        (torch.tensor([1j]), torch.tensor([0j]), "1 of 1 differ, by at most 1"),
        (torch.tensor([torch.nan]), torch.tensor([torch.nan]), None),
        (torch.tensor([0.0]), torch.tensor([-0.0]), None),
        (torch.empty(0, 3), torch.empty(0, 3), None),
        (
            torch.tensor([1.0]).to(torch.float8_e4m3fn),
            torch.tensor([2.0]).to(torch.float8_e4m3fn),
            "1 of 1 differ, by at most 1",
        ),
    ],
)
def test_values_are_compared_in_every_dtype(a, b, problem):
    assert values_problem(a, b) == problem


def test_a_stored_model_is_read_tensor_by_tensor_and_only_when_asked(tmp_path):
    tensors = sample()
    with opened(saved(tmp_path / "a", tensors)) as reader:
        read = []
        reader.tensor = lambda name: read.append(name) or type(reader).tensor(reader, name)
        told = []
        state = watched(stored_state(reader, "model/"), lambda done, total: told.append((done, total)))

        assert set(state.tensors) == {name for name in tensors if name.startswith("model/")}
        assert read == []
        assert torch.equal(state.tensors["model/weight"][0].get(), tensors["model/weight"])
        assert (read, told) == (["model/weight"], [(140, 140 + 14 + 4 + 3)])


def test_milestones_are_kept_and_a_dry_run_removes_nothing(tmp_path):
    for step in range(1, 7):
        saved(tmp_path / f"step-{step:08d}", counters={"step": step})
    expected = [tmp_path / f"step-{step:08d}" for step in (1, 2, 4)]

    assert retain(tmp_path, 1, keep_every=3, dry_run=True) == [*expected, tmp_path / "step-00000005"]
    assert len(list(tmp_path.glob("step-*"))) == 6
    assert retain(tmp_path, 2, keep_every=3) == expected
    assert sorted(x.name for x in tmp_path.glob("step-*")) == [f"step-{step:08d}" for step in (3, 5, 6)]


@pytest.mark.parametrize("given", [{"keep_last": 0}, {"keep_last": 1, "keep_every": 0}])
def test_numbers_below_one_are_refused(tmp_path, given):
    with pytest.raises(CheckpointError) as raised:
        retain(tmp_path, **given)
    assert raised.value.code == "D0720"
