"""Loading into other number formats and other tied names than those that were saved."""

import pytest
import torch

from distrib.checkpoint import Contents, open_checkpoint, save, verify
from distrib.collectives.single import SingleCollectives
from distrib.errors import CheckpointError
from distrib.state import Interval, ShardedState, Slice, whole

ALONE = SingleCollectives()
VALUES = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


def state_of(tensors, aliases=None):
    return ShardedState({name: (whole(name, x),) for name, x in tensors.items()}, {}, aliases or {})


@pytest.fixture
def saved(tmp_path):
    state = state_of({"model/w": VALUES}, {"model/tied": "model/w"})
    return save(
        tmp_path / "saved", Contents(state=state, info={"strategy": "ddp", "config": {"a": (1, None)}}), ALONE
    )


def fill(directory, state):
    with open_checkpoint(directory, ALONE) as reader:
        reader.check(state)
        reader.fill(state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_values_are_converted_to_the_dtype_they_are_loaded_into(saved, dtype):
    target = torch.zeros(4, 3, dtype=dtype)
    fill(saved, state_of({"model/w": target}))
    assert torch.equal(target, VALUES.to(dtype))


def test_an_interval_of_another_dtype_is_converted(saved):
    target = torch.zeros(6, dtype=torch.bfloat16)
    part = Slice("model/w", (4, 3), torch.bfloat16, Interval(2, 8), lambda: target)
    fill(saved, ShardedState({"model/w": (part,)}))
    assert torch.equal(target, VALUES.reshape(-1)[2:8].bfloat16())


def test_floating_point_values_are_not_loaded_into_integers(saved):
    target = torch.zeros(4, 3, dtype=torch.int64)
    with pytest.raises(CheckpointError, match="stored as float32") as caught:
        fill(saved, state_of({"model/w": target}))
    assert caught.value.code == "D0708"
    assert not target.any()


def test_a_view_into_a_larger_tensor_is_filled_and_nothing_else_of_it(saved):
    whole_tensor = torch.zeros(8, 6)
    view = whole_tensor[::2, 1:4]
    fill(saved, state_of({"model/w": view}))
    assert torch.equal(view, VALUES)
    assert whole_tensor.count_nonzero() == VALUES.count_nonzero()


def test_a_tied_tensor_is_found_under_its_other_name(saved):
    target = torch.zeros(4, 3)
    fill(saved, state_of({"model/tied": target}, {"model/w": "model/tied"}))
    assert torch.equal(target, VALUES)


def test_a_tensor_tied_only_here_is_found_under_the_stored_name(tmp_path):
    directory = save(tmp_path / "c", Contents(state=state_of({"model/w": VALUES})), ALONE)
    target = torch.zeros(4, 3)
    fill(directory, state_of({"model/a": target}, {"model/w": "model/a"}))
    assert torch.equal(target, VALUES)


def test_a_tensor_tied_only_there_fills_both_names(saved):
    first, second = torch.zeros(4, 3), torch.zeros(4, 3)
    fill(saved, state_of({"model/w": first, "model/tied": second}))
    assert torch.equal(first, VALUES)
    assert torch.equal(second, VALUES)


def test_the_configuration_of_the_run_comes_back(saved):
    with open_checkpoint(saved, ALONE) as reader:
        assert reader.info["strategy"] == "ddp"
        assert reader.info["config"] == {"a": (1, None)}


def test_verify_names_file_and_tensor(saved):
    path = saved / "model" / "rank-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="model/w") as caught:
        verify(saved)
    assert caught.value.where == str(path)
