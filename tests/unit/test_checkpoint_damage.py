"""Damaged, foreign and malicious checkpoints: refused by name, with nothing changed, run or written."""

import json
import os
import pickle
import random

import pytest
import torch

from distrib.checkpoint import Contents, files as reading, inspect, open_checkpoint, rng, save, verify
from distrib.checkpoint.format import canonical_json, checksum
from distrib.errors import CheckpointError
from tests.unit.checkpointing import ALONE, contents, on_ranks, sample, state_of, values, zeros_like


@pytest.fixture
def saved(tmp_path):
    everything = Contents(
        state_of(sample()), rng=rng.capture(), custom=[{"ema": torch.randn(5000)}], counters={"step": 3}
    )
    return save(tmp_path / "c", everything, ALONE, durable=False)


def refusal(path, collectives=ALONE):
    """The error of a load, which must have left the state alone."""
    state = state_of(zeros_like(sample()))
    with pytest.raises(CheckpointError) as caught, open_checkpoint(path, collectives) as reader:
        reader.check(state)
        reader.fill(state)
    assert not any(x.any() for x in values(state).values())
    return caught.value


def files_of(directory):
    return sorted(path for path in directory.rglob("*") if path.is_file())


def flip(path, offset, bit):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


@pytest.mark.parametrize("where", range(8))
def test_a_flipped_bit_is_found_in_every_file(saved, where):
    draw = random.Random(where)
    for path in files_of(saved):
        for _ in range(6):
            offset, bit = draw.randrange(path.stat().st_size), draw.randrange(8)
            if path.name == "manifest.json":
                offset = draw.randrange(path.stat().st_size - 1)  # the last byte is a line's end
            flip(path, offset, bit)
            assert refusal(saved).where == str(path), offset
            flip(path, offset, bit)
    verify(saved)


def test_a_flipped_bit_names_the_tensor(saved):
    path = saved / "model/rank-00000.safetensors"
    flip(path, path.stat().st_size - 1, 0)
    error = refusal(saved)
    assert error.code == "D0706"
    assert "tensor 'model/mask'" in error.problem


def test_the_ranks_together_find_damage_that_only_one_of_them_reads(saved):
    path = saved / "model/rank-00000.safetensors"
    for offset in (0, path.stat().st_size - 1):
        flip(path, offset, 0)
        errors = on_ranks(3, lambda c: open_checkpoint(saved, c))
        assert {e.code for e in errors} == {"D0706"}
        flip(path, offset, 0)


def test_every_byte_belongs_to_some_rank(saved):
    from distrib.checkpoint.format import checked_bytes
    from distrib.checkpoint.opening import portion

    manifest = inspect(saved)
    for world_size in (1, 2, 3, 50):
        found = [extent for rank in range(world_size) for extent in portion(manifest, rank, world_size)]
        assert found == list(checked_bytes(manifest))


def test_a_truncated_file_is_named_with_both_sizes(saved):
    for path in files_of(saved)[:-1]:
        data = path.read_bytes()
        missing = 2 if path.name == "manifest.json" else 1  # its last byte is only a line's end
        path.write_bytes(data[:-missing])
        error = refusal(saved)
        if path.name != "manifest.json":
            assert error.code == "D0705"
            assert f"is {len(data) - missing} bytes long; expected {len(data)}" in error.problem
        assert error.where == str(path)
        path.write_bytes(data)


def test_sizes_are_checked_even_without_verification(saved):
    path = saved / "model/rank-00000.safetensors"
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(saved, ALONE, verify=False)
    assert caught.value.code == "D0705"


def test_checksums_are_left_out_on_request(saved):
    flip(saved / "model/rank-00000.safetensors", 300, 0)
    state = state_of(zeros_like(sample()))
    with open_checkpoint(saved, ALONE, verify=False) as reader:
        reader.fill(state)
    assert values(state)["model/weight"].any()


def test_a_missing_file_is_named(saved):
    for path in files_of(saved):
        path.rename(saved.parent / "away")
        error = refusal(saved)
        assert error.code == ("D0701" if path.name == "manifest.json" else "D0704")
        assert error.where in (str(path), str(saved))
        (saved.parent / "away").rename(path)


def test_all_damaged_files_are_listed(saved):
    for path in files_of(saved):
        if path.suffix == ".safetensors":
            path.unlink()
    error = refusal(saved)
    assert f"{saved}/model/rank-00000.safetensors: is missing" in error.problem
    assert f"{saved}/optimizer/rank-00000.safetensors: is missing" in error.problem


@pytest.mark.parametrize("kind", ["nothing", "file", "empty directory", "model files only", "other manifest"])
def test_what_is_no_checkpoint_is_said_to_be_none(tmp_path, kind):
    path = tmp_path / "c"
    if kind == "file":
        path.write_text("x")
    elif kind != "nothing":
        path.mkdir()
    if kind == "model files only":
        (path / "model.safetensors").write_bytes(b"x")
    if kind == "other manifest":
        (path / "manifest.json").write_text('{"name": "a browser extension"}')
    error = refusal(path)
    assert error.code == "D0701"
    assert error.fix


@pytest.mark.parametrize(
    ("version", "fix"), [(2, "upgrade distrib"), (0, "another"), ("1", "another"), (True, "another")]
)
def test_another_format_version_says_what_to_do(saved, version, fix):
    document = json.loads((saved / "manifest.json").read_text())
    document["version"] = version
    (saved / "manifest.json").write_text(json.dumps(document))
    error = refusal(saved)
    assert error.code == "D0703"
    assert f"version {version!r}" in error.problem
    assert fix in error.fix


# Malicious


def forge(saved, change):
    """Change the body of a manifest and give it a right checksum."""
    document = json.loads((saved / "manifest.json").read_text())
    change(document["body"])
    document["xxh3"] = checksum(canonical_json(document["body"]))
    (saved / "manifest.json").write_text(json.dumps(document))


WEIGHT, MODEL = "model/weight", "model/rank-00000.safetensors"


def set_slice(key, value):
    def change(body):
        body["tensors"][WEIGHT]["slices"][0][key] = value

    return change


def rename_file(name):
    def change(body):
        body["files"][name] = body["files"].pop(MODEL)
        for tensor in body["tensors"].values():
            for part in tensor["slices"]:
                part["file"] = name if part["file"] == MODEL else part["file"]

    return change


def set_in(*path, value):
    def change(body):
        for key in path[:-1]:
            body = body[key]
        body[path[-1]] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        rename_file("../victim"),
        rename_file("/etc/passwd"),
        rename_file("model/../../victim"),
        rename_file(".hidden"),
        rename_file("a/b/../../../victim"),
        rename_file("a/.b/c"),
        rename_file("a//c"),
        rename_file("a/b/c/d/e/f/g/h/i/j"),
        rename_file("model/"),
        rename_file("model/x\n"),
        set_slice("offset", 10**18),
        set_slice("offset", 0),
        set_slice("offset", -1),
        set_slice("offset", True),
        set_slice("offset", 1.5),
        set_slice("file", "model/other"),
        set_slice("file", None),
        set_slice("size", [10**9, 10**9]),
        set_slice("start", [7, 0]),
        set_slice("start", [0]),
        set_slice("interval", [5, 2]),
        set_slice("xxh3", 3),
        set_in("tensors", WEIGHT, "shape", value=[10**18]),
        set_in("tensors", WEIGHT, "shape", value=[1] * 65),
        set_in("tensors", WEIGHT, "dtype", value="object"),
        set_in("tensors", WEIGHT, "dtype", value=["F32"]),
        set_in("tensors", WEIGHT, "slices", value=[]),
        set_in("tensors", WEIGHT, value=[]),
        set_in("files", MODEL, "hashed", value=10**18),
        set_in("files", MODEL, "size", value=-1),
        set_in("files", MODEL, value=None),
        set_in("files", value=[]),
        set_in("aliases", value={"model/x": "model/nowhere"}),
        set_in("aliases", value={"model/x": [1]}),
        set_in("aliases", value={WEIGHT: "model/bias"}),
        set_in("world_size", value=0),
        set_in("counters", value=3),
        lambda body: body["tensors"].pop(WEIGHT),
        lambda body: body.pop("tensors"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(saved, change):
    forge(saved, change)
    error = refusal(saved)
    assert error.code == "D0707"
    assert error.where == f"{saved}/manifest.json"


def test_a_manifest_that_promises_huge_files_is_refused_by_their_sizes(saved):
    forge(saved, set_in("files", "loaders.json", value={"size": 10**18, "hashed": 10**18, "xxh3": "0"}))
    assert refusal(saved).code == "D0705"


def test_a_large_file_in_place_of_a_document_is_not_read(saved):
    with (saved / "manifest.json").open("wb") as file:
        file.truncate(2**40)
    error = refusal(saved)
    assert error.code == "D0707"
    assert "1099511627776 bytes" in error.problem


@pytest.mark.parametrize("name", ["manifest.json", "objects.json", MODEL, "model"])
def test_links_within_a_checkpoint_are_not_followed(saved, name):
    (saved / name).rename(saved.parent / "elsewhere")
    (saved / name).symlink_to(saved.parent / "elsewhere")
    error = refusal(saved)
    assert error.code == "D0707"
    assert "symbolic link" in error.problem


def test_a_link_to_a_checkpoint_is_the_users_own_and_followed(saved):
    (saved.parent / "best").symlink_to(saved)
    verify(saved.parent / "best")


@pytest.mark.parametrize("name", ["manifest.json", "objects.json"])
def test_a_pipe_does_not_block(saved, name):
    (saved / name).unlink()
    os.mkfifo(saved / name)
    assert refusal(saved).problem == "is not a regular file"


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize(
    "name", ["manifest.json", "objects.json", "custom/objects.json", MODEL, "rng/rank-00000.json"]
)
def test_a_pickle_in_any_place_is_refused_and_never_run(saved, name, monkeypatch):
    monkeypatch.chdir(saved.parent)
    (saved / name).write_bytes(pickle.dumps(Bomb()))
    assert refusal(saved).where == str(saved / name)
    assert not (saved.parent / "exploded").exists()


def test_a_read_error_in_the_middle_of_a_load_says_what_it_left(tmp_path, monkeypatch):
    save(tmp_path / "c", contents(sample()), ALONE)

    def fail(*_):
        raise OSError(5, "Input/output error")

    with open_checkpoint(tmp_path / "c", ALONE) as reader:
        monkeypatch.setattr(reading.os, "preadv", fail)
        with pytest.raises(CheckpointError) as caught:
            reader.fill(state_of(zeros_like(sample())))
    assert caught.value.code == "D0715"
    assert "may be partly overwritten" in caught.value.problem


def test_an_opened_checkpoint_survives_being_replaced_while_it_is_read(tmp_path):
    save(tmp_path / "c", contents(sample()), ALONE)
    with open_checkpoint(tmp_path / "c", ALONE) as reader:
        save(tmp_path / "c", contents(sample(1)), ALONE)
        with pytest.raises(CheckpointError) as caught:
            reader.fill(state_of(zeros_like(sample())))
    assert caught.value.code == "D0704"  # the one it opened is gone; the two are never mixed
