"""Checkpoints in object stores: the old one or the new one is there at every instant, and nothing else is read."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
import torch

from distrib.checkpoint import (
    begin,
    inspect,
    latest,
    lease,
    open_checkpoint,
    opening,
    retain,
    save,
    store,
    verify,
    writer,
)
from distrib.checkpoint.lease import Lease, Owner, Times
from distrib.checkpoint.location import Url, locate, locate_below
from distrib.checkpoint.staging import Arena
from distrib.checkpoint.store import Store
from distrib.errors import CheckpointError
from tests.unit.bucket import Bucket, Service
from tests.unit.checkpointing import (
    ALONE,
    contents,
    on_ranks,
    rows,
    sample,
    sharded,
    state_of,
    values,
    zeros_like,
)

TARGET = "bucket://b/run/step-1"
SHORT = Times(beat=60.0, lease=0.05, watch=0.01)
ELSEWHERE = Owner("0123456789ab", "elsewhere", "pid:[1]", 1, 0, 1e12)  # not to be forgotten for long


@pytest.fixture(autouse=True)
def service(monkeypatch):
    found = Service()
    monkeypatch.setattr(Bucket, "service", found)
    monkeypatch.setattr(store, "_KEYS", store._KEYS | {"bucket"})
    monkeypatch.setattr(lease, "TIMES", SHORT)
    fsspec.register_implementation("bucket", Bucket, clobber=True)
    return found


@pytest.fixture(params=["bucket", "memory", "local"])
def url(request, tmp_path):
    """A place for checkpoints in each kind of file system."""
    if request.param == "local":
        yield f"local://{tmp_path}/run"
        return
    yield f"{request.param}://b/run"
    fsspec.filesystem("memory").store.clear()


def loaded(place, like=None, **options):
    """The tensors of a checkpoint."""
    state = state_of(zeros_like(like or sample()))
    with open_checkpoint(place, ALONE, **options) as opened:
        opened.check(state)
        opened.fill(state)
    return values(state)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_what_was_saved_comes_back(url):
    path = save(
        f"{url}/step-1", contents(sample(), rng={"a": 1}, counters={"step": 7}, custom=[{"x": 2}]), ALONE
    )
    assert str(path) == f"{url}/step-1"
    assert same(loaded(path), sample())
    with open_checkpoint(path, ALONE) as opened:
        assert (opened.counters["step"], opened.custom, opened.rng(0)) == (7, [{"x": 2}], {"a": 1})
    verify(path)


def test_a_newer_checkpoint_replaces_the_older_and_leaves_nothing_of_it(url):
    for seed in (1, 2):
        path = save(f"{url}/step-1", contents(sample(seed)), ALONE)
    assert same(loaded(path), sample(2))
    assert Store(path).names() == sorted([inspect(path).folder, "manifest.json"])
    assert Store(path.parent).names() == ["step-1"]


def test_a_file_url_is_a_path(tmp_path):
    path = save((tmp_path / "a b").as_uri(), contents(sample()), ALONE)
    assert path == tmp_path / "a b"
    assert same(loaded(path), sample())


def test_a_local_save_does_not_import_fsspec(tmp_path):
    script = (
        "import sys; from tests.unit.checkpointing import *; from distrib.checkpoint import save, open_checkpoint\n"
        "import torch; before = 'fsspec' in sys.modules; save(sys.argv[1], contents(sample()), ALONE)\n"
        "open_checkpoint(sys.argv[1], ALONE).close(); print(before, 'fsspec' in sys.modules)"
    )
    found = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "c")],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert found.stdout.split() == ["False", "False"], found.stderr


def number_of_requests(service, seed):
    service.inject()
    save(TARGET, contents(sample(seed)), ALONE)
    return len(service.requests)


@pytest.mark.parametrize("lost", [False, True], ids=["refused", "answer-lost"])
@pytest.mark.parametrize("stuck", [False, True], ids=["one-failure", "all-fail-after"])
def test_whichever_request_fails_a_whole_checkpoint_is_there(service, monkeypatch, stuck, lost):
    monkeypatch.setattr(store, "_PART", 64)  # so that each file takes several parts
    save(TARGET, contents(sample(0)), ALONE)
    nth, before, outcomes, done = 0, 0, set(), False
    while not done:
        nth += 1
        service.inject(nth, stuck=stuck, lost=lost)
        try:
            save(TARGET, contents(sample(nth)), ALONE)
            possible = {nth}
        except CheckpointError:
            possible = {before, nth} if lost or stuck else {before}
        done = len(service.requests) < nth
        service.inject()
        found = loaded(TARGET)
        (before,) = [seed for seed in possible if same(found, sample(seed))]
        outcomes.add(possible == {nth} and not done)
    assert nth > 40
    assert outcomes == {False, True}  # tidying up may fail without failing the save
    path = save(TARGET, contents(sample(-1)), ALONE)
    assert Store(path).names() == sorted([inspect(path).folder, "manifest.json"])
    assert Store(path.parent).names() == ["step-1"]


@pytest.mark.parametrize("lost", [False, True], ids=["refused", "answer-lost"])
def test_whichever_request_of_a_first_save_fails_nothing_or_all_is_there(service, lost):
    total = number_of_requests(service, 0)
    for nth in range(1, total + 1):
        target = f"bucket://b/{nth}/step-1"
        service.inject(nth, stuck=True, lost=lost)
        try:
            save(target, contents(sample(nth)), ALONE)
            saved = True
        except CheckpointError:
            saved = False
        service.inject()
        newest = latest(f"bucket://b/{nth}")
        assert newest is not None or not saved
        assert newest is None or same(loaded(newest), sample(nth))


def test_whichever_request_of_a_retention_fails_the_newest_stays_and_no_half_one_is_shown(service):
    for nth in range(1, 60):
        for step in (1, 2, 3):
            save(f"bucket://b/run/step-{step}", contents(sample(step)), ALONE)
        service.inject(nth, stuck=True)
        with contextlib.suppress(CheckpointError):
            retain("bucket://b/run", 1)
        done = len(service.requests) < nth
        service.inject()
        assert str(latest("bucket://b/run")) == "bucket://b/run/step-3"
        for _, path in opening.numbered("bucket://b/run"):
            verify(path)
        if done:
            break
    assert done
    assert Store(locate("bucket://b/run")).names() == ["step-3"]


def test_a_failed_upload_is_given_up(service, monkeypatch):
    monkeypatch.setattr(store, "_PART", 64)
    service.inject()
    save(TARGET, contents(sample()), ALONE)
    parts = [at for at, (what, _) in enumerate(service.requests, 1) if what == "upload-part"]
    for nth in (parts[1], parts[-1]):
        service.inject(nth)
        with pytest.raises(CheckpointError, match=r"D0743.*upload-part"):
            save(TARGET, contents(sample()), ALONE)
        assert service.open_uploads == 0


def test_large_files_go_up_in_parts(service, monkeypatch):
    monkeypatch.setattr(store, "_PART", 2**20)
    big = {"model/w": torch.arange(2**20, dtype=torch.float32)}
    service.inject()
    save(TARGET, contents(big), ALONE)
    files = [key for what, key in service.requests if what == "upload-part" and key.endswith(".safetensors")]
    assert len(files) > 3
    assert same(loaded(TARGET, big), big)


def test_a_file_of_any_size_has_at_most_ten_thousand_parts(service, monkeypatch):
    sizes = []
    opened = Bucket._open

    def note(self, path, mode, block_size, **options):
        sizes.append(block_size)
        return opened(self, path, mode, block_size, **options)

    monkeypatch.setattr(Bucket, "_open", note)
    with (
        pytest.raises(CheckpointError, match="D0745"),
        Store(locate(TARGET)).writing("x", 10**12) as write,
    ):
        write(b"not so many")
    assert 10**12 / sizes[0] < 10_000


def test_many_small_tensors_are_read_in_few_requests(service):
    many = {f"model/{i}": torch.full((10,), float(i)) for i in range(300)}
    save(TARGET, contents(many), ALONE)
    service.inject()
    assert same(loaded(TARGET, many), many)
    assert len(service.requests) < 30


def test_a_large_tensor_is_read_in_ranges(service, monkeypatch):
    big = {"model/w": torch.randn(3 * 2**20)}
    save(TARGET, contents(big), ALONE)
    monkeypatch.setattr("distrib.checkpoint.objects.RANGE", 2**20)
    monkeypatch.setattr(store, "RANGE", 2**20)
    service.inject()
    assert same(loaded(TARGET, big, verify=False), big)
    assert sum(what == "get" and key.endswith(".safetensors") for what, key in service.requests) == 12


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (lambda data: data[:-1], "D0705"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "D0706"),
        (lambda data: bytes([data[0] ^ 1]) + data[1:], "D0706"),
        (lambda data: None, "D0704"),
    ],
    ids=["truncated", "flipped-bit", "flipped-bit-in-the-head", "missing"],
)
def test_a_damaged_object_is_named(service, damage, code):
    save(TARGET, contents(sample()), ALONE)
    (key,) = service.matching("*/model/*.safetensors")
    data = damage(service.objects.pop(key))
    if data is not None:
        service.objects[key] = data
    with pytest.raises(CheckpointError, match=code) as found:
        open_checkpoint(TARGET, ALONE)
    assert found.value.where == f"bucket://{key}"


def test_a_place_without_a_manifest_has_no_checkpoint(service):
    save(TARGET, contents(sample()), ALONE)
    del service.objects["b/run/step-1/manifest.json"]
    with pytest.raises(CheckpointError, match="D0701"):
        open_checkpoint(TARGET, ALONE)
    assert latest("bucket://b/run") is None


def test_the_newest_complete_one_is_found(url):
    assert latest(url) is None
    for step in (9, 10, 11):
        save(f"{url}/step-{step}", contents(sample(step)), ALONE)
    assert str(latest(url)) == f"{url}/step-11"
    newest = Store(locate(f"{url}/step-11"))
    newest.remove(next(name for name in newest.sizes() if name.endswith("loaders.json")))
    assert str(latest(url)) == f"{url}/step-10"


def test_a_store_that_does_not_answer_is_no_reason_to_take_an_older_one(service):
    for step in (1, 2):
        save(f"bucket://b/run/step-{step}", contents(sample(step)), ALONE)
    service.inject()
    latest("bucket://b/run")
    for nth in range(1, len(service.requests) + 1):
        service.inject(nth)
        with pytest.raises(CheckpointError, match="D0743"):
            latest("bucket://b/run")


def test_old_ones_are_removed_whole(url):
    for step in (1, 2, 3):
        save(f"{url}/step-{step}", contents(sample(step)), ALONE)
    Store(locate(url)).put("notes.txt", b"mine")
    assert [str(path) for path in retain(url, 1)] == [f"{url}/step-1", f"{url}/step-2"]
    assert Store(locate(url)).names() == ["notes.txt", "step-3"]
    verify(f"{url}/step-3")


def lock_of(service):
    return json.loads(service.objects["b/run/.step-1.lock"])


def put_lock(service, owner):
    service.objects["b/run/.step-1.lock"] = owner.dump()


def test_a_writer_that_shows_life_keeps_its_place(service):
    put_lock(service, ELSEWHERE)

    def beat(what, key):  # the owner writes again after every look of the other
        if what == "get" and key.endswith(".lock"):
            put_lock(service, replace(ELSEWHERE, beat=len(service.requests)))

    service.watcher = beat
    with pytest.raises(CheckpointError, match=r"D0712.*process 1 on host elsewhere"):
        save(TARGET, contents(sample()), ALONE)
    assert [*service.objects] == ["b/run/.step-1.lock"]


def test_a_writer_that_is_silent_loses_its_place(service):
    put_lock(service, ELSEWHERE)
    save(TARGET, contents(sample()), ALONE)
    assert same(loaded(TARGET), sample())
    assert service.matching("*.lock") == []


def test_a_writer_of_this_host_that_is_dead_loses_its_place_at_once(service, monkeypatch):
    monkeypatch.setattr(lease, "TIMES", Times())
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    put_lock(service, replace(Owner.me("0123456789ab"), pid=gone.pid))
    save(TARGET, contents(sample()), ALONE)
    assert same(loaded(TARGET), sample())


def test_a_writer_of_this_host_that_lives_is_watched(service):
    alive = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        owner = replace(Owner.me("0123456789ab"), pid=alive.pid)
        assert not owner.is_gone()
        assert not replace(owner, space="pid:[1]").is_gone()
    finally:
        alive.communicate(b"\n")
    assert owner.is_gone()
    assert owner.host == socket.gethostname()


def test_a_lock_that_is_no_lock_is_watched_and_then_taken(service):
    service.objects["b/run/.step-1.lock"] = b"{}"
    save(TARGET, contents(sample()), ALONE)
    assert same(loaded(TARGET), sample())


def test_stores_without_conditional_writes_lock_too(service):
    service.conditional = False
    save(TARGET, contents(sample()), ALONE)
    put_lock(service, ELSEWHERE)
    service.watcher = lambda what, key: (
        what == "get" and put_lock(service, replace(ELSEWHERE, beat=len(service.requests)))
    )
    with pytest.raises(CheckpointError, match="D0712"):
        save(TARGET, contents(sample()), ALONE)


def test_the_owner_of_a_lock_shows_life(service):
    beats, done = [], threading.Event()

    def note(what, key):
        if what == "put" and key.endswith(".lock"):
            beats.append(lock_of(service)["beat"])
            if len(beats) == 3:
                done.set()

    service.watcher = note
    held = Lease.take(Store(locate("bucket://b/run")), ".step-1.lock", "0123456789ab", Times(beat=0.001))
    assert done.wait(30)
    held.check()
    held.release()
    assert beats[:3] == [0, 1, 2]
    assert service.objects == {}


def test_a_writer_whose_lock_was_taken_shows_no_checkpoint(service):
    save(TARGET, contents(sample(1)), ALONE)
    saving = begin(TARGET, lambda: contents(sample(2)), ALONE)
    put_lock(service, ELSEWHERE)
    with pytest.raises(CheckpointError, match=r"D0744.*process 1 on host elsewhere has it"):
        saving.finish(ALONE)
    assert same(loaded(TARGET), sample(1))
    assert lock_of(service)["host"] == "elsewhere"


def test_of_two_writers_one_wins_and_nothing_is_mixed(service):
    slow = begin(TARGET, lambda: contents(sample(1)), ALONE)
    put_lock(
        service, replace(ELSEWHERE, id=lock_of(service)["id"])
    )  # as if `slow` were another, silent host's
    quick = begin(TARGET, lambda: contents(sample(2)), ALONE)
    with pytest.raises(CheckpointError, match="D0744"):
        slow.finish(ALONE)
    quick.finish(ALONE)
    assert same(loaded(TARGET), sample(2))
    assert service.matching("*.lock") == []
    assert len({key.split("/")[3] for key in service.matching("b/run/step-1/files-*")}) == 1


def test_a_lock_that_is_lost_while_files_are_written_shows_no_checkpoint(service):
    save(TARGET, contents(sample(1)), ALONE)
    service.watcher = lambda what, key: key.endswith("schedulers.json") and put_lock(service, ELSEWHERE)
    with pytest.raises(CheckpointError, match=r"D0744.*process 1 on host elsewhere has it"):
        save(TARGET, contents(sample(2)), ALONE)
    assert same(loaded(TARGET), sample(1))


def test_a_file_that_vanishes_while_others_are_written_shows_no_checkpoint(service):
    save(TARGET, contents(sample(1)), ALONE)

    def remove(what, key):
        if key.endswith("schedulers.json"):
            used = inspect(TARGET).folder
            for found in service.matching("*/model/*"):
                if used not in found:
                    del service.objects[found]

    service.watcher = lambda what, key: what == "complete-upload" and remove(what, key)
    with pytest.raises(CheckpointError, match=r"D0745.*the store has none"):
        save(TARGET, contents(sample(2)), ALONE)
    service.watcher = None
    assert same(loaded(TARGET), sample(1))


def test_what_a_dead_job_left_beside_is_removed_by_the_next_save(service):
    begin("bucket://b/run/step-1", lambda: contents(sample()), ALONE)._write()  # and dies
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    put_lock(
        service, replace(Owner(**{k: v for k, v in lock_of(service).items() if k != "format"}), pid=gone.pid)
    )
    assert service.matching("b/run/step-1/*")
    save("bucket://b/run/step-2", contents(sample()), ALONE)
    assert Store(locate("bucket://b/run")).names() == ["step-2"]


def test_what_a_live_job_of_another_host_has_beside_stays(service):
    save("bucket://b/run/step-1", contents(sample()), ALONE)
    service.objects["b/run/step-1/files-0123456789ab/x"] = b"being written"
    put_lock(service, ELSEWHERE)
    save("bucket://b/run/step-2", contents(sample()), ALONE)
    assert service.objects["b/run/step-1/files-0123456789ab/x"] == b"being written"
    verify("bucket://b/run/step-1")


def test_a_place_with_other_objects_is_refused_and_left_alone(url):
    Store(locate(f"{url}/step-1")).put("thesis.txt", b"mine")
    with pytest.raises(CheckpointError, match=r"D0711.*thesis\.txt"):
        save(f"{url}/step-1", contents(sample()), ALONE)
    assert Store(locate(url)).sizes() == {"step-1/thesis.txt": 4}


def test_a_checkpoint_that_was_copied_into_a_store_is_read_and_replaced(service, tmp_path):
    save(tmp_path / "c", contents(sample(1)), ALONE)
    for file in (tmp_path / "c").rglob("*.*"):
        service.objects[f"b/run/step-1/{file.relative_to(tmp_path / 'c')}"] = file.read_bytes()
    assert same(loaded(TARGET), sample(1))
    path = save(TARGET, contents(sample(2)), ALONE)
    assert Store(path).names() == sorted([inspect(path).folder, "manifest.json"])


def download(service, folder):
    for key, data in service.objects.items():
        file = folder / key.removeprefix("b/run/step-1/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)


def test_a_checkpoint_that_was_copied_out_of_a_store_is_read_and_replaced(service, tmp_path):
    save(TARGET, contents(sample(1)), ALONE)
    download(service, tmp_path / "c")
    assert same(loaded(tmp_path / "c"), sample(1))
    save(tmp_path / "c", contents(sample(2)), ALONE)
    assert same(loaded(tmp_path / "c"), sample(2))
    assert "files" not in " ".join(path.name for path in (tmp_path / "c").iterdir())


def test_a_link_in_place_of_the_folder_is_refused(service, tmp_path):
    save(TARGET, contents(sample(1)), ALONE)
    download(service, tmp_path / "c")
    folder = tmp_path / "c" / inspect(TARGET).folder
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="D0707"):
        open_checkpoint(tmp_path / "c", ALONE)


@pytest.mark.parametrize("folder", ["..", "/etc", "a/b", ".hidden"])
def test_a_manifest_whose_folder_leads_outside_is_refused(service, folder):
    save(TARGET, contents(sample()), ALONE)
    service.objects["b/run/step-1/manifest.json"] = opening.file_format.dump(
        replace(inspect(TARGET), folder=folder)
    )
    with pytest.raises(CheckpointError, match="D0707"):
        inspect(TARGET)


def test_manifests_of_directories_are_as_they_were(tmp_path):
    save(tmp_path / "c", contents(sample()), ALONE)
    assert b'"folder"' not in (tmp_path / "c" / "manifest.json").read_bytes()


def test_two_ranks_save_and_load_their_shares(url):
    full = {name: x for name, x in sample(3).items() if x.dim()}

    def run(ranks):
        state = sharded(full, ranks.rank, 2, rows)
        save(f"{url}/step-1", replace(contents({}), state=state, rng={"rank": ranks.rank}), ranks)
        blank = sharded(zeros_like(full), ranks.rank, 2, rows)
        with open_checkpoint(f"{url}/step-1", ranks) as opened:
            opened.fill(blank)
        return same(values(blank), values(state))

    assert on_ranks(2, run) == [True, True]
    assert same(loaded(f"{url}/step-1", full), full)


def test_a_failure_of_one_rank_is_one_of_all(service):
    save(TARGET, contents(sample(1)), ALONE)

    def refuse(what, key):
        if what == "complete-upload" and key.endswith("rng/rank-00001.json"):
            raise RuntimeError("out of luck")

    service.watcher = refuse

    def run(ranks):
        full = {name: x for name, x in sample(2).items() if x.dim()}
        save(TARGET, replace(contents({}), state=sharded(full, ranks.rank, 2, rows)), ranks)

    assert ["D0743" in str(x) and "out of luck" in str(x) for x in on_ranks(2, run)] == [True, True]
    service.watcher = None
    assert same(loaded(TARGET), sample(1))
    assert len(Store(locate(TARGET)).names()) == 2


def test_a_rank_that_sees_another_store_is_an_error_of_all(monkeypatch):
    monkeypatch.setattr(writer, "_VISIBLE_S", 0.0)
    monkeypatch.setattr("distrib.checkpoint.remote.RemoteDraft.is_visible", lambda self: False)
    with pytest.raises(CheckpointError, match="D0717"):
        save(TARGET, contents(sample()), ALONE)
    assert latest("bucket://b/run") is None


def test_ranks_wait_until_they_see_the_same_checkpoint(tmp_path, monkeypatch):
    old, new = (save(tmp_path / name, contents(sample(at)), ALONE) for at, name in enumerate(("old", "new")))
    late = {"looks": 0}
    really = opening.open_manifest

    def late_view(path):
        if threading.current_thread().name == "late":
            late["looks"] += 1
            return really(old if late["looks"] < 3 else new)
        return really(path)

    def run(ranks):
        threading.current_thread().name = "late" if ranks.rank else "main"
        with open_checkpoint(new, ranks) as opened:
            return opened.tensor("model/weight")

    monkeypatch.setattr(opening, "_LOOK_S", 0.0)
    monkeypatch.setattr(opening, "open_manifest", late_view)
    assert all(torch.equal(x, sample(1)["model/weight"]) for x in on_ranks(2, run))
    assert late["looks"] == 3


@pytest.mark.parametrize("sees", ["another", "none"])
def test_ranks_that_never_see_the_same_checkpoint_read_none(tmp_path, monkeypatch, sees):
    old, new = (save(tmp_path / name, contents(sample(at)), ALONE) for at, name in enumerate(("old", "new")))
    really = opening.open_manifest
    other = old if sees == "another" else tmp_path / "none"

    def wrong_view(path):
        return really(other if threading.current_thread().name == "wrong" else path)

    def run(ranks):
        threading.current_thread().name = "wrong" if ranks.rank else "main"
        open_checkpoint(new, ranks)

    monkeypatch.setattr(opening, "_SAME_S", 0.0)
    monkeypatch.setattr(opening, "open_manifest", wrong_view)
    assert ["D0717" in str(x) for x in on_ranks(2, run)] == [True, True]


def test_a_staged_save_writes_the_values_of_its_moment(url):
    tensors = sample(1)
    saving = begin(f"{url}/step-1", lambda: contents(tensors), ALONE, arena=Arena())
    for tensor in tensors.values():
        tensor.zero_()
    assert latest(url) is None
    assert str(saving.finish(ALONE)) == f"{url}/step-1"
    assert same(loaded(f"{url}/step-1"), sample(1))


@pytest.mark.parametrize(
    "text",
    [
        "s3://",
        "s3://bucket//x",
        "s3://bucket/../x",
        "s3://bucket/run/*",
        "simplecache::s3://bucket/x",
        "file://elsewhere/x",
        "sftp://me:secret@host/x",
    ],
)
def test_urls_that_cannot_be_those_of_checkpoints_are_refused(text):
    with pytest.raises(CheckpointError, match="D0741") as found:
        locate(text)
    assert "secret" not in str(found.value)


def test_a_url_that_pathlib_has_spoilt_is_refused():
    spoilt = Path("s3://bucket/x")
    with pytest.raises(CheckpointError, match="D0741"):
        locate(spoilt)
    with pytest.raises(CheckpointError, match="D0741"):
        locate_below(str(spoilt), "checkpoints")


def test_a_scheme_that_nobody_knows_is_refused():
    with pytest.raises(CheckpointError, match=r"D0741.*nope"):
        save("nope://bucket/x", contents(sample()), ALONE)


def test_a_bucket_is_no_place_for_a_checkpoint():
    with pytest.raises(CheckpointError, match="D0741"):
        save("bucket://b", contents(sample()), ALONE)


@pytest.mark.parametrize(
    ("base", "name", "expected"),
    [
        ("s3://b/run", "checkpoints", "s3://b/run/checkpoints"),
        ("s3://b/run/", "a/b", "s3://b/run/a/b"),
        ("/data", "checkpoints", "/data/checkpoints"),
        ("/data", "s3://b/x", "s3://b/x"),
        ("s3://b/run", "/data/x", "/data/x"),
    ],
)
def test_a_place_below_another(base, name, expected):
    assert str(locate_below(base, name)) == expected


def test_parts_of_a_url():
    url = locate("S3://bucket/run/step-1/")
    assert (url, url.name, url.parent) == (Url("s3", "bucket/run/step-1"), "step-1", Url("s3", "bucket/run"))


@pytest.mark.parametrize(("module", "text"), [("fsspec.core", "memory://b/x"), ("gcsfs", "gs://b/x")])
def test_a_package_that_is_not_installed_is_named(monkeypatch, module, text):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(CheckpointError, match="D0742") as found:
        save(text, contents(sample()), ALONE)
    assert module.partition(".")[0] in str(found.value)
    assert "distrib[remote]" in str(found.value)
