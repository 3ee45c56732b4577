"""How many processes `nproc_per_node: auto` means: one for each accelerator, counted without torch."""

from __future__ import annotations

import importlib.machinery
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from distrib_launcher import tpu

_WITH_XLA = {"xla": True}  # device -> whether ranks that ask for it compute with XLA
_GPU = re.compile(
    r"nvidia\d+"
)  # /dev/nvidia0, ...; the driver makes one for each GPU that this container may use
_CUDA_BUILD = re.compile(r"^cuda\b[^=\n]*=\s*['\"]", re.MULTILINE)  # `cuda: Optional[str] = '12.8'`, or None


def processes_for(device: str, env: Mapping[str, str]) -> tuple[int, str]:
    """Return how many processes to start on this machine, at least 1, and the reason in a few words.

    Args:
        device: The setting `device`.
        env: CUDA_VISIBLE_DEVICES in it limits what counts.
    """
    if not may_use_gpus(device):
        return 1, f"one for device {device}"
    if not torch_is_built_for_cuda(_torch_version_file()):
        return 1, "torch is built without CUDA"
    return count_gpus(_device_files(), env)


def may_use_xla(device: str, env: Mapping[str, str]) -> bool:
    """Whether the ranks will compute with XLA, by the setting `device`.

    With `auto` they do where torch_xla is installed and there is a TPU, or PJRT_DEVICE says what to use instead.
    """
    if device != "auto":
        return _WITH_XLA.get(device, False)
    return tpu.xla_is_installed() and bool(env.get("PJRT_DEVICE") or tpu.find_chips().count)


def may_use_gpus(device: str) -> bool:
    """Whether the ranks may compute on NVIDIA GPUs, by the setting `device`."""
    return device in ("auto", "cuda")


def count_gpus(device_files: Iterable[str], env: Mapping[str, str]) -> tuple[int, str]:
    """Count the NVIDIA GPUs that a process may use; 1 if there is none.

    Args:
        device_files: Names of the files in /dev.
        env: CUDA_VISIBLE_DEVICES in it names some of them, up to the first that is not valid.
    """
    gpus = sum(1 for name in device_files if _GPU.fullmatch(name))
    visible = env.get("CUDA_VISIBLE_DEVICES")
    if not gpus:
        return 1, "no GPU was found"
    if visible is None:
        return gpus, f"one for each GPU in /dev: {gpus}"
    named = 0
    for word in visible.split(","):
        if not _is_gpu(word.strip(), gpus):
            break
        named += 1
    return max(1, named), f"CUDA_VISIBLE_DEVICES={visible}"


def torch_is_built_for_cuda(version_file: str | None) -> bool:
    """Say what torch's own `version.py` says; False if there is no torch."""
    return version_file is not None and _CUDA_BUILD.search(version_file) is not None


def _is_gpu(word: str, gpus: int) -> bool:
    if word.isdigit():
        return int(word) < gpus
    return word.startswith(("GPU-", "MIG-"))


def _device_files() -> list[str]:
    try:
        return os.listdir("/dev")  # noqa: PTH208 (names only)
    except OSError:
        return []


def _torch_version_file() -> str | None:
    found = importlib.machinery.PathFinder.find_spec("torch")  # finds the package without importing it
    if found is None or found.origin is None:
        return None
    try:
        return Path(found.origin).with_name("version.py").read_text(encoding="utf-8")
    except OSError:
        return None
