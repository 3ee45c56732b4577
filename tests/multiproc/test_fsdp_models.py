"""Models and loops as users have them, sharded: each case against the same plain loop in one process.

All cases of a group run one after another in the same ranks, since starting ranks costs more than the cases do. A case
returns what differs; a case that raises, raises on every rank.
"""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

from distrib import Accelerator, RunConfig, StrategyError
from distrib.testing import run_ranks

ROWS = 6  # divides by 2 and 3 ranks
_generator = torch.Generator().manual_seed(1)
X = torch.randn(ROWS, 6, generator=_generator, dtype=torch.float64)
Y = torch.randn(ROWS, 3, generator=_generator, dtype=torch.float64)
IMAGES = torch.randn(ROWS, 3, 8, 8, generator=_generator, dtype=torch.float64)
TOKENS = torch.randint(3, 50, (ROWS, 8), generator=_generator)
LABELS = torch.randint(0, 5, (ROWS,), generator=_generator)
BATCH = {"x": X, "y": Y}
DEFECTS: dict[str, str] = {}  # claim -> what happens instead
GROUPS: dict[str, dict[str, Callable[[], list[str]]]] = {}


# The plain loop and the sharded one


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x):
        return x + self.b(torch.tanh(self.a(x)))


class Net(nn.Module):
    """Three units: two blocks, and the model's own with `inp` and `head`."""

    def __init__(self):
        super().__init__()
        self.inp, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
        self.layers = nn.ModuleList([Block() for _ in range(2)])

    def forward(self, x):
        x = self.inp(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def sgd(model, lr=0.1):
    return torch.optim.SGD([x for x in model.parameters() if x.requires_grad], lr=lr)


def mse(model, batch):
    return F.mse_loss(model(batch["x"]), batch["y"])


def part(batch, accelerator):
    """Return this rank's rows."""
    size = ROWS // accelerator.num_processes
    begin = accelerator.process_index * size
    return {name: x[begin : begin + size] for name, x in batch.items()}


def accelerator_of(strategy="fsdp", **settings):
    return Accelerator(RunConfig(strategy=strategy, device="cpu", seed=3, **settings))


def differences(found, expected, atol=1e-9, rtol=1e-6) -> list[str]:
    """Return the names of the tensors that differ, or that only one has."""
    bad = sorted(found.keys() ^ expected.keys())
    for name in found.keys() & expected.keys():
        a, b = found[name], expected[name]
        if isinstance(b, torch.Tensor) and (
            a.dtype != b.dtype or a.shape != b.shape or not torch.allclose(a, b, rtol=rtol, atol=atol)
        ):
            bad.append(name)
    return bad


class Pair:
    """A model with its optimizer in one process on the whole batch, and the same on the ranks."""

    def __init__(self, build=lambda: Net().double(), optimizer=sgd, batch=BATCH, loss=mse, **settings):
        self.accelerator = accelerator_of(**settings)
        torch.manual_seed(0)
        self.plain = build()
        self.plain_optimizer = optimizer(self.plain)
        torch.manual_seed(0)
        model = build()
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer(model))
        self.whole, self.mine, self.loss = batch, part(batch, self.accelerator), loss
        self.bad: list[str] = []

    def expect(self, what: str, found: float, expected: float) -> None:
        if not math.isclose(found, expected, rel_tol=1e-5, abs_tol=1e-9):
            self.bad.append(f"{what}: {found} instead of {expected}")

    def backward(self, share: float = 1.0) -> None:
        """Both backwards; `share` is the micro-step's part of the plain loop's window."""
        expected = self.loss(self.plain, self.whole)
        (expected * share).backward()
        loss = self.loss(self.model, self.mine)
        self.accelerator.backward(loss)
        self.expect("loss", float(self.accelerator.reduce(loss.detach(), "mean")), float(expected))

    def clip(self, max_norm: float, norm_type: float = 2.0) -> None:
        expected = nn.utils.clip_grad_norm_(self.plain.parameters(), max_norm, norm_type)
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), max_norm, norm_type)
        self.expect("norm", float(norm), float(expected))

    def update(self) -> None:
        for optimizer in (self.plain_optimizer, self.optimizer):
            optimizer.step()
            optimizer.zero_grad()

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            self.backward()
            self.update()

    def result(self, **tolerance) -> list[str]:
        self.accelerator.check_in_sync(self.model)
        state = self.accelerator.get_state_dict(self.model)
        return self.bad + differences(state, self.plain.state_dict(), **tolerance)


def trained(build=lambda: Net().double(), *, clip=0.5, steps=3, tolerance=1e-9, **rest) -> list[str]:
    """Return what differs after some clipped steps."""
    pair = Pair(build, **rest)
    for _ in range(steps):
        pair.backward()
        pair.clip(clip)
        pair.update()
    return pair.result(atol=tolerance)


def case(group: str, claim: str, defect: str = "") -> Callable:
    """Enter a function of no arguments as a case of a group."""

    def enter(function):
        GROUPS.setdefault(group, {})[claim] = function
        if defect:
            DEFECTS[claim] = defect
        return function

    return enter


def refused(group: str, claim: str, code: str) -> Callable:
    """Enter a function that has to be refused on every rank."""

    def enter(function):
        def run() -> list[str]:
            try:
                function()
            except StrategyError as error:
                return [] if error.code == code else [str(error)]
            return ["was not refused"]

        case(group, claim)(run)
        return function

    return enter


def enter_all(group: str, cases: dict) -> None:
    for claim, function in cases.items():
        case(group, claim)(function)


def outcomes(group: str) -> dict[str, str]:
    """Run all cases of a group on this rank; return what went wrong in each."""
    found = {}
    for claim, function in GROUPS[group].items():
        try:
            found[claim] = ", ".join(map(str, function()))
        except Exception as error:  # the next case has an accelerator of its own
            found[claim] = f"{type(error).__name__}: {error}"
    return found


@functools.cache
def outcomes_on(world_size: int, group: str) -> list[dict[str, str]]:
    return run_ranks(outcomes, world_size, group, timeout_s=50)


def claims(group: str) -> list:
    return [
        pytest.param(
            claim,
            id=claim,
            marks=pytest.mark.xfail(strict=True, reason=DEFECTS[claim]) if claim in DEFECTS else (),
        )
        for claim in GROUPS[group]
    ]


# Kinds of modules and parameters


class Odd(nn.Module):
    """Parameters of one element and of one row, buffers and a frozen parameter of integers."""

    def __init__(self):
        super().__init__()
        self.linear, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
        self.one, self.row = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1, 6))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("mask", torch.tensor([True, False, True, True, False, True]))
        self.levels = nn.Parameter(torch.arange(6, dtype=torch.int8), requires_grad=False)

    def forward(self, x):
        self.steps += 1
        return self.head(self.linear(x * self.mask + self.levels) * self.one + self.row)


class Scalar(nn.Module):
    """As the logit scale of CLIP."""

    def __init__(self):
        super().__init__()
        self.linear, self.scale = nn.Linear(6, 3), nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return self.linear(x) * self.scale


class Dtypes(nn.Module):
    def __init__(self, *, frozen: bool):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6).double(), nn.Linear(6, 3)
        self.b.requires_grad_(not frozen)

    def forward(self, x):
        return self.b(self.a(x).float()).double()


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3, dtype=torch.complex128)

    def forward(self, x):
        return self.linear(x.to(torch.complex128)).real


class Conv(nn.Module):
    def __init__(self, norm=True):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4) if norm else nn.Identity()
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(F.relu(self.norm(self.conv(x))).mean((2, 3)))


class Chain(nn.Module):
    """Linear modules after `made_of`, which parametrizes them."""

    def __init__(self, made_of):
        super().__init__()
        self.layers = nn.ModuleList([made_of(nn.Linear(6, 6)) for _ in range(2)])
        self.head = made_of(nn.Linear(6, 3))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(1, 5, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(10, 3)

    def forward(self, x):
        return self.head(self.lstm(x[..., None])[0][:, -1])


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp, self.head = nn.Linear(1, 8), nn.Linear(8, 3)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x):
        padding = torch.zeros(x.shape, dtype=torch.bool)
        padding[:, -1] = True
        x = self.inp(x[..., None])
        return self.head(self.encoder(self.attention(x, x, x)[0], src_key_padding_mask=padding).mean(1))


class Words(nn.Module):
    def __init__(self, embedding):
        super().__init__()
        self.embedding, self.head = embedding, nn.Linear(6, 3)

    def forward(self, x):
        x = self.embedding(x)
        return self.head(x if x.dim() == 2 else x.mean(1))


class Reused(Net):
    def forward(self, x):
        return self.head(self.layers[0](self.layers[1](self.layers[0](self.inp(x)))))


class Skipping(Net):
    """Every second forward leaves a unit out, on all ranks."""

    calls = 0

    def forward(self, x):
        x, self.calls = self.layers[0](self.inp(x)), self.calls + 1
        return self.head(self.layers[1](x) if self.calls % 2 else x)


class Wrapped(nn.Module):
    """Returns an object that torch does not look into; one unit, whose inputs need no gradients."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x):
        return SimpleNamespace(y=self.linear(x))


def transposed() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 3)).double()
    model[0].weight = nn.Parameter(model[0].weight.detach().t().contiguous().t())
    return model


def words(**options):
    batch = {"x": TOKENS % 10, "y": Y}
    return {"build": lambda: Words(nn.Embedding(10, 6, **options)).double(), "batch": batch}


PICTURES = {"x": IMAGES, "y": Y}
enter_all(
    "modules",
    {
        "small, integer and boolean parameters and buffers": lambda: trained(lambda: Odd().double()),
        "complex parameters": lambda: trained(Complex),
        "frozen parameters in another dtype": lambda: trained(lambda: Dtypes(frozen=True), tolerance=1e-5),
        "LSTM": lambda: trained(lambda: Recurrent().double()),
        "attention and an encoder": lambda: trained(lambda: Attending().double()),
        "weight_norm": lambda: trained(lambda: Chain(parametrizations.weight_norm).double()),
        "spectral_norm": lambda: trained(lambda: Chain(parametrizations.spectral_norm).double()),
        "synchronized BatchNorm": lambda: trained(
            lambda: Conv().double(), batch=PICTURES, sync_batchnorm=True
        ),
        "EmbeddingBag": lambda: trained(
            lambda: Words(nn.EmbeddingBag(10, 6)).double(), batch={"x": TOKENS % 10, "y": Y}
        ),
        "a block that is used twice": lambda: trained(lambda: Reused().double()),
        "a block that every second forward leaves out": lambda: trained(lambda: Skipping().double()),
    },
)


@refused("modules", "a parameter of no dimension", "D0838")
def _scalar():
    return trained(lambda: Scalar().double())


@refused("modules", "trained parameters in two dtypes", "D0838")
def _two_dtypes():
    return trained(lambda: Dtypes(frozen=False), tolerance=1e-5)


@case("modules", "a parameter that is not contiguous")
def _transposed():
    return trained(transposed)


@case("modules", "a convolution in channels_last")
def _channels_last():
    return trained(lambda: Conv(norm=False).double().to(memory_format=torch.channels_last), batch=PICTURES)


@refused("modules", "sparse gradients", "D0838")
def _sparse():
    return trained(**words(sparse=True), clip=1e9)


@refused("modules", "an embedding with max_norm", "D0838")
def _max_norm():
    return trained(**words(max_norm=1.0))


@refused("modules", "an output that torch does not look into", "D0836")
def _opaque():
    return trained(lambda: Wrapped().double(), loss=lambda m, b: F.mse_loss(m(b["x"]).y, b["y"]))


@refused("modules", "hooks on parameters that were there before prepare", "D0838")
def _parameter_hooks():
    def build():
        model = Net().double()
        model.head.weight.register_hook(lambda gradient: gradient * 0)
        model.layers[0].a.weight.register_hook(lambda gradient: gradient * 2)
        return model

    return trained(build)


# Optimizers


class Trust(torch.optim.Optimizer):
    """Steps by ratios of norms, which it reads with `item` as LAMB and LARS do."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.01})

    @torch.no_grad()
    def step(self):
        for parameter in [x for group in self.param_groups for x in group["params"]]:
            ratio = parameter.norm().item() / (parameter.grad.norm().item() + 1e-6)
            parameter.add_(parameter.grad, alpha=-0.01 * ratio)


OPTIMIZERS = {
    "AdamW, foreach": lambda x: torch.optim.AdamW(x, foreach=True),
    "AdamW, a loop": lambda x: torch.optim.AdamW(x, foreach=False),
    "AdamW, fused": lambda x: torch.optim.AdamW(x, fused=True),
    "SGD with momentum": lambda x: torch.optim.SGD(x, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "Adagrad": torch.optim.Adagrad,
    "RMSprop": lambda x: torch.optim.RMSprop(x, momentum=0.9, centered=True),
    "NAdam": torch.optim.NAdam,
    "Adadelta": torch.optim.Adadelta,
}
UNSHARDED = {
    "Adafactor": (torch.optim.Adafactor, "RuntimeError of DTensor in the step: in-place pow on a partial norm"),
    "SGD, fused": (lambda x: torch.optim.SGD(x, lr=0.1, fused=True), "NotImplementedError of DTensor in the step"),
    "an optimizer that reads norms with item()": (
        Trust, "SILENT: item() of a DTensor's norm is that of the rank's own part",
    ),
}  # fmt: skip
for _claim, _optimizer in OPTIMIZERS.items():
    case("optimizers", _claim)(
        functools.partial(trained, optimizer=lambda m, of=_optimizer: of(m.parameters()))
    )
for _claim, (_optimizer, _defect) in UNSHARDED.items():
    case("optimizers", _claim, _defect)(
        functools.partial(trained, optimizer=lambda m, of=_optimizer: of(m.parameters()))
    )


@case("optimizers", "an optimizer that has stepped before prepare")
def _stepped_before():
    def adam(model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        mse(model, BATCH).backward()
        optimizer.step()
        optimizer.zero_grad()
        return optimizer

    pair = Pair(optimizer=adam)
    pair.step(2)
    return pair.result()


def prepared_apart(*, model_first: bool, evaluated=None) -> list[str]:
    pair = Pair()  # for the plain loop
    accelerator = pair.accelerator = accelerator_of()
    torch.manual_seed(0)
    model = Net().double()
    if model_first:
        pair.model = accelerator.prepare(model)
        if evaluated is not None:
            with evaluated():
                pair.model(X)
        pair.optimizer = accelerator.prepare(sgd(pair.model))
    else:
        pair.optimizer = accelerator.prepare(sgd(model))
        pair.model = accelerator.prepare(model)
    pair.step(2)
    return pair.result()


case("optimizers", "an optimizer that is made after its model is prepared")(
    functools.partial(prepared_apart, model_first=True)
)
case(
    "optimizers",
    "an optimizer that is prepared before its model",
)(functools.partial(prepared_apart, model_first=False))
case(
    "optimizers",
    "an optimizer that is made after an evaluation",
)(functools.partial(prepared_apart, model_first=True, evaluated=torch.no_grad))


def with_unfrozen(*, evaluated: bool) -> list[str]:
    def frozen():
        model = Net().double()
        model.head.requires_grad_(False)
        return model

    pair = Pair(frozen, optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
    pair.step()
    if evaluated:
        with torch.no_grad():
            pair.model(X)
    for model in (pair.plain, pair.model):
        model.head.requires_grad_(True)
    pair.step(2)
    return pair.result()


case("optimizers", "parameters that are unfrozen later")(functools.partial(with_unfrozen, evaluated=False))
case("optimizers", "parameters that are unfrozen after an evaluation")(
    functools.partial(with_unfrozen, evaluated=True)
)


def with_group_added(*, evaluated: bool) -> list[str]:
    pair = Pair(optimizer=lambda m: sgd(m.layers))
    pair.step()
    if evaluated:
        with torch.no_grad():
            pair.model(X)
    for model, optimizer in ((pair.plain, pair.plain_optimizer), (pair.model, pair.optimizer)):
        model.zero_grad()
        optimizer.add_param_group({"params": list(model.head.parameters()), "lr": 0.2})
    pair.step(2)
    return pair.result()


case("optimizers", "a group that is added later")(functools.partial(with_group_added, evaluated=False))
case("optimizers", "a group that is added after an evaluation")(
    functools.partial(with_group_added, evaluated=True)
)


@case("optimizers", "gradients that are cleared to zeros")
def _zeros():
    pair = Pair()
    for _ in range(3):
        pair.backward()
        for optimizer in (pair.plain_optimizer, pair.optimizer):
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
    return pair.result()


@case("optimizers", "an average of parameters kept up in gathered")
def _averaged():
    pair = Pair()
    averages = []
    for model in (pair.plain, Net().double()):
        averages.append(AveragedModel(model))
    for _ in range(3):
        pair.step()
        averages[0].update_parameters(pair.plain)
        with pair.accelerator.gathered(pair.model) as whole:
            averages[1].update_parameters(whole)
    return differences(averages[1].state_dict(), averages[0].state_dict())


# Loops


def clipped(norm_type: float) -> list[str]:
    pair = Pair()
    for _ in range(2):
        pair.backward()
        pair.clip(0.1, norm_type)
        pair.update()
    return pair.result()


for _norm_type in (1.0, 2.0, 3.0, math.inf):
    case("loops", f"clipping by the {_norm_type:g}-norm")(functools.partial(clipped, _norm_type))


def clipped_by(make_list: Callable) -> list[str]:
    """Clip with a list of parameters that was not taken in the call itself."""
    torch.manual_seed(0)
    model = Net().double()
    before = list(model.parameters())
    pair = Pair()
    pair.accelerator = accelerator_of()
    pair.model, pair.optimizer = pair.accelerator.prepare(model, sgd(model))
    parameters = make_list(pair, before)
    pair.backward()
    expected = nn.utils.clip_grad_norm_(pair.plain.parameters(), 0.1)
    pair.expect("norm", float(pair.accelerator.clip_grad_norm_(parameters, 0.1)), float(expected))
    pair.update()
    return pair.result()


case(
    "loops",
    "clipping what was listed before prepare",
)(functools.partial(clipped_by, lambda _, before: before))


@case("loops", "clipping what was listed after an evaluation")
def _listed_after_evaluation():
    def make_list(pair, _):
        with torch.no_grad():
            pair.model(X)
        return list(pair.model.parameters())

    return clipped_by(make_list)


@case("loops", "clipping by value")
def _clipped_by_value():
    pair = Pair()
    pair.backward()
    nn.utils.clip_grad_value_(pair.plain.parameters(), 0.02)
    pair.accelerator.clip_grad_value_(pair.model.parameters(), 0.02)
    pair.update()
    return pair.result()


@case("loops", "summed losses with counts over two micro-steps")
def _counted():
    pair = Pair(gradient_accumulation_steps=2)
    for index in range(4):
        (mse(pair.plain, BATCH) / 2).backward()
        with pair.accelerator.accumulate(pair.model):
            total = F.mse_loss(pair.model(pair.mine["x"]), pair.mine["y"], reduction="sum")
            pair.accelerator.backward(total, count=pair.mine["y"].numel())
            if index % 2:
                pair.clip(0.3)
                pair.plain_optimizer.step()
                pair.plain_optimizer.zero_grad()
            pair.optimizer.step()
            pair.optimizer.zero_grad()
    return pair.result()


def evaluated_in_each_step(mode: Callable) -> list[str]:
    pair = Pair()
    for _ in range(3):
        with mode():
            found = pair.model(X)
        pair.expect("output", float(found.sum()), float(pair.plain(X).sum()))
        pair.step()
    return pair.result()


case("loops", "evaluations between steps")(functools.partial(evaluated_in_each_step, torch.no_grad))
case(
    "loops",
    "evaluations in inference_mode, the first of them before training",
    "RuntimeError of torch: units that inference_mode has allocated cannot be filled outside; ddp trains",
)(functools.partial(evaluated_in_each_step, torch.inference_mode))


def with_forward_before_update(mode: Callable) -> list[str]:
    pair = Pair()
    for _ in range(3):
        pair.backward()
        with mode():
            pair.model(X)
        pair.update()
    return pair.result()


for _name, _mode in (("without", torch.no_grad), ("with", torch.enable_grad)):
    case(
        "loops",
        f"a forward {_name} grad between backward and step",
    )(functools.partial(with_forward_before_update, _mode))


@case(
    "loops",
    "parameters clamped after an evaluation",
)
def _clamped():
    pair = Pair()
    pair.step()
    with torch.no_grad():
        pair.model(X)
    for model in (pair.plain, pair.model):
        for parameter in model.parameters():
            parameter.data.clamp_(-0.05, 0.05)
    return pair.result()


@case("loops", "two backwards, and a forward that none follows")
def _several_backwards():
    pair = Pair()
    for _ in range(2):
        for model, batch, backward in (
            (pair.plain, pair.whole, torch.Tensor.backward),
            (pair.model, pair.mine, pair.accelerator.backward),
        ):
            model(batch["x"])
            first, second = mse(model, batch), model(batch["x"] * 2).pow(2).mean()
            backward(first)
            backward(second)
        pair.update()
    return pair.result()


def window(pair, micro_steps: int) -> None:
    for _ in range(micro_steps):
        with pair.accelerator.accumulate(pair.model):
            pair.accelerator.backward(mse(pair.model, pair.mine))
            pair.optimizer.step()
            pair.optimizer.zero_grad()


def plain_step(pair) -> None:
    mse(pair.plain, BATCH).backward()
    pair.plain_optimizer.step()
    pair.plain_optimizer.zero_grad()


def shared_folder(accelerator) -> str:
    return accelerator.broadcast_object(tempfile.mkdtemp()) + "/checkpoint"


@case("loops", "state that is saved and read in mid-window")
def _saved_in_mid_window():
    pair = Pair(gradient_accumulation_steps=2)
    for _ in range(2):
        window(pair, 1)
        pair.accelerator.save_state(shared_folder(pair.accelerator))
        pair.accelerator.get_state_dict(pair.model)
        with pair.accelerator.gathered(pair.model) as whole, torch.no_grad():
            whole(X)
        window(pair, 1)
        plain_step(pair)
    return pair.result()


def loaded_in_mid_window(**settings) -> list[str]:
    pair = Pair(gradient_accumulation_steps=2, **settings)
    folder = shared_folder(pair.accelerator)
    window(pair, 2)
    plain_step(pair)
    pair.accelerator.save_state(folder)
    window(pair, 1)
    pair.accelerator.load_state(folder)
    window(pair, 2)
    plain_step(pair)
    return pair.result()


case("loops", "load_state in mid-window")(loaded_in_mid_window)
case("loops", "load_state in mid-window, with reduce_each_micro_step")(
    functools.partial(loaded_in_mid_window, fsdp={"reduce_each_micro_step": True})
)


@case("loops", "zero_grad after a micro-step in no_sync")
def _cleared_in_mid_window():
    pair = Pair()
    with pair.accelerator.no_sync(pair.model):
        pair.accelerator.backward(mse(pair.model, pair.mine))
    pair.model.zero_grad()
    pair.step()
    return pair.result()


@case("loops", "an epoch that is left in mid-window")
def _left_in_mid_window():
    def run(strategy):
        accelerator = accelerator_of(strategy, gradient_accumulation_steps=2)
        torch.manual_seed(0)
        model = Net().double()
        data = TensorDataset(torch.arange(24.0).view(24, 1).expand(24, 6).double() / 24, torch.zeros(24, 3))
        model, optimizer, loader = accelerator.prepare(model, sgd(model), DataLoader(data, batch_size=2))
        for _ in range(3):
            for index, (x, y) in enumerate(loader):
                with accelerator.accumulate(model):
                    accelerator.backward(F.mse_loss(model(x), y.double()))
                    optimizer.step()
                    optimizer.zero_grad()
                if index == 2:
                    break
        return {name: x.clone() for name, x in accelerator.get_state_dict(model).items()}

    return differences(run("fsdp"), run("ddp"))


@case("loops", "a forward that all ranks give up, and go on")
def _given_up():
    pair = Pair()
    pair.step()
    handle = pair.model.layers[1].a.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pair.model(X)
    handle.remove()
    pair.step(2)
    return pair.result()


@case("loops", "an adversarial pair")
def _adversarial():
    accelerator = accelerator_of()
    sides = []
    for prepare in (lambda *x: x, accelerator.prepare):
        torch.manual_seed(0)
        maker, judge = Net().double(), nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1)).double()
        sides.append(prepare(maker, judge, sgd(maker), sgd(judge)))
    ways = (BATCH, torch.Tensor.backward), (part(BATCH, accelerator), accelerator.backward)
    for (maker, judge, makers, judges), (batch, backward) in zip(sides, ways, strict=True):
        for _ in range(3):
            with torch.no_grad():
                fake = maker(batch["x"])
            backward(judge(fake).mean() - judge(batch["y"]).mean())
            judges.step()
            judges.zero_grad()
            judge.requires_grad_(False)
            backward(-judge(maker(batch["x"])).mean())
            makers.step()
            makers.zero_grad()
            judge.requires_grad_(True)
            for parameter in judge.parameters():
                parameter.data.clamp_(-0.3, 0.3)
    accelerator.check_in_sync()
    return [
        name
        for plain, sharded in zip(sides[0][:2], sides[1][:2], strict=True)
        for name in differences(accelerator.get_state_dict(sharded), plain.state_dict())
    ]


@case("loops", "a student of a teacher that is only placed")
def _taught():
    pair = Pair()
    torch.manual_seed(7)
    plain = Net().double()
    torch.manual_seed(7)
    teacher = pair.accelerator.prepare_model(Net().double(), evaluation_mode=True)

    def loss(model, batch):
        with torch.no_grad():
            wanted = (plain if model is pair.plain else teacher)(batch["x"])
        return mse(model, batch) + F.mse_loss(model(batch["x"]), wanted)

    pair.loss = loss
    pair.step(3)
    return pair.result() + differences(pair.accelerator.get_state_dict(teacher), plain.state_dict(), atol=0)


@case("loops", "two accelerators, and a pair that is prepared twice")
def _two_accelerators():
    pairs = Pair(), Pair(optimizer=functools.partial(sgd, lr=0.05))
    for _ in range(2):
        for pair in pairs:
            pair.model, pair.optimizer = pair.accelerator.prepare(pair.model, pair.optimizer)
            pair.step()
    return pairs[0].result() + pairs[1].result()


def compiled(*, before: bool) -> list[str]:
    pair = Pair()
    torch.manual_seed(0)
    model = Net().double()
    optimizer = sgd(model)
    if before:
        model = torch.compile(model, backend="eager")
    pair.model, pair.optimizer = pair.accelerator.prepare(model, optimizer)
    if not before:
        pair.model = torch.compile(pair.model, backend="eager")
    for _ in range(2):
        pair.backward()
        pair.clip(0.5)
        pair.update()
    return pair.result()


case("loops", "a model that is compiled before prepare")(functools.partial(compiled, before=True))
case("loops", "a model that is compiled after prepare")(functools.partial(compiled, before=False))


@case("loops", "a part that is called in gathered before any forward")
def _part_in_gathered():
    pair = Pair()
    with pair.accelerator.gathered(pair.model) as whole, torch.no_grad():
        found = whole.layers[0](X)
    pair.expect("output", float(found.sum()), float(pair.plain.layers[0](X).sum()))
    pair.step()
    return pair.result()


def changed_in_gathered(change: Callable) -> list[str]:
    pair = Pair()
    torch.manual_seed(9)
    change(pair.plain)
    torch.manual_seed(9)
    with pair.accelerator.gathered(pair.model) as whole:
        change(whole)
    mse(pair.plain, BATCH).backward()
    pair.accelerator.backward(mse(pair.model, pair.mine))
    pair.update()
    return pair.result()


@torch.no_grad()
def scale_some(model) -> None:
    model.head.weight.mul_(2)
    model.layers[0].a.weight.data = model.layers[0].a.weight.data * 3


case("loops", "values changed in gathered")(functools.partial(changed_in_gathered, scale_some))
case(
    "loops",
    "load_state_dict in gathered",
)(functools.partial(changed_in_gathered, lambda model: model.load_state_dict(Net().double().state_dict())))


def replace_head(model) -> None:
    model.head = nn.Linear(6, 3).double()


@refused("loops", "a module that is replaced in gathered", "D0837")
def _replaced_in_gathered():
    pair = Pair(optimizer=lambda m: sgd(m.layers))
    torch.manual_seed(9)
    replace_head(pair.plain)
    torch.manual_seed(9)
    with pair.accelerator.gathered(pair.model) as whole:
        replace_head(whole)
    for model, optimizer in ((pair.plain, pair.plain_optimizer), (pair.model, pair.optimizer)):
        optimizer.add_param_group({"params": list(model.head.parameters()), "lr": 0.1})
    pair.step(2)
    return pair.result()


@case(
    "loops",
    "a state dict that is taken in gathered",
)
def _state_dict_in_gathered():
    pair = Pair()
    with pair.accelerator.gathered(pair.model) as whole:
        found = {name: x.detach().clone() for name, x in whole.state_dict().items()}
    return [name for name, x in found.items() if type(x) is not torch.Tensor] + differences(
        found, pair.plain.state_dict(), atol=0
    )


# Models of transformers


def language_loss(model, batch):
    return model(input_ids=batch["x"], labels=batch["x"]).loss


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=61, hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).double()


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=61, n_positions=32, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return GPT2LMHeadModel(config).double()


def bert():
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=61, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20,
        max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForMaskedLM(config).double()


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=61, d_model=16, d_kv=8, d_ff=20, num_layers=2, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).double()


def mixtral():
    """Six experts of which a token takes one: some are unused on a rank, or on all."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=61, hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, num_local_experts=6, num_experts_per_tok=1,
    )  # fmt: skip
    return MixtralForCausalLM(config)


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=20, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=5,
    )  # fmt: skip
    return ViTForImageClassification(config).double()


def lora():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=2, lora_alpha=4, target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True
    )
    return get_peft_model(gpt2(), config)


# Parts of these models compute in float32 whatever their weights are in, so rounding differs with the batch's size.
LANGUAGE = {"batch": {"x": TOKENS}, "loss": language_loss, "tolerance": 1e-5}
enter_all(
    "transformers",
    {
        "Llama with tied embeddings": lambda: trained(llama, **LANGUAGE),
        "T5": lambda: trained(t5, **LANGUAGE),
        "LoRA on GPT-2": lambda: trained(lora, **LANGUAGE),
    },
)
enter_all(
    "more transformers",
    {
        "GPT-2": lambda: trained(gpt2, **LANGUAGE),
        "BERT": lambda: trained(bert, **LANGUAGE),
        "Mixtral": lambda: trained(mixtral, **LANGUAGE),
        "ViT": lambda: trained(
            vit,
            batch={"x": IMAGES, "y": LABELS},
            loss=lambda m, b: m(pixel_values=b["x"], labels=b["y"]).loss,
        ),
    },
)


@case("transformers", "adapters that are saved read back")
def _adapters():
    from peft import PeftModel

    pair = Pair(lora, batch={"x": TOKENS}, loss=language_loss)
    pair.step(2)
    folder = shared_folder(pair.accelerator)
    pair.accelerator.save_model(pair.model, folder, adapter="default")
    torch.manual_seed(0)
    back = PeftModel.from_pretrained(gpt2(), folder).double()
    return differences(back.state_dict(), pair.accelerator.get_state_dict(pair.model))


@case(
    "transformers",
    "save_pretrained in gathered",
)
def _save_pretrained():
    from safetensors.torch import load_file

    pair = Pair(llama, batch={"x": TOKENS}, loss=language_loss)
    folder = tempfile.mkdtemp()  # of each rank: what one rank raises alone, the others would wait for
    with pair.accelerator.gathered(pair.model) as whole:
        whole.save_pretrained(folder)
    if not pair.accelerator.is_main_process:  # on which transformers writes nothing
        return []
    found, expected = load_file(f"{folder}/model.safetensors"), pair.plain.state_dict()
    return differences(found, {name: expected[name] for name in found}, atol=0)


def generated(build, *, trained_first: bool, gathered: bool) -> list[str]:
    pair = Pair(build, batch={"x": TOKENS}, loss=language_loss)
    if trained_first:
        pair.step()
    options = {"max_new_tokens": 4, "do_sample": False}
    expected = pair.plain.generate(TOKENS, **options)
    if gathered:
        with pair.accelerator.gathered(pair.model) as whole:
            found = whole.generate(TOKENS, **options)
    else:
        found = pair.model.generate(TOKENS, **options)
    if not torch.equal(found, expected):
        pair.bad.append("other tokens")
    pair.step()
    return pair.result(atol=1e-5)


for _kind, _gathered, _trained in [
    (llama, False, False),
    (llama, True, True),
    (t5, True, True),
    (t5, True, False),
]:
    case(
        "transformers",
        f"{_kind.__name__} generates{' in gathered' if _gathered else ''}{'' if _trained else ' before training'}",
    )(functools.partial(generated, _kind, trained_first=_trained, gathered=_gathered))


# The tests


@pytest.mark.parametrize("claim", claims("modules"))
def test_modules_and_parameters_of_every_kind_train_as_in_one_process(claim):
    assert [found[claim] for found in outcomes_on(2, "modules")] == ["", ""]


@pytest.mark.parametrize("claim", claims("optimizers"))
def test_optimizers_step_as_in_one_process(claim):
    assert [found[claim] for found in outcomes_on(2, "optimizers")] == ["", ""]


@pytest.mark.parametrize("claim", claims("loops"))
def test_loops_of_every_shape_train_as_in_one_process(claim):
    assert [found[claim] for found in outcomes_on(2, "loops")] == ["", ""]


@pytest.mark.parametrize("claim", claims("transformers"))
def test_models_of_transformers_train_and_generate_as_in_one_process(claim):
    pytest.importorskip("peft", reason="install the extra with transformers and peft")
    assert [found[claim] for found in outcomes_on(2, "transformers")] == ["", ""]


@pytest.mark.slow
@pytest.mark.parametrize("claim", claims("more transformers"))
def test_more_models_of_transformers_train_as_in_one_process(claim):
    pytest.importorskip("transformers", reason="install transformers")
    assert [found[claim] for found in outcomes_on(2, "more transformers")] == ["", ""]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("group", "claim"),
    [
        pytest.param(group, *param.values, id=f"{group}: {param.id}", marks=param.marks)
        for group in ("modules", "optimizers", "loops")
        for param in claims(group)
    ],
)
def test_three_ranks_do_as_one_process(group, claim):
    assert [found[claim] for found in outcomes_on(3, group)] == [""] * 3


def small_clipped_by_the_largest() -> list[str]:
    pair = Pair(lambda: Odd().double())
    pair.backward()
    pair.clip(0.1, math.inf)
    return pair.bad


def test_the_largest_element_is_found_where_a_rank_has_an_empty_part():
    assert run_ranks(small_clipped_by_the_largest, 2, timeout_s=20) == [[], []]


def one_batch_more(first_ranks_batches: int) -> float:
    pair = Pair()
    pair.step()
    batches = first_ranks_batches if pair.accelerator.is_main_process else 2
    with torch.no_grad():
        for _ in range(batches):
            pair.model(X)
    return float(pair.accelerator.reduce(torch.tensor(1.0)))


def test_an_evaluation_of_one_batch_more_on_one_rank_ends_the_job():
    assert run_ranks(one_batch_more, 2, 2) == [2.0, 2.0]
    with pytest.raises(AssertionError, match=r"rank \d of 2 failed"):
        run_ranks(one_batch_more, 2, 3, timeout_s=30)
