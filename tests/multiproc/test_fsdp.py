"""Fully sharded training: what lies where, whole parameters on demand, models without memory, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import distrib
from distrib import Accelerator, RunConfig, StrategyError
from distrib.testing import run_ranks


class Net(nn.Module):
    """Tied weights, a buffer, repeated blocks, a frozen parameter."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(53, 8)
        self.layers = nn.ModuleList([
            nn.Sequential(nn.Linear(8, 20), nn.Tanh(), nn.Linear(20, 8)) for _ in range(3)
        ])  # fmt: skip
        self.norm = nn.LayerNorm(8)
        self.norm.weight.requires_grad_(False)
        self.head = nn.Linear(8, 53, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.arange(8.0), persistent=False)

    def forward(self, tokens):
        h = self.embedding(tokens) * self.scale
        for layer in self.layers:
            h = h + layer(h)
        return self.head(self.norm(h))


def accelerator_of(strategy="fsdp", **settings):
    return Accelerator(RunConfig(strategy=strategy, device="cpu", seed=3, **settings))


def step(accelerator, model, optimizer):
    accelerator.backward(model(torch.arange(12).view(1, 12)).square().mean())
    optimizer.step()
    optimizer.zero_grad()


def trained(settings: dict, empty: bool, late: bool = False) -> tuple[dict, dict]:
    """Return the state before and after one step, whole."""
    accelerator = accelerator_of(**settings)
    if empty:
        with distrib.init_empty():
            model = Net()
        assert model.embedding.weight.is_meta
        assert not model.scale.is_meta
    else:
        model = Net()
    optimizer = torch.optim.AdamW((x for x in model.parameters() if x.requires_grad), lr=0.1)
    if late:  # each on its own: the optimizer's parameters are replaced by then
        model = accelerator.prepare(model)
        optimizer = accelerator.prepare(optimizer)
    else:
        optimizer, model = accelerator.prepare(optimizer, model)
    plain = accelerator.unwrap_model(model)
    assert plain.head.weight is plain.embedding.weight
    before = {name: x.clone() for name, x in accelerator.get_state_dict(model).items()}
    step(accelerator, model, optimizer)
    return before, {name: x.clone() for name, x in accelerator.get_state_dict(model).items()}


def assert_equal(found: dict, expected: dict, **tolerance) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name, **tolerance)


LAYOUTS = [
    ("single", {"strategy": "single"}, 1),
    ("ddp", {"strategy": "ddp"}, 2),
    ("fsdp 2", {}, 2),
    ("fsdp 3", {}, 3),
    ("offloaded", {"fsdp": {"cpu_offload": True}}, 2),
    ("hybrid", {"mesh": {"replicate": 2}}, 4),
]


@pytest.mark.parametrize(("settings", "world_size"), [x[1:] for x in LAYOUTS], ids=[x[0] for x in LAYOUTS])
def test_a_model_without_memory_gets_the_values_of_one_that_was_built_plainly(settings, world_size):
    before, after = run_ranks(trained, 1, {"strategy": "single"}, False)[0]
    for found in run_ranks(trained, world_size, settings, True):
        assert_equal(found[0], before, rtol=0, atol=0)
        assert_equal(found[1], after, rtol=0, atol=1e-6)


def test_the_order_of_prepare_does_not_matter():
    expected = run_ranks(trained, 2, {}, False)[0]
    found = run_ranks(trained, 2, {}, False, True)[0]
    assert_equal(found[1], expected[1], rtol=0, atol=0)


class Odd(nn.Module):
    """A parameter of its own that no `reset_parameters` knows."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.full((4, 8), 0.5))
        self.linear = nn.Linear(8, 4)

    def forward(self, x):
        return self.linear(x) * self.gain.sum()


def built_without_values(strategy: str, folder: str) -> tuple[str, float, float]:
    accelerator = accelerator_of(strategy, project_dir=folder)
    model = accelerator.prepare(Odd())
    expected = model(torch.ones(1, 8)).sum().item()
    accelerator.save_state()
    accelerator.free_memory()
    with distrib.init_empty():
        empty = Odd()
    empty = accelerator.prepare(empty)
    with pytest.raises(StrategyError, match="D0831") as caught:
        empty(torch.ones(1, 8))
    accelerator.load_state()
    return str(caught.value), expected, empty(torch.ones(1, 8)).sum().item()


@pytest.mark.parametrize(("strategy", "world_size"), [("single", 1), ("fsdp", 2)])
def test_what_nothing_initialises_is_refused_until_a_checkpoint_brings_it(strategy, world_size, tmp_path):
    for message, expected, found in run_ranks(built_without_values, world_size, strategy, str(tmp_path)):
        assert "to gain" in message
        assert found == expected


def held(settings: dict) -> tuple[int, int, int]:
    """Return bytes of parameters, gradients and optimizer state on this rank."""
    accelerator = accelerator_of(**settings)
    model = Net()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    accelerator.backward(model(torch.arange(12).view(1, 12)).square().mean())
    gradients = [x.grad for x in model.parameters() if x.grad is not None]
    optimizer.step()
    state = [x for values in optimizer.state.values() for x in values.values() if x.dim()]
    return tuple(
        sum(x.to_local().nbytes for x in found) for found in (list(model.parameters()), gradients, state)
    )


def test_every_rank_holds_its_part_of_parameters_gradients_and_optimizer_state():
    whole = sum(x.nbytes for x in Net().parameters())
    trainable = sum(x.nbytes for x in Net().parameters() if x.requires_grad)
    sharded = run_ranks(held, 4, {})
    assert [sum(column) for column in zip(*sharded, strict=True)] == [whole, trainable, 2 * trainable]
    assert max(x[0] for x in sharded) < 0.35 * whole  # 53 rows and 3 shards of 8 do not divide by 4
    hybrid = run_ranks(held, 4, {"mesh": {"replicate": 2}})
    assert [sum(column) for column in zip(*hybrid, strict=True)] == [2 * whole, 2 * trainable, 4 * trainable]


def operated() -> None:
    accelerator = accelerator_of(fsdp={"wrap": ("Sequential",)})
    model = Net()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    with torch.no_grad():
        model(torch.arange(12).view(1, 12))  # an evaluation leaves the model's own unit whole
    before = {name: x.clone() for name, x in accelerator.get_state_dict(model).items()}
    with accelerator.gathered(model) as plain:
        assert {name: x.shape for name, x in plain.named_parameters()} == {
            name: x.shape for name, x in Net().named_parameters()
        }
        with torch.no_grad():
            plain.layers[1][0].weight.mul_(2)
            plain.embedding.weight[50] = 7
            outputs = plain(torch.arange(12).view(1, 12))
    after = accelerator.get_state_dict(model)
    before["layers.1.0.weight"] *= 2
    before["embedding.weight"][50] = before["head.weight"][50] = 7
    assert_equal(dict(after), before, rtol=0, atol=0)
    with torch.no_grad():
        assert_equal({"y": model(torch.arange(12).view(1, 12))}, {"y": outputs})
    step(accelerator, model, optimizer)
    accelerator.check_in_sync(model)


def test_whole_parameters_can_be_read_used_and_changed():
    run_ranks(operated, 3)


def with_other_weights() -> list[dict]:
    accelerator = accelerator_of()
    torch.manual_seed(accelerator.process_index)
    model = accelerator.prepare(Net())
    return {name: x.clone() for name, x in accelerator.get_state_dict(model).items()}


def test_rank_0_s_values_are_taken_over_before_anything_is_sharded():
    torch.manual_seed(0)
    expected = Net().state_dict()
    for found in run_ranks(with_other_weights, 2):
        assert_equal(found, dict(expected), rtol=0, atol=0)


class Branches(nn.Module):
    """Which branch is used depends on the rank."""

    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])
        self.head = nn.Linear(4, 1)

    def forward(self, x, branch):
        return self.head(self.branches[branch](x))


def branching() -> dict:
    accelerator = accelerator_of()
    torch.manual_seed(0)
    model = Branches()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
    accelerator.backward(model(torch.ones(2, 4), accelerator.process_index).mean())
    optimizer.step()
    return {name: x.clone() for name, x in accelerator.get_state_dict(model).items()}


def test_a_parameter_that_only_some_ranks_use_is_averaged_all_the_same():
    torch.manual_seed(0)
    model = Branches()
    loss = (model(torch.ones(2, 4), 0).mean() + model(torch.ones(2, 4), 1).mean()) / 2
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    for found in run_ranks(branching, 2):
        assert_equal(found, dict(model.state_dict()))


def overflowing() -> tuple[float, bool, bool]:
    accelerator = accelerator_of(mixed_precision="fp16")
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1))
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    before = {name: x.clone() for name, x in accelerator.get_state_dict(model).items()}
    scale = accelerator.scaler.scale
    loss = model(torch.ones(2, 4)).mean() * (float("inf") if accelerator.process_index == 1 else 1)
    accelerator.backward(loss)
    optimizer.step()
    after = accelerator.get_state_dict(model)
    unchanged = all(torch.equal(after[name], value) for name, value in before.items())
    return accelerator.scaler.scale / scale, accelerator.optimizer_step_was_skipped, unchanged


def test_an_overflow_on_one_rank_skips_the_step_on_all():
    assert run_ranks(overflowing, 2) == [(0.5, True, True)] * 2


def aborted(folder: str, where: str) -> tuple[float, float]:
    """Return the loss after a checkpoint, and after coming back to it from a step that was ended in the middle."""
    accelerator = accelerator_of(project_dir=folder)
    model = Net()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    step(accelerator, model, optimizer)
    accelerator.save_state()
    tokens = torch.arange(12).view(1, 12)
    step(accelerator, model, optimizer)
    expected = model(tokens).square().mean().item()

    def interrupt(*_):
        raise MemoryError("in the middle")

    norm = accelerator.unwrap_model(model).norm
    begins = norm.register_forward_pre_hook if where == "forward" else norm.register_full_backward_pre_hook
    handle = begins(interrupt)
    with pytest.raises(MemoryError):
        accelerator.backward(model(tokens).square().mean())
    handle.remove()
    accelerator.load_state()
    step(accelerator, model, optimizer)
    return expected, model(tokens).square().mean().item()


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_run_goes_on_from_its_checkpoint_after_a_step_that_was_interrupted(tmp_path, where):
    for expected, found in run_ranks(aborted, 2, str(tmp_path), where):
        assert found == expected


def unknown_class() -> None:
    accelerator_of(fsdp={"wrap": ("Blok",)}).prepare(Net())


def test_a_class_that_the_model_lacks_is_refused_on_every_rank():
    with pytest.raises(Exception, match="D0830"):
        run_ranks(unknown_class, 2)


def with_mesh(strategy: str, mesh: dict) -> tuple:
    accelerator = accelerator_of(strategy, mesh=mesh)
    return accelerator.mesh.size("replicate"), accelerator.mesh.size("shard")


@pytest.mark.parametrize(
    ("strategy", "mesh", "expected"),
    [
        ("fsdp", {}, (1, 4)),
        ("fsdp", {"replicate": 2}, (2, 2)),
        ("fsdp", {"shard": 2}, (2, 2)),
        ("fsdp", {"replicate": -1}, (4, 1)),
        ("fsdp", {"replicate": -1, "shard": 2}, (2, 2)),
        ("ddp", {}, (4, 1)),
        ("ddp", {"replicate": 4}, (4, 1)),
    ],
)
def test_ranks_without_a_size_go_to_the_strategy_s_last_axis(strategy, mesh, expected):
    assert run_ranks(with_mesh, 4, strategy, mesh) == [expected] * 4


@pytest.mark.parametrize(
    ("strategy", "mesh", "words"),
    [("ddp", {"shard": 2}, r"D0832.*mesh.shard is 2"), ("fsdp", {"shard": 3}, r"D0112.*shard \(3\)")],
)
def test_a_mesh_that_the_strategy_or_the_world_cannot_have_is_refused(strategy, mesh, words):
    with pytest.raises(Exception, match=f"(?s){words}"):
        run_ranks(with_mesh, 2, strategy, mesh)


class InPlace(nn.Module):
    """Changes in place what its blocks return; linear layers return views of three dimensions."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Tanh(), nn.Linear(6, 6)) for _ in range(3))
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        for block in self.blocks:
            y = block(x)
            y += x
            x = y
        return self.head(x)


def _norms_in_place(settings, how):
    accelerator = Accelerator(RunConfig(seed=1, device="cpu", **settings))
    torch.manual_seed(0)
    model = InPlace().double()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    norms = []
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        logits = model(torch.randn(2, 3, 6, dtype=torch.float64, generator=generator))
        getattr(logits, how)(*([] if how == "relu_" else [2.0]))
        accelerator.backward((logits**2).mean())
        norms.append(float(accelerator.clip_grad_norm_(model.parameters(), 1e9)))
        optimizer.step()
        optimizer.zero_grad()
    return norms


@pytest.mark.parametrize("how", ["add_", "div_", "relu_"])
def test_operations_in_place_on_what_units_return_keep_their_gradients(how):
    found = run_ranks(_norms_in_place, 2, {"strategy": "fsdp"}, how)[0]
    assert found == pytest.approx(_norms_in_place({}, how), rel=1e-9)
