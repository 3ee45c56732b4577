from __future__ import annotations

import pytest
import torch

from distrib.devices import DEVICES
from distrib.devices.cpu import CpuDevice
from distrib.devices.cuda import CudaDevice
from distrib.errors import TopologyError


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> CudaDevice:
    """A CUDA back-end whose torch sees two GPUs."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return CudaDevice()


@pytest.mark.parametrize("name", list(DEVICES))
def test_a_device_is_registered_under_torchs_name(name: str) -> None:
    assert DEVICES.get(name).name == name
    assert torch.device(name).type == name


@pytest.mark.parametrize("name", list(DEVICES))
def test_availability_comes_with_a_reason(name: str) -> None:
    available, reason = DEVICES.get(name)().available()
    assert isinstance(available, bool)
    assert reason


def test_every_local_rank_shares_the_cpu() -> None:
    assert CpuDevice().bind(5) == torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_dtype_the_cpu_supports_can_be_trained_in(dtype: torch.dtype) -> None:
    assert CpuDevice().supports(dtype)[0]
    layer = torch.nn.Linear(2, 2, dtype=dtype)
    layer(torch.ones(1, 2, dtype=dtype)).sum().backward()
    assert layer.weight.grad is not None


def test_an_integer_format_is_not_supported() -> None:
    assert not CpuDevice().supports(torch.int8)[0]


def test_restoring_the_cpus_generator_repeats_its_numbers() -> None:
    cpu = CpuDevice()
    state = cpu.rng_state()
    assert state is not None
    first = torch.rand(4)
    cpu.set_rng_state(state)
    assert torch.equal(torch.rand(4), first)


def test_seeding_the_cpu_repeats_its_numbers() -> None:
    cpu = CpuDevice()
    cpu.seed(7)
    first = torch.rand(4)
    cpu.seed(7)
    assert torch.equal(torch.rand(4), first)


def test_the_cpus_memory_in_use_is_part_of_all() -> None:
    memory = CpuDevice().memory()
    assert 0 < memory.used_bytes < memory.total_bytes


def test_a_torch_without_cuda_says_so(cuda: CudaDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    available, reason = cuda.available()
    assert not available
    assert "without CUDA" in reason


def test_a_driver_that_does_not_work_is_told_from_a_missing_gpu(
    cuda: CudaDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "driver does not work" in cuda.available()[1]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "no GPU is visible" in cuda.available()[1]


def test_a_local_rank_is_bound_to_the_gpu_of_its_number(
    cuda: CudaDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    bound: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", bound.append)
    assert cuda.bind(1) == torch.device("cuda", 1)
    assert bound == [1]


def test_a_local_rank_without_a_gpu_is_refused(cuda: CudaDevice) -> None:
    with pytest.raises(TopologyError, match="D0211"):
        cuda.bind(2)


@pytest.mark.parametrize(("capability", "supported"), [((8, 0), False), ((8, 9), True), ((9, 0), True)])
def test_float8_is_for_gpus_that_multiply_in_it(
    cuda: CudaDevice, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], supported: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    found = f"compute capability {capability[0]}.{capability[1]}, and float8_e4m3fn needs 8.9"
    assert cuda.supports(torch.float8_e4m3fn) == (supported, found)


@pytest.mark.parametrize(("capability", "supported"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_bfloat16_is_for_gpus_that_have_it(
    cuda: CudaDevice, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], supported: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert cuda.supports(torch.bfloat16)[0] is supported
