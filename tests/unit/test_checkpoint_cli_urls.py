"""`distrib checkpoint` on URLs: memory for an object store, local:// for a file system with folders, file:// for a path."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from distrib.checkpoint import Location, inspect, locate, save
from distrib.checkpoint.fetch import fetched
from distrib.checkpoint.inventory import inventory
from distrib.checkpoint.store import Store
from distrib.errors import CheckpointError
from tests.unit.checkpointing import ALONE, called, contents

TENSORS = {"model/w": torch.arange(6.0).reshape(2, 3), "optimizer/exp_avg.w": torch.zeros(2, 3)}


@pytest.fixture(params=["memory", "local", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.chdir(tmp_path)
    yield "memory://cli/run" if request.param == "memory" else f"{request.param}://{tmp_path}/run"
    fsspec.filesystem("memory").store.clear()


def saved(url: str, step: int = 1, tensors: dict[str, torch.Tensor] | None = None) -> Location:
    info = {"strategy": "Single", "config": {"seed": step}}
    return save(url, contents(tensors or TENSORS, counters={"step": step}, info=info), ALONE)


def write(place: Location, name: str, data: bytes) -> None:
    if isinstance(place, Path):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(data)
    else:
        Store(place).put(name, data)


def remove(place: Location, name: str) -> None:
    (place / name).unlink() if isinstance(place, Path) else Store(place).remove(name)


def flip(place: Location) -> None:
    """Change one bit of the weights."""
    manifest = inspect(place)
    part = manifest.tensors["model/w"].slices[0]
    name = f"{manifest.folder}/{part.file}".lstrip("/")
    data = bytearray(
        (place / name).read_bytes() if isinstance(place, Path) else Store(place).get(name) or b""
    )
    data[part.offset] ^= 1
    write(place, name, bytes(data))


def test_complete_and_incomplete_ones_are_listed_as_in_a_directory(
    url: str, capfd: pytest.CaptureFixture[str]
) -> None:
    places = [saved(f"{url}/step-{step}", step) for step in (1, 2)]
    manifest = inspect(places[0])
    remove(places[0], f"{manifest.folder}/loaders.json".lstrip("/"))
    write(locate(f"{url}/step-3"), "files-0123456789ab/model/rank-00000.safetensors", b"half")
    write(locate(f"{url}/other"), "notes.txt", b"x")
    write(locate(url), "step-9", b"no folder")

    code, out, err = called(capfd, "ls", url)

    assert (code, err) == (0, "")
    head, *lines = [line.split() for line in out.splitlines()]
    found = {line[0]: line for line in lines}
    assert head[0] == "checkpoint"
    assert sorted(found) == ["step-1", "step-2", "step-3"]
    assert found["step-1"][-3:] == [f"{manifest.folder}/loaders.json".lstrip("/"), "is", "missing"]
    assert (found["step-2"][1], found["step-2"][-1]) == ("2", "complete")
    assert found["step-3"][1] == "3"
    assert "has no manifest.json, which is written last" in " ".join(found["step-3"])


def test_a_checkpoint_itself_is_listed_and_the_newest_stands_last(
    url: str, capfd: pytest.CaptureFixture[str]
) -> None:
    saved(f"{url}/step-10", 10)
    saved(f"{url}/step-9", 9)
    assert [line.split()[0] for line in called(capfd, "ls", f"{url}/step-9")[1].splitlines()[1:]] == [
        "step-9"
    ]
    assert [line.split()[0] for line in called(capfd, "ls", url)[1].splitlines()[1:]] == ["step-9", "step-10"]


def test_a_place_with_nothing_is_an_error_not_an_empty_list(
    url: str, capfd: pytest.CaptureFixture[str]
) -> None:
    for words in (
        ["ls", f"{url}/none"],
        ["prune", f"{url}/none", "--keep-last", "1"],
        ["show", f"{url}/none"],
    ):
        code, out, err = called(capfd, *words)
        assert (code, out, err[:12]) == (1, "", "error[D0701]")


def test_a_file_is_no_folder_of_checkpoints(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes").write_text("x")
    for words in (["ls"], ["prune", "--keep-last", "1"]):
        code, out, err = called(capfd, *words, (tmp_path / "notes").as_uri())
        assert (code, out, "D0701" in err, "is not a directory" in err) == (1, "", True, True)


def test_show_verify_and_diff_read_urls(url: str, capfd: pytest.CaptureFixture[str]) -> None:
    one = saved(f"{url}/step-1")
    saved(f"{url}/step-2", 1, TENSORS | {"model/w": torch.ones(2, 3)})
    saved("here", 1)

    code, out, _ = called(capfd, "show", f"{url}/step-1")
    assert (code, "model/w" in out, "  step " in out) == (0, True, True)
    code, out, _ = called(capfd, "show", "--json", f"{url}/step-1")
    assert (code, json.loads(out)["path"]) == (0, f"{url}/step-1")
    assert called(capfd, "verify", f"{url}/step-1") == (0, f"{url}/step-1: ok\n", "")
    assert called(capfd, "diff", f"{url}/step-1", "here")[0] == 0
    code, out, _ = called(capfd, "diff", f"{url}/step-1", f"{url}/step-2")
    assert (code, out) == (1, "values: model/w 5 of 6 differ, by at most 4\n")

    flip(one)
    code, out, err = called(capfd, "verify", f"{url}/step-1")
    assert (code, out, "D0706" in err, "'model/w'" in err) == (1, f"{url}/step-1: 1 damaged\n", True, True)


def test_a_url_is_exported_to_a_directory(
    url: str, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    saved(f"{url}/step-1")
    code, out, err = called(capfd, "export", f"{url}/step-1", "out")
    assert (code, out, err) == (0, f"{tmp_path / 'out'}\n", "")
    assert torch.equal(load_file("out/model.safetensors")["w"], TENSORS["model/w"])


def test_prune_removes_below_a_url(url: str, capfd: pytest.CaptureFixture[str]) -> None:
    for step in (1, 2, 3):
        saved(f"{url}/step-{step}", step)
    words = ["prune", url, "--keep-last", "1", "--keep-every", "2"]
    gone = str(locate(f"{url}/step-1"))
    assert called(capfd, *words, "--dry-run")[1].splitlines()[0] == f"would remove {gone}"
    assert called(capfd, *words)[:2] == (0, f"removed {gone}\nremoved 1 checkpoints\n")
    assert [x.path.name for x in inventory(url)] == ["step-2", "step-3"]


def test_a_file_at_a_url_is_converted(url: str, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.ones(2)}}, tmp_path / "a.pt")
    write(locate(url), "a.pt", (tmp_path / "a.pt").read_bytes())
    assert called(capfd, "convert", f"{url}/a.pt", "out", "--step", "3")[:2] == (
        0,
        "out: from torch.save, step 3\n",
    )
    assert inspect("out").tensors["model/w"].spec.shape == (2,)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_folder_at_a_url_is_converted_and_no_copy_is_left(
    url: str, capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dcp.save({"model": {"w": torch.ones(2)}}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    for file in (tmp_path / "dcp").iterdir():
        write(locate(f"{url}/old"), file.name, file.read_bytes())
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    code, out, err = called(capfd, "convert", f"{url}/old", "out", "--step", "3")
    assert (code, out.splitlines()[-1:], err) == (0, ["out: from torch.distributed.checkpoint, step 3"], "")
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_source_that_is_not_there_is_an_error(url: str, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, err = called(capfd, "convert", f"{url}/none", "out")
    assert (code, out, err[:12]) == (1, "", "error[D0721]")


@pytest.mark.parametrize("words", [["export", "a"], ["convert", "a.pt"]])
def test_a_store_as_target_is_refused_before_anything_is_read(
    words: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    code, out, err = called(capfd, *words, "memory://cli/out")
    assert (code, out, err[:12]) == (1, "", "error[D0741]")
    assert "is written to a directory" in err


def test_a_copy_has_every_byte_of_every_object(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distrib.checkpoint.fetch._PIECE", 7)
    files = {"a": b"", "b/c": b"1234567", "b/d/e": bytes(range(100))}
    for name, data in files.items():
        fsspec.filesystem("memory").pipe_file(f"/cli/old/{name}", data)
    told: list[tuple[int, int]] = []
    with fetched("memory://cli/old", lambda done, total: told.append((done, total))) as path:
        found = {x.relative_to(path).as_posix(): x.read_bytes() for x in path.rglob("*") if x.is_file()}
    assert (path.name, found, told[-1]) == ("old", files, (107, 107))
    assert not path.exists()
    fsspec.filesystem("memory").store.clear()


def test_a_copy_that_does_not_fit_on_the_disk_is_refused_before_it_begins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fsspec.filesystem("memory").pipe_file("/cli/big.pt", b"x" * 100)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 99}))
    with pytest.raises(CheckpointError, match=r"D0713(.|\n)*TMPDIR"), fetched("memory://cli/big.pt"):
        pass
    fsspec.filesystem("memory").store.clear()
