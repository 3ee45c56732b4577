"""What is called of torch-xla on hardware that is not here: recorded, and checked against the signatures that it has."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch_xla
import torch_xla._internal.pjrt as pjrt
import torch_xla.core.xla_model as xm
import torch_xla.runtime as xr
from torch import nn

from distrib.collectives.xla import XlaCollectives
from distrib.config import RunConfig
from distrib.devices import DEVICES, choose_device
from distrib.errors import StrategyError, TopologyError
from distrib.startup import _options_of
from distrib.strategies import STRATEGIES, choose_strategy
from distrib.strategies.xla_replicas import Replicas
from distrib.topology import Topology

TWO = Topology(rank=1, world_size=2, local_rank=1, local_world_size=2)


class Recorded:
    """Stands for a function of torch-xla: takes only what that takes, and remembers it."""

    def __init__(self, real: Any, returns: Any = None) -> None:
        self.signature, self.calls, self._returns = inspect.signature(real), [], returns

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bound = self.signature.bind(*args, **kwargs)
        self.calls.append(dict(bound.arguments))
        return self._returns


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch):
    def replace(module: Any, name: str, returns: Any = None) -> Recorded:
        recorded = Recorded(getattr(module, name), returns)
        monkeypatch.setattr(module, name, recorded)
        return recorded

    return replace


def options(client: str = "CPU", **settings: Any) -> dict[str, object]:
    return {**_options_of("xla", RunConfig(strategy="xla", **settings)), "env": {"PJRT_DEVICE": client}}


def begin(client: str = "CPU", **settings: Any) -> Any:
    return STRATEGIES.get("xla").begin(TWO, DEVICES.get("xla")(), options(client, **settings))


def replicas(reduce: torch.dtype | None = None) -> tuple[Replicas, nn.Module]:
    everyone = SimpleNamespace(world_size=2, exchange=lambda marks: [list(marks)] * 2)
    runtime: Any = SimpleNamespace(collectives=everyone, precision=SimpleNamespace(reduce=reduce))
    device = torch_xla.device()
    model = nn.Linear(3, 2).to(device)
    model(torch.ones(1, 3, device=device)).sum().backward()
    return Replicas(runtime, SimpleNamespace(), on_host=False), model


def test_gradients_are_averaged_in_place_in_one_call(record):
    reduced = record(xm, "all_reduce")
    layout, model = replicas()
    layout.average(model)
    (call,) = reduced.calls
    assert call["reduce_type"] == xm.REDUCE_SUM
    assert call["scale"] == 0.5
    assert [id(x) for x in call["inputs"]] == [id(model.weight.grad), id(model.bias.grad)]


def test_gradients_are_averaged_in_the_format_that_is_asked_for(record):
    reduced = record(xm, "all_reduce")
    layout, model = replicas(torch.bfloat16)
    layout.average(model)
    assert [x.dtype for x in reduced.calls[0]["inputs"]] == [torch.bfloat16, torch.bfloat16]
    assert model.weight.grad.dtype is torch.float32


@pytest.mark.parametrize(
    ("op", "kind", "scale"),
    [("sum", "sum", 1.0), ("mean", "sum", 0.5), ("max", "max", 1.0), ("min", "min", 1.0)],
)
def test_inner_reductions_stay_on_the_device(record, op, kind, scale):
    reduced = record(xm, "all_reduce")
    collectives = object.__new__(XlaCollectives)
    collectives.world_size, collectives._on_host = 2, False
    value = torch.ones(2, device=torch_xla.device())
    assert collectives.all_reduce_(value, op) is value
    assert reduced.calls == [{"reduce_type": kind, "inputs": [value], "scale": scale}]


def test_processes_of_a_tpu_are_made_known_to_each_other_and_counted(record):
    known = record(pjrt, "initialize_multiprocess")
    record(xr, "world_size", returns=2)
    assert begin("TPU").number == 2
    assert known.calls == [{"local_rank": 1, "local_world_size": 2}]


def test_a_tpu_that_counts_otherwise_is_refused(record):
    record(pjrt, "initialize_multiprocess")
    record(xr, "world_size", returns=1)
    with pytest.raises(TopologyError, match="torch_xla sees 1 rank, a single process says 2") as caught:
        begin("TPU")
    assert caught.value.code == "D0892"


def test_one_program_has_a_place_for_each_device_and_every_rank_reads_all(record):
    record(xr, "use_spmd")
    record(xr, "process_count", returns=2)
    record(xr, "global_runtime_device_count", returns=8)
    places = begin(xla={"spmd": True})
    assert places.number == 8
    assert places.readers(None, 2) == [[0], [1]]


def test_batches_are_sent_with_the_layout_of_the_mesh(record):
    sent = record(xm, "send_cpu_data_to_device", returns=[torch.zeros(2)])
    backend: Any = DEVICES.get("xla")()
    backend.lay_out = lambda x: "layout"
    copier = backend.copier(torch.device("xla", 0))
    value = torch.ones(2)
    copier.finish(copier.start(value))
    (call,) = sent.calls
    assert call["device"] == torch.device("xla", 0)
    assert call["input_sharding"] == "layout"
    assert torch.equal(call["datas"][0], value)


@pytest.mark.parametrize(
    ("code", "settings"),
    [
        ("D0894", {"sync_batchnorm": True}),
        ("D0895", {"activation_checkpointing": "full"}),
        ("D0896", {"compile": {"scope": "model", "backend": "inductor"}}),
    ],
)
def test_what_cannot_be_is_refused_before_the_device_is_touched(code, settings):
    with pytest.raises(StrategyError) as caught:
        begin(**settings)
    assert caught.value.code == code


def test_fp16_is_refused_with_the_reason():
    from distrib.precision import resolve_precision

    with pytest.raises(StrategyError, match="matrix units know bfloat16 and not float16"):
        resolve_precision("fp16", DEVICES.get("xla")())


def test_a_fused_optimizer_is_refused():
    from distrib.strategies.xla_step import refuse_fused

    with pytest.raises(StrategyError, match="D0897"):
        refuse_fused(torch.optim.AdamW(nn.Linear(2, 2).parameters(), fused=True))


def test_auto_takes_xla_where_pjrt_was_asked_for_and_nothing_else(monkeypatch):
    assert choose_device("auto", 1, env={"PJRT_DEVICE": "CPU"})[0].name == "xla"
    assert choose_strategy("auto", 2, "xla")[0] == "xla"
    monkeypatch.setattr("distrib.devices.xla_runtime.num_chips", lambda: 0)
    assert choose_device("auto", 1)[0].name != "xla"


@pytest.mark.parametrize("requested", ["auto", "xla"])
def test_versions_that_do_not_go_together_are_refused_with_both(requested, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    with pytest.raises(TopologyError) as caught:
        choose_device(requested, 1, env={"PJRT_DEVICE": "CPU"})
    assert caught.value.code == "D0890"
    assert "torch_xla 2.9.0 is made for torch 2.9, but torch is 2.13.0+cpu" in caught.value.problem
    assert "torch==2.9.*" in str(caught.value.fix)


def test_a_tpu_is_found_on_the_pci_bus_by_vendor_and_device(monkeypatch, tmp_path):
    for name, vendor, device in (
        ("a", "0x1ae0", "0x0063"),
        ("b", "0x1ae0", "0x0001"),
        ("c", "0x10de", "0x0063"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(f"{vendor}\n")
        (tmp_path / name / "device").write_text(f"{device}\n")
    monkeypatch.setattr("distrib.devices.xla_runtime._PCI", tmp_path)
    backend, reason = choose_device("auto", 1, env={"HOME": "/"})
    assert (backend.name, backend.count(), reason) == ("xla", 1, "device xla: PJRT device TPU")
    with pytest.raises(TopologyError, match="2 ranks on this node, but 1 xla visible"):
        choose_device("auto", 2, env={"HOME": "/"})


def test_memory_is_that_of_the_process_where_the_client_does_not_tell():
    found = DEVICES.get("xla")().memory()
    assert 10**7 < found.used_bytes < found.total_bytes


def test_the_devices_generator_can_be_put_back_to_where_it_was():
    backend = DEVICES.get("xla")()
    backend.seed(2**63 + 5)  # more than an int64 holds
    state = backend.rng_state()
    first = torch.rand(4, device=torch_xla.device()).cpu()
    backend.set_rng_state(state)
    assert torch.equal(torch.rand(4, device=torch_xla.device()).cpu(), first)


def test_axes_that_xla_does_not_have_are_refused():
    from distrib.startup import _mesh

    for axis in ("tensor", "context", "pipeline"):
        config = RunConfig(strategy="xla", mesh={axis: 2})
        with pytest.raises(StrategyError) as caught:
            _mesh(config, "xla", STRATEGIES.get("xla").capabilities, 2)
        assert caught.value.code == "D0832"


def test_shards_without_one_program_are_refused():
    from distrib.startup import _mesh

    mesh = _mesh(RunConfig(strategy="xla", mesh={"shard": 2}), "xla", STRATEGIES.get("xla").capabilities, 2)
    runtime: Any = SimpleNamespace(mesh=mesh)
    with pytest.raises(StrategyError, match=r"mesh\.shard is 2, but") as caught:
        STRATEGIES.get("xla")(runtime, options(mesh={"shard": 2}))
    assert caught.value.code == "D0900"
