"""Matrix products divided over ranks: the same run as on one rank, and what is refused or found out."""

from __future__ import annotations

import contextlib
import io

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from distrib import Accelerator, RunConfig
from distrib.testing import run_ranks
from tests.contract.plain import Samples

HALVES = {"plan": ("*.up=colwise", "*.down=rowwise")}


class Mlp(nn.Module):
    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.up, self.down = nn.Linear(6, 16), nn.Linear(16, 6)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return x + self.dropout(self.down(torch.tanh(self.up(x))))


class Net(nn.Module):
    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.layers = nn.ModuleList([Mlp(dropout) for _ in range(2)])
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def train(settings: dict, folder: str | None = None, steps: int = 6, dropout: float = 0.0) -> tuple:
    """Train on 24 samples; go on from the checkpoint in `folder` if there is one, and save at the end."""
    extra = {"project_dir": folder} if folder else {}
    accelerator = Accelerator(RunConfig(device="cpu", seed=5, global_batch_size=8, **settings, **extra))
    torch.manual_seed(0)
    model = Net(dropout).double()
    loader = DataLoader(Samples(24), batch_size=2)
    model, optimizer, loader = accelerator.prepare(
        model, torch.optim.AdamW(model.parameters(), lr=0.05), loader
    )
    if folder:
        accelerator.load_state()
    losses, ids = [], []
    while len(losses) < steps:
        window, seen = [], []
        for batch in loader:
            with accelerator.accumulate(model):
                rows = nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")
                accelerator.backward(rows.mean())
                norm = accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
            window.append(accelerator.gather_for_metrics(rows.detach()))
            seen += accelerator.gather_for_metrics(batch["id"]).tolist()
            if accelerator.sync_gradients:
                losses.append((float(torch.cat(window).mean()), float(norm)))
                ids.append(sorted(seen))
                window, seen = [], []
    if folder:
        accelerator.save_state()
    state = {name: x.clone() for name, x in accelerator.get_state_dict(model).items()}
    total = accelerator.reduce(torch.tensor(1.0))
    return losses, ids, state, float(total), accelerator.mesh.data_parallel_size


LAYOUTS = [
    ("tensor 2", {"strategy": "fsdp", "mesh": {"tensor": 2}, "tensor_parallel": HALVES}, 2),
    ("shard 2 x tensor 2", {"strategy": "fsdp", "mesh": {"tensor": 2}, "tensor_parallel": HALVES}, 4),
    (
        "replicate 2 x tensor 2",
        {"strategy": "fsdp", "mesh": {"replicate": 2, "shard": 1, "tensor": 2}, "tensor_parallel": HALVES},
        4,
    ),
]
SINGLE = {"strategy": "single"}
in_every_layout = pytest.mark.parametrize(
    ("settings", "world_size"), [x[1:] for x in LAYOUTS], ids=[x[0] for x in LAYOUTS]
)


def assert_same(found, expected):
    assert found[1] == expected[1]
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(expected[0]), rtol=1e-5, atol=1e-6)
    for name, value in expected[2].items():
        torch.testing.assert_close(found[2][name], value, rtol=1e-8, atol=1e-11, msg=name)


@in_every_layout
def test_samples_losses_norms_and_parameters_are_those_of_one_rank(settings, world_size):
    expected = run_ranks(train, 1, SINGLE)[0]
    for found in run_ranks(train, world_size, settings):
        assert_same(found, expected)
        assert found[3] == found[4]  # a rank that reads the same samples as another does not count twice


@in_every_layout
@pytest.mark.parametrize("other", [(SINGLE, 1), ({"strategy": "fsdp"}, 3)], ids=["single", "fsdp 3"])
def test_a_run_goes_on_under_another_layout_in_both_directions(settings, world_size, other, tmp_path):
    expected = run_ranks(train, 1, SINGLE, None, 12)[0]
    for first, second in (((settings, world_size), other), (other, (settings, world_size))):
        folder = tmp_path / str(first[1])
        folder.mkdir()
        run_ranks(train, first[1], first[0], str(folder))
        for found in run_ranks(train, second[1], second[0], str(folder)):
            assert_same(found, (expected[0][6:], expected[1][6:], expected[2]))


def with_dropout(settings: dict) -> tuple[dict, list[int]]:
    _, _, state, _, _ = train(settings, dropout=0.5)
    return state, torch.rand(3).tolist()


def test_ranks_that_share_a_product_draw_the_same_dropout():
    (_, first), (_, second), (_, third), _ = run_ranks(with_dropout, 4, LAYOUTS[1][1])
    assert first == second
    assert first != third


class Wrong(Mlp):
    """Normalises what is divided: each rank has a part of the gain's gradient only."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)) * self.gain)


def wrongly_planned() -> None:
    accelerator = Accelerator(
        RunConfig(strategy="fsdp", device="cpu", mesh={"tensor": 2}, tensor_parallel=HALVES)
    )
    model = nn.Sequential(Wrong(), nn.LayerNorm(6))
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    accelerator.backward(model(torch.arange(12.0).view(2, 6)).square().mean())
    optimizer.step()


def test_a_plan_under_which_replicas_would_part_is_found_out_in_the_first_step():
    with pytest.raises(Exception, match=r"(?s)D0835.*different gradients of 0.gain, which"):
        run_ranks(wrongly_planned, 2)


def tied_wrongly() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    settings = {"plan": ("0=colwise", "1=rowwise")}
    Accelerator(
        RunConfig(strategy="fsdp", device="cpu", mesh={"tensor": 2}, tensor_parallel=settings)
    ).prepare(model)


def test_tied_weights_that_a_plan_divides_differently_are_refused():
    with pytest.raises(Exception, match=r"(?s)D0834.*tied"):
        run_ranks(tied_wrongly, 2)


def language_model(settings: dict, folder: str, tied: bool) -> list[float]:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=100, tie_word_embeddings=tied, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    accelerator = Accelerator(RunConfig(device="cpu", seed=1, **settings))
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    losses = []
    for i in range(3):
        tokens = torch.randint(100, (4, 10), generator=torch.Generator().manual_seed(i))
        with accelerator.split_between_processes(tokens) as mine:
            loss = model(input_ids=mine, labels=mine).loss
            accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(accelerator.reduce(loss.detach(), "mean")))
    accelerator.save_model(model, folder)
    whole = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
        assert loaded.keys() == whole.keys()
        assert all(torch.equal(loaded[name], value) for name, value in whole.items())
    return losses


@pytest.mark.parametrize(("world_size", "tied"), [(2, True), pytest.param(4, False, marks=pytest.mark.slow)])
def test_a_llama_trains_by_its_own_plan_and_is_exported_whole(world_size, tied, tmp_path):
    pytest.importorskip("transformers", reason="needs Hugging Face's transformers")
    expected = run_ranks(language_model, 1, SINGLE, str(tmp_path / "one"), tied)[0]
    settings = {"strategy": "fsdp", "mesh": {"tensor": 2}}
    for found in run_ranks(language_model, world_size, settings, str(tmp_path / "many"), tied):
        assert found == pytest.approx(expected, abs=2e-5)


def operated(settings: dict) -> None:
    accelerator = Accelerator(RunConfig(device="cpu", seed=5, **settings))
    torch.manual_seed(0)
    plain, model = Net().double(), Net().double()
    plain.load_state_dict(model.state_dict())
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.05))
    x = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with accelerator.gathered(model) as whole:
        assert {name: v.shape for name, v in whole.named_parameters()} == {
            name: v.shape for name, v in plain.named_parameters()
        }
        torch.testing.assert_close(whole(x), plain(x), rtol=1e-12, atol=1e-14)
        with torch.no_grad():
            for net in (whole, plain):
                net.layers[0].up.weight[3:].mul_(2)
                net.layers[1].down.weight[:, 5] = 7
                net.layers[1].down.bias.add_(1)
                net.head.weight.neg_()
        assert all(torch.equal(value, whole.state_dict()[name]) for name, value in plain.state_dict().items())
    found = accelerator.get_state_dict(model)
    assert all(torch.equal(found[name], value) for name, value in plain.state_dict().items())
    torch.testing.assert_close(model(x), plain(x), rtol=1e-12, atol=1e-14)
    accelerator.backward(model(x).square().mean())
    optimizer.step()
    accelerator.check_in_sync(model)


@pytest.mark.parametrize("world_size", [2, 4])
def test_whole_parameters_can_be_read_used_and_changed(world_size):
    run_ranks(operated, world_size, LAYOUTS[0][1])


def planned_for_nothing() -> None:
    Accelerator(RunConfig(strategy="fsdp", device="cpu", tensor_parallel=HALVES))


def test_a_plan_without_ranks_that_share_products_is_refused():
    with pytest.raises(Exception, match=r"(?s)D0107.*mesh.tensor is 1"):
        run_ranks(planned_for_nothing, 2)


def what_is_told() -> str:
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        Accelerator(RunConfig(device="cpu", fsdp={"prefetch": 2, "cpu_offload": True}, **LAYOUTS[0][1]))
    return said.getvalue()


def test_options_of_sharding_that_do_nothing_are_told():
    told, _ = run_ranks(what_is_told, 2)
    assert "fsdp.prefetch does nothing here: no ranks read different samples" in told
    assert "fsdp.cpu_offload does nothing here" in told
