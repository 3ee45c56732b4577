"""What a report adds to a failure: what to try, and which limit may be behind it."""

from __future__ import annotations

import resource

import pytest
from distrib_launcher.advice import advice_on
from distrib_launcher.limits import limits_behind


@pytest.mark.parametrize(
    ("message", "part"),
    [
        ("OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", "a smaller micro-batch"),
        ("ModuleNotFoundError: No module named 'einops'", "install the module there"),
        ("RuntimeError: DataLoader worker (pid 7) is killed by signal: Bus error.", "/dev/shm larger"),
        ("RuntimeError: unable to open shared memory object </torch_1>", "/dev/shm larger"),
        ("OSError: [Errno 98] Address already in use", "leave the port out"),
        ("DistNetworkError: The server socket has failed to listen: EADDRINUSE", "leave the port out"),
        ("OSError: [Errno 28] No space left on device: '/data/x'", "make room"),
        ("OSError: [Errno 122] Disk quota exceeded", "make room"),
        ("RuntimeError: CUDA error: device-side assert triggered", "CUDA_LAUNCH_BLOCKING=1"),
        (
            "ValueError: Default process group has not been initialized, please make sure to call init_process_group.",
            "make the Accelerator before",
        ),
        (
            "RuntimeError: Expected to have finished reduction in the prior iteration before starting a new one.",
            "ddp.find_unused_parameters: true",
        ),
        (
            "RuntimeError: ... to use freeze_support() in the main module",
            'under `if __name__ == "__main__":`',
        ),
        (
            "RuntimeError: make sure that the main module can be safely imported: safely importable",
            "__main__",
        ),
        ("DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:77, unhandled cuda error", "NCCL_DEBUG=INFO"),
    ],
)
def test_a_message_that_is_known_gets_its_advice(message: str, part: str) -> None:
    assert part in advice_on(message)
    assert advice_on(message.upper()) == advice_on(message)


@pytest.mark.parametrize(
    "message",
    [
        "",
        "ValueError: no",
        "KeyError: 'model'",
        "RuntimeError: mat1 and mat2 shapes cannot be multiplied (4x8 and 16x2)",
        "TypeError: forward() got an unexpected keyword argument 'mask'",
        "AssertionError: the loss is not finite at step 12",
        "RuntimeError: Expected all tensors to be on the same device, but found cuda:0 and cpu",
        "FileNotFoundError: [Errno 2] No such file or directory: 'data/train.bin'",
        "ConnectionError: Connection refused by the data server",
        "ImportError: cannot import name 'AdamW' from 'transformers'",
        "RuntimeError: Error(s) in loading state_dict for Net: size mismatch for head.weight",
        "ValueError: the process group of rank 3 has 2 members",
    ],
)
def test_an_ordinary_message_gets_no_advice_and_no_limit(message: str) -> None:
    assert advice_on(message) == ""
    assert limits_behind(message, lambda _: 1 << 20) == []


def limited(number: int, value: int) -> dict[int, int]:
    everything = ("AS", "DATA", "NPROC", "NOFILE", "FSIZE")
    return {getattr(resource, f"RLIMIT_{name}"): resource.RLIM_INFINITY for name in everything} | {
        number: value
    }


@pytest.mark.parametrize(
    ("text", "number", "told"),
    [
        (
            "MemoryError: ",
            resource.RLIMIT_AS,
            "virtual memory of a process is limited to 4096 KiB (`ulimit -v`)",
        ),
        (
            "OSError: [Errno 12] Cannot allocate memory",
            resource.RLIMIT_DATA,
            "data of a process is limited to 4096 KiB (`ulimit -d`)",
        ),
        (
            "RuntimeError: can't start new thread",
            resource.RLIMIT_NPROC,
            "processes and threads of a user is limited to 4194304 (`ulimit -u`)",
        ),
        (
            "BlockingIOError: [Errno 11] Resource temporarily unavailable",
            resource.RLIMIT_NPROC,
            "processes and threads of a user is limited to 4194304 (`ulimit -u`)",
        ),
        (
            "OSError: [Errno 24] Too many open files",
            resource.RLIMIT_NOFILE,
            "open files of a process is limited to 4194304 (`ulimit -n`)",
        ),
        (
            "OSError: [Errno 27] File too large",
            resource.RLIMIT_FSIZE,
            "size of a file is limited to 4096 KiB (`ulimit -f`)",
        ),
    ],
)
def test_a_limit_in_force_is_named_with_its_size_and_command(text: str, number: int, told: str) -> None:
    assert limits_behind(text, limited(number, 1 << 22).__getitem__) == [told]


@pytest.mark.parametrize(
    "text", ["MemoryError", "can't start new thread", "too many open files", "file too large"]
)
def test_without_a_limit_none_is_blamed(text: str) -> None:
    assert limits_behind(text, lambda _: resource.RLIM_INFINITY) == []


def test_both_limits_of_memory_are_named_where_both_are_in_force() -> None:
    assert len(limits_behind("std::bad_alloc", lambda _: 1 << 22)) == 2


def test_by_default_the_limits_are_this_process_s_own() -> None:
    open_files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]

    found = limits_behind("too many open files")

    assert found == (
        []
        if open_files == resource.RLIM_INFINITY
        else [f"open files of a process is limited to {open_files} (`ulimit -n`)"]
    )
