"""Checkpoints and directories made by somebody who means harm: refused in little time and memory, nothing run or written."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import io
import json
import pickle
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from distrib import Accelerator
from distrib.checkpoint import Contents, inspect, latest, open_checkpoint, retain, rng, save, verify
from distrib.checkpoint.convert import convert
from distrib.checkpoint.format import canonical_json, checksum
from distrib.errors import CheckpointError
from tests.unit.checkpointing import ALONE, NoExchange, sample, state_of, values, zeros_like

LIMIT_S, LIMIT_BYTES = 5.0, 200 * 2**20
MODEL, OPTIMIZER = "model/rank-00000.safetensors", "optimizer/rank-00000.safetensors"
WEIGHT = "model/weight"


def memory(key: str) -> int:
    """A figure of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(key)


@contextmanager
def cheaply() -> Iterator[None]:
    """What is done inside takes at most 5 s of this process, as on a quiet machine, and 200 MB more than there was."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is measured from here: proc(5)
    before, start = memory("VmRSS"), time.process_time()
    yield
    assert time.process_time() - start < LIMIT_S
    assert memory("VmHWM") - before < LIMIT_BYTES


def checkpoint(path: Path, seed: int = 0) -> Path:
    everything = Contents(
        state_of(sample(seed)), rng=rng.capture(), custom=[{"ema": torch.randn(5000)}], counters={"step": 3}
    )
    return save(path, everything, ALONE, durable=False)


@pytest.fixture
def saved(tmp_path):
    return checkpoint(tmp_path / "step-3")


def loaded(path: Path) -> dict[str, torch.Tensor]:
    state = state_of(zeros_like(sample()))
    with open_checkpoint(path, ALONE) as reader:
        reader.check(state)
        reader.fill(state)
    return values(state)


def refusal(path: Path) -> CheckpointError:
    """The error of a load, after less than 5 s and 200 MB; `latest` must not fail in another way, nor cost more."""
    with cheaply(), pytest.raises(CheckpointError) as caught:
        loaded(path)
    with cheaply():
        latest(path.parent)
    return caught.value


class Bomb:
    """Runs code when it is unpickled."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


# Pickles

PEERS_PICKLES = (
    ["pytorch_model.bin", "model.bin", "optimizer.bin", "optimizer_1.bin", "scheduler.bin", "scaler.pt"]
    + ["sampler.bin", "dl_state_dict.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl", ".metadata"]
    + [
        "__0_0.distcp",
        "pytorch_model_fsdp_0/.metadata",
        "optimizer_0/.metadata",
        "optimizer.pt",
        "scheduler.pt",
    ]
    + [
        "training_args.bin",
        "rng_state.pth",
        "trainer_state.pt",
        "mp_rank_00_model_states.pt",
        "checkpoint.pt",
    ]
    + ["global_step3/mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt", "latest.pkl"]
    + ["model/rank-00000.bin", "rng/rank-00000.pkl", "custom/objects.pkl", "optimizer/rank-00000.pt"]
)


def test_pickles_in_every_place_where_a_peer_loads_one_are_not_opened_by_a_load(tmp_path):
    """Whatever lies beside the files of the manifest is ignored or refused, never run."""
    accelerator = Accelerator(cpu=True, project_dir=tmp_path, seed=0)
    model = accelerator.prepare(torch.nn.Linear(3, 2))
    path = accelerator.save_state(tmp_path / "checkpoints/step-00000001").path
    for name in PEERS_PICKLES:
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with torch.no_grad():
        model.weight.zero_()
    verify(path)
    assert accelerator.load_state() == path
    assert model.weight.any()
    assert not (tmp_path / "ran").exists()


def of_a_peer(path: Path) -> Path:
    """What Accelerate writes for one process."""
    path.mkdir()
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file(model.state_dict(), path / "model.safetensors")
    torch.save(optimizer.state_dict(), path / "optimizer.bin")
    torch.save({"last_epoch": 1, "_step_count": 2}, path / "scheduler.bin")
    torch.save({"scale": 1.0, "_growth_tracker": 0}, path / "scaler.pt")
    return path


@pytest.mark.parametrize(
    "archive", [pytest.param(True, marks=pytest.mark.slow), False], ids=["torch-save", "bare-pickle"]
)
@pytest.mark.parametrize("name", PEERS_PICKLES)
def test_no_pickle_of_a_peer_is_run_by_a_conversion(tmp_path, name, archive):
    path = of_a_peer(tmp_path / "peer")
    if name in ("pytorch_model.bin", "model.bin"):
        (path / "model.safetensors").unlink()
    (path / name).parent.mkdir(exist_ok=True)
    bomb = Bomb(tmp_path / "ran")
    if archive:
        file = io.BytesIO()
        torch.save(bomb, file)
        (path / name).write_bytes(file.getvalue())
    else:
        (path / name).write_bytes(pickle.dumps(bomb))
    with contextlib.suppress(CheckpointError):
        convert(path, tmp_path / "converted")
        verify(tmp_path / "converted")
    assert not (tmp_path / "ran").exists()


# Files of tensors


def tensor_file(head: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(head) if length is None else length) + head + data


def entry(start: int, stop: int, shape: list[int] | None = None, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape or [(stop - start) // 4], "data_offsets": [start, stop]}


def heads(**tensors: object) -> bytes:
    return json.dumps(tensors).encode()


MANY = "header of many tensors"
BAD_FILES: dict[str, Callable[[], bytes]] = {
    "overlapping": lambda: tensor_file(heads(a=entry(0, 8), b=entry(4, 12)), bytes(12)),
    "the same bytes twice": lambda: tensor_file(heads(a=entry(0, 8), b=entry(0, 8)), bytes(8)),
    "beyond the end": lambda: tensor_file(heads(a=entry(0, 4096)), bytes(8)),
    "negative": lambda: tensor_file(heads(a=entry(-8, 0, [2])), bytes(8)),
    "backwards": lambda: tensor_file(heads(a=entry(8, 0, [2])), bytes(8)),
    "absurd": lambda: tensor_file(heads(a=entry(0, 4 * 10**17, [10**17])), bytes(8)),
    "overflowing shape": lambda: tensor_file(heads(a=entry(0, 8, [2**62, 2**62, 4])), bytes(8)),
    "shape that does not fit": lambda: tensor_file(heads(a=entry(0, 8, [3])), bytes(8)),
    "unknown type": lambda: tensor_file(heads(a=entry(0, 8, [1], "O")), bytes(8)),
    "header of 2^63 bytes": lambda: tensor_file(b"{}", length=2**63),
    "header longer than the file": lambda: tensor_file(b"{}", length=10**12),
    "header of 100 MB": lambda: tensor_file(b'{"a":"' + b"x" * 100_000_000 + b'"}'),
    MANY: lambda: tensor_file(
        b"{"
        + b",".join(b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(1_500_000))
        + b"}"
    ),
    "nested": lambda: tensor_file(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "duplicate keys": lambda: tensor_file(
        b'{"a":%s,"a":%s}' % (json.dumps(entry(0, 8)).encode(), json.dumps(entry(8, 16)).encode()), bytes(16)
    ),
    "not JSON": lambda: tensor_file(b"\x80\x04\x95"),
    "empty": bytes,
    "a pickle": lambda: pickle.dumps({"a": 1}),
}


@pytest.mark.parametrize(
    "kind", [kind for kind in BAD_FILES if kind != MANY]
)  # which is not wrong, only long
def test_a_bad_file_of_tensors_is_refused_by_a_conversion_at_little_cost(tmp_path, kind):
    """F32."""
    path = tmp_path / "weights" / "model.safetensors"
    path.parent.mkdir()
    path.write_bytes(BAD_FILES[kind]())
    for source in (path, path.parent):
        with cheaply(), pytest.raises(CheckpointError) as caught:
            convert(source, tmp_path / "converted")
        assert str(path.parent) in str(caught.value)
        assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_file_of_tensors_in_a_checkpoint_is_refused_at_little_cost(saved, kind):
    """F32: also if the manifest has been given the right size and checksums of it."""
    data = BAD_FILES[kind]()
    (saved / MODEL).write_bytes(data)
    assert refusal(saved).where.startswith(str(saved))
    hashed = len(data)
    forge(saved, lambda body: body["files"][MODEL].update(size=hashed, hashed=hashed, xxh3=checksum(data)))
    assert refusal(saved).where.startswith(str(saved))


# Manifests


def forge(path: Path, change: Callable[[dict], object]) -> None:
    """Change the body of a manifest and give it a right checksum."""
    document = json.loads((path / "manifest.json").read_text())
    change(document["body"])
    document["xxh3"] = checksum(canonical_json(document["body"]))
    (path / "manifest.json").write_text(json.dumps(document))


def many_files(count: int) -> Callable[[dict], None]:
    record = {"size": 0, "hashed": 0, "xxh3": "2d06800538d394c2"}
    return lambda body: body["files"].update({f"custom/{i}": record for i in range(count)})


def many_slices(count: int) -> Callable[[dict], None]:
    def change(body):
        body["tensors"][WEIGHT]["slices"] *= count

    return change


def many_tensors(count: int) -> Callable[[dict], None]:
    def change(body):
        body["tensors"].update({f"model/x{i}": body["tensors"][WEIGHT] for i in range(count)})

    return change


def huge_file(body: dict) -> None:
    body["files"][MODEL]["size"] = body["files"][MODEL]["hashed"] = 10**18


def huge_tensor(body: dict) -> None:
    record = body["tensors"]["model/empty"]
    record["shape"] = [10**9, 10**9]
    record["slices"] = [{**body["tensors"][WEIGHT]["slices"][0], "start": [0, 0], "size": [10**9, 10**9]}]


ABSURD = {
    "a file of 10^18 bytes": huge_file,
    "a tensor of 10^18 elements": huge_tensor,
    "10^4 slices of one tensor": many_slices(10**4),
    "10^5 slices of one tensor": many_slices(10**5),
    "10^4 tensors at one place": many_tensors(10**4),
    "10^5 tensors at one place": many_tensors(10**5),
    "10^4 files": many_files(10**4),
    "2 x 10^5 files": many_files(2 * 10**5),
    "10^6 files": many_files(10**6),
}


def marks_of(kind: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow] if "10^5" in kind or "10^6" in kind else []


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=marks_of(kind)) for kind in ABSURD])
def test_a_manifest_with_absurd_numbers_is_refused_at_little_cost(saved, kind):
    """F32."""
    forge(saved, ABSURD[kind])
    assert refusal(saved).where.startswith(str(saved))


def test_a_number_of_thousands_of_digits_is_refused(saved):
    text = (saved / "manifest.json").read_text()
    (saved / "manifest.json").write_text(text.replace('"step":3', '"step":' + "9" * 5000))
    assert refusal(saved).where == f"{saved}/manifest.json"


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "Infinity"])
def test_a_number_that_is_none_is_refused_and_older_checkpoints_are_found(saved, number):
    text = (saved / "manifest.json").read_text()
    (saved / "manifest.json").write_text(text.replace('"step":3', f'"step":{number}'))
    assert refusal(saved).where == f"{saved}/manifest.json"
    older = checkpoint(saved.parent / "step-1")
    saved.rename(saved.parent / "step-2")
    assert latest(saved.parent) == older


DOCUMENTS = {
    "deep lists": lambda: "[" * 10**6,
    "deep objects": lambda: '{"a":' * 10**5,
    "a long text": lambda: '"' + "x" * (63 << 20) + '"',
    "many numbers": lambda: "[" + "1," * (31 << 20) + "1]",
    "many lists": lambda: "[" + "[]," * (20 << 20) + "1]",
}
in_documents = pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=pytest.mark.slow if "many" in kind else ()) for kind in DOCUMENTS],
)


@in_documents
def test_an_oversized_or_deep_manifest_is_refused_at_little_cost(saved, kind):
    """F32."""
    (saved / "manifest.json").write_text(DOCUMENTS[kind]())
    assert refusal(saved).where == f"{saved}/manifest.json"


@in_documents
def test_an_oversized_or_deep_document_with_the_right_checksum_costs_little(saved, kind):
    """F32."""
    data = DOCUMENTS[kind]().encode()
    for name in ("objects.json", "custom/objects.json", "rng/rank-00000.json"):
        (saved / name).write_bytes(data)
        record = {"size": len(data), "hashed": len(data), "xxh3": checksum(data)}
        forge(saved, lambda body, name=name, record=record: body["files"].update({name: record}))
    with open_checkpoint(saved, ALONE) as reader:
        for read in (lambda: reader.objects, lambda: reader.custom, lambda: reader.rng(0)):
            with cheaply(), contextlib.suppress(CheckpointError):
                read()


# What lies where something is written

VICTIM = b"somebody else's"


@pytest.fixture
def victim(tmp_path):
    folder = tmp_path / "victim"
    folder.mkdir()
    (folder / "file").write_bytes(VICTIM)
    yield folder / "file"
    assert folder.is_dir()
    assert [(path.name, path.read_bytes()) for path in folder.iterdir()] == [("file", VICTIM)]


def link(path: Path, target: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(target)


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two-renames"])
@pytest.mark.parametrize(
    "name",
    [MODEL, OPTIMIZER, "optimizer.bin", "objects.json", "manifest.json", "model", "rng", "custom", "mine"],
)
def test_a_save_over_a_checkpoint_with_links_in_it_follows_none(saved, victim, name, exchange):
    """F31: `optimizer.bin -> /victim` in the target."""
    is_folder = name in ("model", "rng", "custom")
    link(saved / name, victim.parent if is_folder else victim)
    try:
        save(saved, Contents(state_of(sample(1))), ALONE, storage=None if exchange else NoExchange())
    except CheckpointError as error:
        assert error.code in ("D0707", "D0711")  # noqa: PT017
    else:
        assert torch.equal(loaded(saved)[WEIGHT], sample(1)[WEIGHT])
        assert not any(path.is_symlink() for path in saved.rglob("*"))


@pytest.mark.parametrize("name", [".step-3.lock", ".step-3.tmp-0123456789ab", ".step-3.old-0123456789ab"])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_hidden_names_that_are_links_are_not_followed_by_a_save(saved, victim, name, kind):
    """F31: somebody has guessed the names of temporary files and locks."""
    link(saved.parent / name, victim if kind == "file" else victim.parent)
    expected = 0
    with contextlib.suppress(CheckpointError):
        save(saved, Contents(state_of(sample(1))), ALONE)
        expected = 1
    assert torch.equal(loaded(saved)[WEIGHT], sample(expected)[WEIGHT])


@pytest.mark.parametrize("kind", ["whole", "manifest", "folder", "file"])
def test_a_rotation_removes_nothing_behind_a_link(tmp_path, victim, kind):
    for step in (1, 2, 3):
        checkpoint(tmp_path / f"step-{step}")
    old = tmp_path / "step-1"
    if kind == "whole":
        shutil.copytree(tmp_path / "step-2", tmp_path / "elsewhere")
        link(old, tmp_path / "elsewhere")
    elif kind == "manifest":
        shutil.copy(old / "manifest.json", tmp_path / "elsewhere")
        link(old / "manifest.json", tmp_path / "elsewhere")
    else:
        link(old / ("model" if kind == "folder" else MODEL), victim.parent if kind == "folder" else victim)
    retain(tmp_path, 1)
    verify(tmp_path / "step-3")
    assert not (tmp_path / "step-2").exists()
    if kind == "whole":
        verify(tmp_path / "elsewhere")
    if kind == "manifest":
        assert (tmp_path / "elsewhere").is_file()


@pytest.mark.parametrize(
    "name", ["../victim/file", "/victim/file", "model/../../victim/file", "..", "model/../..", "model\0"]
)
def test_a_manifest_whose_names_lead_outside_is_refused_and_saving_over_it_writes_nothing_there(
    saved, victim, name
):
    """F31."""
    record = {"size": len(VICTIM), "hashed": len(VICTIM), "xxh3": checksum(VICTIM)}
    forge(saved, lambda body: body["files"].update({name: record}))
    assert refusal(saved).code == "D0707"
    with pytest.raises(CheckpointError, match="D0707"):
        inspect(saved)
    try:
        save(saved, Contents(state_of(sample(1))), ALONE)
        retain(saved.parent, 1)
    except CheckpointError as error:
        assert error.code in ("D0707", "D0711")  # noqa: PT017


@pytest.mark.parametrize(
    "name", ["model.safetensors", "model.safetensors.index.json", "config.json", "tokenizer"]
)
def test_an_export_into_a_directory_with_links_follows_none(tmp_path, victim, name):
    accelerator = Accelerator(cpu=True, seed=0)
    model = accelerator.prepare(torch.nn.Linear(3, 2))
    (tmp_path / "out").mkdir()
    link(tmp_path / "out" / name, victim)
    accelerator.save_model(model, tmp_path / "out")
    assert not (tmp_path / "out/model.safetensors").is_symlink()


def test_the_index_of_sharded_weights_cannot_lead_outside(tmp_path, victim):
    source = tmp_path / "hf"
    source.mkdir()
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file({"w": torch.ones(2)}, tmp_path / "outside.safetensors")
    for name in ("../outside.safetensors", str(tmp_path / "outside.safetensors"), "link.safetensors"):
        (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
        link(source / "link.safetensors", tmp_path / "outside.safetensors")
        if name == "link.safetensors":
            continue  # a link in a directory of another program is that program's own: Hugging Face's cache is made of them
        with pytest.raises(CheckpointError):
            convert(source, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()
