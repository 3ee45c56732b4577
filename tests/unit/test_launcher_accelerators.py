from __future__ import annotations

import sys

import pytest
from distrib_launcher.accelerators import count_gpus, processes_for, torch_is_built_for_cuda
from hypothesis import given, strategies as st

EIGHT = [f"nvidia{i}" for i in range(8)]
OTHERS = ["nvidiactl", "nvidia-uvm", "nvidia-caps", "null", "tty0"]


@given(st.integers(1, 64))
def test_each_gpu_in_dev_gets_a_process(gpus: int) -> None:
    files = [*OTHERS, *(f"nvidia{i}" for i in range(gpus))]

    assert count_gpus(files, {})[0] == gpus


def test_without_a_gpu_there_is_one_process() -> None:
    assert count_gpus(OTHERS, {}) == (1, "no GPU was found")


@pytest.mark.parametrize(
    ("visible", "count"),
    [
        ("0,1", 2),
        ("7", 1),
        ("3, 5,6", 3),
        ("", 1),
        ("-1", 1),
        ("0,-1,2", 1),
        ("0,9", 1),
        ("GPU-8932f937,MIG-1/2", 2),
    ],
)
def test_cuda_visible_devices_limits_the_count_and_is_the_reason(visible: str, count: int) -> None:
    assert count_gpus(EIGHT, {"CUDA_VISIBLE_DEVICES": visible}) == (count, f"CUDA_VISIBLE_DEVICES={visible}")


@pytest.mark.parametrize(
    ("text", "cuda"),
    [
        ("cuda: Optional[str] = '12.8'\nhip: Optional[str] = None\n", True),
        ("cuda: Optional[str] = None\nhip: Optional[str] = None\n", False),
        (None, False),
    ],
)
def test_torch_says_whether_it_can_use_the_gpus(text: str | None, cuda: bool) -> None:
    assert torch_is_built_for_cuda(text) is cuda


def test_another_device_gets_one_process() -> None:
    assert processes_for("cpu", {}) == (1, "one for device cpu")


def test_counting_needs_no_torch() -> None:
    loaded = set(sys.modules)

    processes_for("auto", {})

    assert "torch" not in set(sys.modules) - loaded
