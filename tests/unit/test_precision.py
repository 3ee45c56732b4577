"""bf16 on one process: what is computed in which number format, and what the model can still do afterwards."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from distrib import Accelerator
from distrib.devices import DEVICES
from distrib.errors import StrategyError
from distrib.precision import (
    PrecisionPolicy,
    apply_precision,
    autocast,
    remove_precision,
    resolve_precision,
)

pytestmark = pytest.mark.usefixtures("plain_process")

CPU = torch.device("cpu")
BF16 = PrecisionPolicy("bf16", compute=torch.bfloat16, output=torch.float32)


class Output(NamedTuple):
    logits: Tensor
    more: Any


class Net(nn.Module):
    """Notes the format of a matrix product and of its input; returns a nested output."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.product: torch.dtype | None = None

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Output:
        """Return logits and a bag of other values."""
        logits = self.layer(x) * scale
        self.product = logits.dtype
        self.calls += 1
        return Output(logits, {"ids": logits.argmax(1), "half": x.half(), "word": "kept", "list": [logits]})


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    yield accelerator
    accelerator.end_training()


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def inputs() -> Tensor:
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


def rounded(model: nn.Module, x: Tensor) -> Tensor:
    """The truth: the product of both factors rounded to bf16, in bf16, then widened."""
    layer = model.layer if isinstance(model, Net) else model
    return nn.functional.linear(x.bfloat16(), layer.weight.bfloat16(), layer.bias.bfloat16()).float()


# The forward pass


def test_products_are_computed_in_bf16_and_outputs_are_wide(accelerator: Accelerator):
    model = accelerator.prepare(net())
    out = model(inputs())
    assert model.product is torch.bfloat16
    assert out.logits.dtype is torch.float32
    assert torch.equal(out.logits, rounded(model, inputs()))


def test_wide_outputs_reach_into_containers_and_leave_everything_else(accelerator: Accelerator):
    out = accelerator.prepare(net())(inputs())
    assert isinstance(out, Output)
    assert out.more["list"][0].dtype is torch.float32
    assert out.more["ids"].dtype is torch.int64
    assert out.more["half"].dtype is torch.float16  # the user's own format, not the policy's
    assert out.more["word"] == "kept"


def test_arguments_reach_the_forward_as_they_are(accelerator: Accelerator):
    model = accelerator.prepare(net())
    assert torch.equal(model(inputs(), scale=2.0).logits, model(x=inputs()).logits * 2)


def test_without_mixed_precision_the_model_is_untouched():
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    model = net()
    forward = model.forward
    assert accelerator.prepare(model) is model
    assert model.forward == forward
    assert "forward" not in vars(model)
    assert model(inputs()).logits.dtype is torch.float32
    assert model.product is torch.float32


def test_parameters_gradients_and_optimizer_state_stay_fp32(accelerator: Accelerator):
    model = net()
    model, optimizer = accelerator.prepare(model, torch.optim.Adam(model.parameters()))
    accelerator.backward(model(inputs()).logits.square().mean())
    optimizer.step()
    for parameter in model.parameters():
        assert parameter.dtype is torch.float32
        assert parameter.grad is not None
        assert parameter.grad.dtype is torch.float32
        assert optimizer.state[parameter]["exp_avg"].dtype is torch.float32


def test_bf16_training_follows_fp32_training_within_rounding():
    found = []
    for mixed_precision in ("no", "bf16"):
        accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision)
        model = net()
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        for _ in range(20):
            loss = (model(inputs()).logits - 1).square().mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        found.append(loss.item())
    assert found[0] != found[1]
    assert found[1] == pytest.approx(found[0], rel=0.05)  # bf16 has 8 bits: 0.4 % per product


def test_hooks_of_the_model_still_run(accelerator: Accelerator):
    model = net()
    seen = []
    model.register_forward_hook(lambda module, given, out: seen.append(out.logits.dtype))
    accelerator.prepare(model)(inputs())
    assert seen == [torch.float32]


def test_autocast_outside_a_model_computes_in_bf16(accelerator: Accelerator):
    with accelerator.autocast():
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype is torch.bfloat16
    assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.float32


def test_autocast_without_mixed_precision_changes_nothing():
    with Accelerator(cpu=True).autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.float32


def test_two_accelerators_have_a_precision_each():
    models = [Accelerator(cpu=True, mixed_precision=name).prepare(net()) for name in ("bf16", "no")]
    assert [x(inputs()).logits.dtype for x in models] == [torch.float32] * 2
    assert [x.product for x in models] == [torch.bfloat16, torch.float32]


# Evaluation


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_gives_what_the_training_forward_gives(accelerator: Accelerator, mode: Any):
    model = accelerator.prepare(net())
    trained = model(inputs()).logits
    model.eval()
    with mode():
        evaluated = model(inputs()).logits
    assert not evaluated.requires_grad
    assert torch.equal(evaluated, trained.detach())


def test_a_training_step_after_an_evaluation_has_all_gradients(accelerator: Accelerator):
    model = accelerator.prepare(net())
    with torch.no_grad():
        model(inputs())
    accelerator.backward(model(inputs()).logits.sum())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name


def test_a_model_prepared_for_evaluation_computes_in_bf16_too(accelerator: Accelerator):
    model = accelerator.prepare_model(net(), evaluation_mode=True)
    with torch.no_grad():
        assert torch.equal(model(inputs()).logits, rounded(model, inputs()))


def test_an_evaluation_sees_the_weights_of_the_last_step(accelerator: Accelerator):
    model = net()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
    with torch.no_grad():
        before = model(inputs()).logits
    accelerator.backward(model(inputs()).logits.sum())
    optimizer.step()
    with torch.no_grad():
        after = model(inputs()).logits
    assert torch.equal(after, rounded(model, inputs()))
    assert not torch.equal(after, before)


def test_activation_checkpointing_recomputes_in_the_same_format(accelerator: Accelerator):
    class Checkpointed(Net):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False).logits

    gradients = []
    for cls in (Net, Checkpointed):
        torch.manual_seed(0)
        model = accelerator.prepare(cls())
        out = model(inputs())
        accelerator.backward((out.logits if cls is Net else out).square().sum())
        gradients.append(model.layer.weight.grad)
    assert torch.equal(*gradients)


# Taking it off, copying, pickling


def test_remove_precision_gives_the_plain_forward_back(accelerator: Accelerator):
    model = net()
    plain = model(inputs()).logits
    prepared = accelerator.prepare(model)
    assert not torch.equal(prepared(inputs()).logits, plain)
    assert remove_precision(prepared) is prepared
    assert "forward" not in vars(prepared)
    assert torch.equal(prepared(inputs()).logits, plain)


def test_remove_precision_gives_a_forward_of_the_instance_back(accelerator: Accelerator):
    model = net()
    own = model.forward = lambda x: nn.functional.linear(x, model.layer.weight, model.layer.bias)  # type: ignore[method-assign,assignment]
    accelerator.prepare(model)
    assert torch.equal(model(inputs()), rounded(model, inputs()))  # type: ignore[arg-type]
    remove_precision(model)
    assert model.forward is own


def test_removing_what_is_not_there_changes_nothing():
    model = net()
    assert remove_precision(model) is model
    assert "forward" not in vars(model)


def test_applying_it_twice_is_applying_it_once():
    model = apply_precision(net(), BF16, CPU)
    forward = vars(model)["forward"]
    assert apply_precision(model, BF16, CPU) is model
    assert vars(model)["forward"] is forward


@pytest.mark.parametrize("keep", [True, False])
def test_unwrap_model_keeps_or_takes_off_the_precision(accelerator: Accelerator, keep: bool):
    model = accelerator.prepare(net())
    plain = accelerator.unwrap_model(model, keep_fp32_wrapper=keep)
    plain(inputs())
    assert plain is model
    assert (plain.product is torch.bfloat16) == keep


def test_the_signature_and_name_of_the_forward_stay_visible(accelerator: Accelerator):
    import inspect

    model = accelerator.prepare(net())
    assert list(inspect.signature(model.forward).parameters) == ["x", "scale"]
    assert model.forward.__name__ == "forward"
    assert model.forward.__doc__ == Net.forward.__doc__


def test_the_class_and_other_instances_are_not_changed(accelerator: Accelerator):
    accelerator.prepare(net())
    other = net()
    other(inputs())
    assert other.product is torch.float32


def test_names_of_parameters_and_modules_stay_as_they_were(accelerator: Accelerator):
    model = net()
    names = list(model.state_dict()), [name for name, _ in model.named_modules()]
    accelerator.prepare(model)
    assert (list(model.state_dict()), [name for name, _ in model.named_modules()]) == names


def test_a_deep_copy_computes_in_bf16_with_weights_of_its_own(accelerator: Accelerator):
    model = accelerator.prepare(net())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.layer.weight.zero_()
    out = twin(inputs()).logits
    assert twin.product is torch.bfloat16
    assert torch.equal(out, rounded(twin, inputs()))
    assert float(twin.layer.weight.detach().abs().sum()) > 0
    assert int(model.calls) == 0


def pickled(model: nn.Module) -> nn.Module:
    copied: nn.Module = pickle.loads(pickle.dumps(model))
    return copied


def saved(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded: nn.Module = torch.load(buffer, weights_only=False)
    return loaded


@pytest.mark.parametrize("how", [pickled, saved])
def test_a_prepared_model_survives_pickling_with_weights_of_its_own(accelerator: Accelerator, how: Any):
    model = accelerator.prepare(net())
    twin = how(model)
    expected = model(inputs()).logits
    with torch.no_grad():
        model.layer.weight.zero_()
    out = twin(inputs()).logits
    assert type(twin) is Net
    assert out.dtype is torch.float32
    torch.testing.assert_close(out, expected, rtol=0.02, atol=0.02)  # whether in bf16 or not


# torch.compile


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("compiled", ["before prepare", "after prepare", "in place before", "in place after"])
def test_a_compiled_model_computes_in_bf16_and_trains(accelerator: Accelerator, compiled: str):
    model = nn.Linear(8, 4)
    own = model
    if compiled == "before prepare":
        model = torch.compile(model, backend="eager")  # type: ignore[assignment]
    elif compiled == "in place before":
        model.compile(backend="eager")
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(own.parameters(), lr=0.1))
    if compiled == "after prepare":
        model = torch.compile(model, backend="eager")  # type: ignore[assignment]
    elif compiled == "in place after":
        model.compile(backend="eager")

    for _ in range(2):
        expected = rounded(own, inputs())
        with accelerator.accumulate(model):
            out = model(inputs())
            assert out.dtype is torch.float32
            assert torch.equal(out, expected)
            before = own.weight.detach().clone()
            accelerator.backward(out.square().mean())
            optimizer.step()
            optimizer.zero_grad()
        assert not torch.equal(own.weight, before)
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(inputs()), rounded(own, inputs()))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("compiled", ["before prepare", "after prepare"])
def test_a_compiled_model_is_unwrapped_to_the_users_own(accelerator: Accelerator, compiled: str):
    own = nn.Linear(8, 4)
    if compiled == "before prepare":
        prepared = accelerator.prepare(torch.compile(own, backend="eager"))
    else:
        prepared = torch.compile(accelerator.prepare(own), backend="eager")
    assert accelerator.unwrap_model(prepared, keep_torch_compile=False) is own
    assert accelerator.unwrap_model(prepared, keep_torch_compile=True) is prepared
    plain = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False, keep_torch_compile=False)
    assert torch.equal(plain(inputs()), nn.functional.linear(inputs(), own.weight, own.bias))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("compiled", ["before prepare", "after prepare"])
def test_a_compiled_model_is_exported_under_plain_names(
    accelerator: Accelerator, tmp_path: Path, compiled: str
):
    own = nn.Linear(8, 4)
    if compiled == "before prepare":
        prepared = accelerator.prepare(torch.compile(own, backend="eager"))
    else:
        prepared = torch.compile(accelerator.prepare(own), backend="eager")
    accelerator.save_model(prepared, tmp_path)
    assert sorted(load_file(tmp_path / "model.safetensors")) == ["bias", "weight"]


def test_the_state_dict_of_a_compiled_model_has_plain_names(accelerator: Accelerator):
    prepared = accelerator.prepare(torch.compile(nn.Linear(8, 4), backend="eager"))
    assert list(accelerator.get_state_dict(prepared)) == ["weight", "bias"]


@pytest.mark.usefixtures("fresh_compiler")
def test_precision_is_taken_off_a_compiled_model_that_is_kept(accelerator: Accelerator):
    own = nn.Linear(8, 4)
    prepared = accelerator.prepare(torch.compile(own, backend="eager"))
    kept = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert torch.equal(kept(inputs()), nn.functional.linear(inputs(), own.weight, own.bias))


# The policy


def test_no_is_a_policy_that_leaves_everything():
    assert resolve_precision("no", DEVICES.get("cpu")()) == PrecisionPolicy()
    assert PrecisionPolicy().compute is None


def test_bf16_keeps_parameters_and_widens_outputs():
    assert resolve_precision("bf16", DEVICES.get("cpu")()) == BF16
    assert BF16.param is None
    assert BF16.reduce is None


def test_a_policy_without_a_compute_dtype_opens_no_autocast():
    with autocast(PrecisionPolicy(), CPU):
        assert not torch.is_autocast_enabled("cpu")
    with autocast(BF16, CPU):
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") is torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")


def test_a_device_without_bf16_refuses_it_with_its_reason():
    class Old(DEVICES.get("cpu")):  # type: ignore[misc]
        name = "old"

        def supports(self, dtype: torch.dtype) -> tuple[bool, str]:
            return dtype is not torch.bfloat16, "it was made in 1999"

    with pytest.raises(StrategyError, match=r"D0801.*old does not support bf16: it was made in 1999"):
        resolve_precision("bf16", Old())
