"""Two processes on the CPU client: what travels through host memory, which gradients are averaged, and noise by rank."""

from __future__ import annotations

import functools

import torch
from torch import nn

from distrib import Accelerator, RunConfig
from distrib.errors import CollectiveError, StrategyError, TopologyError
from tests.tpu.running import ONE, on_xla


class Branches(nn.Module):
    """`never` is used by nobody, `sometimes` only where it is asked for."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.always, self.sometimes, self.never = (nn.Linear(3, 1, bias=False) for _ in range(3))
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x, *, more):
        y = self.always(self.norm(x))
        return (y + self.sometimes(x)).mean() if more else y.mean()


def values():
    accelerator = Accelerator(RunConfig(seed=1, **ONE))
    rank, device = accelerator.process_index, accelerator.device
    mine = torch.full((rank + 1, 2), float(rank), device=device)
    found = {
        "sum": accelerator.reduce(torch.tensor([1.0, rank], device=device)),
        "mean": accelerator.reduce(torch.tensor(rank, device=device), "mean"),
        "gathered": accelerator.gather({"x": mine})["x"],
        "large": accelerator.gather(torch.full((1000,), rank, device=device)).sum(),
        "broadcast": accelerator.broadcast(torch.tensor([rank + 5], device=device)),
        "padded": accelerator.pad_across_processes(mine)[:, 0],
    }
    inner = torch.tensor([float(rank)] * 3, device=device)
    accelerator._runtime.collectives.all_reduce_(inner, "max")
    found["inner"] = inner
    devices = {str(x.device.type) for x in found.values()}
    accelerator.wait_for_everyone()
    try:
        accelerator.gather(torch.ones(2, 2 + rank, device=device))
    except CollectiveError as error:
        said = error.code
    return (
        {name: x.cpu().tolist() for name, x in found.items()},
        devices,
        accelerator.gather_object(rank),
        said,
    )


def gradients():
    accelerator = Accelerator(RunConfig(seed=1, **ONE))
    model = Branches()
    nn.init.constant_(model.always.weight, float(accelerator.process_index))  # ranks begin with rank 0's
    model, optimizer = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5)
    )
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(accelerator.process_index)).to(
        accelerator.device
    )
    found = {"begin": model.always.weight.detach().cpu().tolist(), "never": model.never.weight.detach().cpu()}
    with accelerator.no_sync(model):
        accelerator.backward(model(x, more=False))
        found["own"] = model.always.weight.grad.cpu().tolist()
    accelerator.backward(model(x, more=accelerator.is_main_process))
    found["averaged"] = [
        p.grad is not None for p in (model.always.weight, model.sometimes.weight, model.never.weight)
    ]
    found["grad"] = model.sometimes.weight.grad.cpu().tolist()
    optimizer.step()
    optimizer.zero_grad()
    found["after"] = [p.detach().cpu().tolist() for p in (model.always.weight, model.sometimes.weight)]
    found["never"] = torch.equal(found["never"], model.never.weight.detach().cpu())
    found["statistics"] = accelerator.get_state_dict(model)["norm.running_mean"].tolist()
    found["noise"] = torch.nn.functional.dropout(torch.ones(64, device=accelerator.device)).cpu().tolist()
    accelerator.check_in_sync(model)
    return found


def left_out():
    """Use everything in the first step and less in the second."""
    accelerator = Accelerator(RunConfig(seed=1, **ONE))
    model = nn.ModuleList([nn.Linear(2, 1), nn.Linear(2, 1)])
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    x = torch.ones(1, 2, device=accelerator.device)
    accelerator.backward((model[0](x) + model[1](x)).sum())
    optimizer.step()
    optimizer.zero_grad()
    try:
        accelerator.backward(model[0](x).sum())
    except StrategyError as error:
        return error.code, error.problem


def strays():
    """Step a parameter that is in no prepared model."""
    accelerator = Accelerator(RunConfig(seed=1, **ONE))
    stray = nn.Parameter(torch.ones(2, device=accelerator.device))
    model = nn.Linear(2, 1)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD([*model.parameters(), stray], lr=0.1))
    accelerator.backward(model(stray[None]).sum())
    try:
        optimizer.step()
    except StrategyError as error:
        return error.code


def worlds():
    """Return the codes of the refusals of worlds that torch.distributed and torch-xla count differently."""
    import torch.distributed as dist

    codes = []
    for more in ({"host_collectives": False}, {"spmd": True}):
        try:
            Accelerator(RunConfig(**{**ONE, "xla": more}))
        except TopologyError as error:
            codes.append((error.code, "torch_xla sees 1 rank, " in error.problem, " says 2" in error.problem))
        import os

        os.environ.pop("XLA_USE_SPMD", None)
    import torch_xla.distributed.xla_backend  # noqa: F401

    dist.init_process_group("xla")
    mine = torch.ones(1, device="xla")
    dist.all_reduce(mine)
    try:
        Accelerator(RunConfig(**ONE))
    except TopologyError as error:
        codes.append((error.code, "the script's own process group" in error.problem, mine.item() == 1.0))
    return codes


def in_one_job():
    return {"values": values(), "gradients": gradients(), "left out": left_out(), "strays": strays()}


@functools.cache
def both(function):
    return on_xla(function, ranks=2)


def result(name):
    return [found[name] for found in both(in_one_job)]


def test_values_travel_between_processes_and_come_back_to_the_device():
    for found, devices, objects, said in result("values"):
        assert found["sum"] == [2.0, 1.0]
        assert found["mean"] == 0.5
        assert found["gathered"] == [[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]
        assert found["large"] == 1000
        assert found["broadcast"] == [5]
        assert len(found["padded"]) == 2
        assert found["inner"] == [1.0, 1.0, 1.0]
        assert devices == {"xla"}
        assert objects == [0, 1]
        assert said == "D0401"


def test_ranks_begin_with_the_parameters_of_rank_0():
    assert [found["begin"] for found in result("gradients")] == [[[0.0, 0.0, 0.0]]] * 2


def test_gradients_stay_on_the_rank_under_no_sync_and_are_equal_afterwards():
    one, two = result("gradients")
    assert one["own"] != two["own"]
    assert one["after"] == two["after"]


def test_a_parameter_that_one_rank_uses_is_averaged_with_zeros_and_an_unused_one_is_left_alone():
    one, two = result("gradients")
    assert one["averaged"] == two["averaged"] == [True, True, False]
    assert one["grad"] == two["grad"]
    assert one["never"]
    assert two["never"]


def test_running_statistics_of_the_run_are_those_of_rank_0():
    one, two = result("gradients")
    assert one["statistics"] == two["statistics"] != [0.0, 0.0, 0.0]


def test_ranks_draw_noise_of_their_own():
    one, two = result("gradients")
    assert one["noise"] != two["noise"]


def test_a_parameter_that_is_left_out_after_the_first_step_is_refused_by_name():
    for code, problem in result("left out"):
        assert code == "D0898"
        assert "no gradient to 1.weight, 1.bias on this rank" in problem


def test_a_gradient_that_nobody_averages_is_refused():
    assert result("strays") == ["D0812", "D0812"]


def test_worlds_that_are_counted_differently_are_refused():
    for codes in both(worlds):
        assert codes == [("D0892", True, True)] * 3
