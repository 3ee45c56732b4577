"""Checkpoints of real processes in a shared file system by URL, and behind a real S3 protocol server."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

import pytest
import torch

from distrib.checkpoint import Contents, begin, latest, open_checkpoint, retain, save
from distrib.checkpoint.location import locate
from distrib.checkpoint.staging import Arena
from distrib.checkpoint.store import Store
from distrib.collectives.single import SingleCollectives
from distrib.errors import CheckpointError
from distrib.state import ShardedState
from distrib.testing import RanksFailed, run_ranks
from tests.multiproc.test_checkpoint_ranks import expected, join, state_of

HOW = "pip install -e '.[dev-remote]'"


@pytest.fixture(scope="module")
def s3():
    """The variables that lead to a server with an empty bucket."""
    server_module = pytest.importorskip("moto.server", reason=f"needs moto's S3 server: {HOW}")
    pytest.importorskip("s3fs", reason=f"needs s3fs: {HOW}")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield {
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "y",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    }
    server.stop()


@pytest.fixture(params=["local", "s3"])
def place(request, tmp_path, monkeypatch):
    """A URL below which there is nothing, and the variables that its file system needs."""
    if request.param == "local":
        return f"local://{tmp_path}/run", {}
    variables = request.getfixturevalue("s3")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    bucket = tmp_path.name.replace("_", "-").lower()[-60:].strip("-")
    s3fs.S3FileSystem().mkdir(bucket)
    return f"s3://{bucket}/run", variables


def save_on_ranks(url, variables, seed, layout, staged=False):
    os.environ.update(variables)
    ranks = join()
    state, live = state_of(expected(seed), layout, ranks)
    mine = Contents(state=state, rng={"rank": ranks.rank}, counters={"step": seed})
    if not staged:
        save(url, mine, ranks)
    else:
        saving = begin(url, lambda: mine, ranks, arena=Arena())
        for tensor in live.values():
            tensor.zero_()
        saving.finish(ranks)
    ranks.close()


def load_on_ranks(url, variables, seed, layout):
    """Return whether every slice came back bit for bit."""
    os.environ.update(variables)
    ranks = join()
    blank = {name: torch.zeros_like(tensor) for name, tensor in expected(seed).items()}
    state, live = state_of(blank, layout, ranks)
    with open_checkpoint(url, ranks) as reader:
        reader.check(state)
        reader.fill(state)
    right, _ = state_of(expected(seed), layout, ranks)
    ranks.close()
    return all(torch.equal(live[name], part.get()) for name, (part,) in right.tensors.items())


@pytest.mark.parametrize("staged", [False, True], ids=["blocking", "staged"])
def test_what_two_ranks_wrote_loads_on_one_and_on_two(place, staged):
    url, variables = place
    for seed in (4, 5):
        run_ranks(save_on_ranks, 2, f"{url}/step-1", variables, seed, "interval", staged=staged)
    assert run_ranks(load_on_ranks, 1, f"{url}/step-1", variables, 5, "replicated") == [True]
    assert run_ranks(load_on_ranks, 2, f"{url}/step-1", variables, 5, "rows") == [True, True]
    assert len(Store(locate(f"{url}/step-1")).names()) == 2


def save_large(url, variables):
    os.environ.update(variables)
    ranks = join()
    big = {"model/w": torch.arange(12_000_000, dtype=torch.float32)}  # 46 MiB: two parts
    state, _ = state_of(big, "replicated", ranks)
    save(url, Contents(state=state), ranks)
    target, live = state_of({"model/w": torch.zeros(12_000_000)}, "rows", ranks)
    with open_checkpoint(url, ranks) as reader:
        reader.fill(target)
    right, _ = state_of(big, "rows", ranks)
    ranks.close()
    return torch.equal(live["model/w"], right.tensors["model/w"][0].get())


def test_a_tensor_of_several_parts_comes_back(place):
    url, variables = place
    assert run_ranks(save_large, 2, f"{url}/step-1", variables) == [True, True]


def save_while_rank_one_fails(url, variables, how):
    os.environ.update(variables)
    ranks = join()
    state, _ = state_of(expected(6), "rows", ranks)
    (part,) = state.tensors["model/w"]

    def fail():
        if how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("injected")

    if ranks.rank == 1:
        state = ShardedState({**state.tensors, "model/w": (replace(part, get=fail),)}, state.objects)
    try:
        save(url, Contents(state=state), ranks)
    except CheckpointError as error:
        if how == "dies":
            raise
        return str(error)
    finally:
        ranks.close()


def test_a_rank_that_fails_is_an_error_of_both_and_leaves_the_previous_checkpoint(place):
    url, variables = place
    run_ranks(save_on_ranks, 2, f"{url}/step-1", variables, 5, "rows")
    said = run_ranks(save_while_rank_one_fails, 2, f"{url}/step-1", variables, "raises")
    assert ["rank 1" in text and "injected" in text for text in said] == [True, True]
    assert run_ranks(load_on_ranks, 2, f"{url}/step-1", variables, 5, "interval") == [True, True]
    assert len(Store(locate(f"{url}/step-1")).names()) == 2


def test_a_rank_that_is_killed_leaves_the_previous_checkpoint_and_the_next_save_tidies_up(place):
    url, variables = place
    run_ranks(save_on_ranks, 2, f"{url}/step-1", variables, 5, "rows")
    with pytest.raises(RanksFailed):
        run_ranks(save_while_rank_one_fails, 2, f"{url}/step-1", variables, "dies", timeout_s=30)
    assert run_ranks(load_on_ranks, 2, f"{url}/step-1", variables, 5, "interval") == [True, True]
    run_ranks(save_on_ranks, 2, f"{url}/step-1", variables, 7, "rows")
    assert run_ranks(load_on_ranks, 1, f"{url}/step-1", variables, 7, "rows") == [True]
    assert Store(locate(url)).names() == ["step-1"]
    assert len(Store(locate(f"{url}/step-1")).names()) == 2


def test_the_newest_is_found_and_old_ones_are_removed(place):
    url, variables = place
    for step in (8, 9, 10):
        run_ranks(save_on_ranks, 1, f"{url}/step-{step}", variables, step, "rows")
    assert str(latest(url)) == f"{url}/step-10"
    assert [path.name for path in retain(url, 1)] == ["step-8", "step-9"]
    assert Store(locate(url)).names() == ["step-10"]


def test_a_damaged_object_is_named(place):
    url, variables = place
    run_ranks(save_on_ranks, 2, f"{url}/step-1", variables, 5, "rows")
    store = Store(locate(f"{url}/step-1"))
    name = next(x for x in store.sizes() if x.endswith("model/rank-00001.safetensors"))
    data = bytearray(store.get(name) or b"")
    data[-1] ^= 1
    store.put(name, bytes(data))
    with pytest.raises(RanksFailed, match=r"D0706.*model/rank-00001\.safetensors"):
        run_ranks(load_on_ranks, 2, f"{url}/step-1", variables, 5, "rows")


def test_two_processes_cannot_save_to_one_place_at_once(place):
    url, variables = place
    run_ranks(save_on_ranks, 1, f"{url}/step-1", variables, 4, "rows")
    store = Store(locate(url))
    saving = begin(f"{url}/step-1", lambda: Contents(ShardedState({})), SingleCollectives())
    try:
        assert store.get(".step-1.lock") is not None
        with pytest.raises(RanksFailed, match=rf"D0712.*process {os.getpid()} on host"):
            run_ranks(save_on_ranks, 1, f"{url}/step-1", variables, 5, "rows")
    finally:
        saving.finish(SingleCollectives())
    assert store.names() == ["step-1"]
