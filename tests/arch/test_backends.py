"""Nobody outside `distrib/strategies` asks which strategy it is, and nobody outside `distrib/devices` which device."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from distrib_launcher.backends import BACKENDS

from distrib.devices import DEVICES
from distrib.registry import Registry
from distrib.strategies import STRATEGIES
from distrib.topology.environments import ENVIRONMENTS
from tests.arch.sources import ROOT, below, compared_strings, names_used, place, source_files, tree_of

WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "fully_shard", "DeepSpeedEngine")

# (file, what it compares with): why it may.
STRATEGY_EXCEPTIONS = {
    (
        "launcher/distrib_launcher/planning.py",
        "single",
    ): "the launcher cannot ask a strategy's capabilities, since they live in modules that load torch",
}
DEVICE_EXCEPTIONS = {
    ("distrib/strategies/ddp.py", "cpu"): "torch's wrapper wants no device ids for modules in host memory",
    (
        "distrib/strategies/fsdp.py",
        "cpu",
    ): "offloaded shards are pinned only where there is a device to copy from",
    (
        "distrib/strategies/batchnorm.py",
        "cpu",
    ): "torch's synchronized BatchNorm has no kernel for host memory",
    (
        "distrib/strategies/deepspeed_config.py",
        "cuda",
    ): "DeepSpeed quantizes with kernels for one kind of device",
    ("distrib/checkpoint/transfer.py", "cpu"): "a file is read straight into host memory only",
    ("distrib/topology/threads.py", "cpu"): "the name of a cgroup controller, no device",
    (
        "launcher/distrib_launcher/accelerators.py",
        "cuda",
    ): "the launcher counts GPUs without torch, and knows how for one kind",
}


def classes(registry: Registry[type]) -> set[str]:
    return {target.partition(":")[2] for target in registry.builtin.values()}


def modules(registry: Registry[type]) -> set[str]:
    return {target.partition(":")[0] for target in registry.builtin.values()}


def outside(*folders: str) -> list[Path]:
    inside = below(*folders)
    return [file for file in source_files() if file not in inside]


def comparisons(files: list[Path], names: set[str]) -> set[tuple[str, str]]:
    return {
        (place(file), word) for file in files for word in compared_strings(tree_of(file)) if word in names
    }


def uses(files: list[Path], names: set[str]) -> list[tuple[str, str]]:
    return [
        (place(file), word)
        for file in files
        for word in names_used(tree_of(file))
        if word in names or word.rpartition(".")[2] in names or any(word.startswith(f"{x}.") for x in names)
    ]


def test_nobody_outside_compares_with_a_strategys_name():
    names = set(STRATEGIES.builtin)
    assert comparisons(outside("distrib/strategies/"), names) == set(STRATEGY_EXCEPTIONS)


def test_nobody_outside_names_a_strategys_class_module_or_wrapper():
    names = {*classes(STRATEGIES), *modules(STRATEGIES), *WRAPPERS}
    assert uses(outside("distrib/strategies/"), names) == []


def test_nobody_outside_compares_with_a_devices_name():
    assert comparisons(outside("distrib/devices/"), set(DEVICES.builtin)) == set(DEVICE_EXCEPTIONS)


def test_nobody_outside_names_a_devices_class_module_or_torch_module():
    names = {*classes(DEVICES), *modules(DEVICES), *(f"torch.{name}" for name in DEVICES.builtin)}
    assert uses(outside("distrib/devices/"), names) == []


@pytest.mark.parametrize(
    ("registry", "folder"),
    [
        (STRATEGIES, "distrib/strategies"),
        (DEVICES, "distrib/devices"),
        (ENVIRONMENTS, "distrib/topology/environments"),
        (BACKENDS, "launcher/distrib_launcher/backends"),
    ],
    ids=lambda x: x.kind if isinstance(x, Registry) else "",
)
def test_a_back_end_is_one_file_of_its_folder_and_one_registry_line(registry: Registry[type], folder: str):
    files = [ROOT / folder / f"{module.rpartition('.')[2]}.py" for module in sorted(modules(registry))]
    assert len(files) == len(registry.builtin)
    for file in files:
        assert file.is_file()
    table = (ROOT / folder / "__init__.py").read_text(encoding="utf-8")
    for name, target in registry.builtin.items():
        assert len(re.findall(f'"{name}": "{target}"', table)) == 1


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("if name == 'ddp': pass", {"ddp"}),
        ("x = 'ddp' if n in ('ddp', 'other') else 'single'", {"ddp", "other"}),
        ("match n:\n    case 'ddp': pass", {"ddp"}),
        ("table = {'ddp': 1}", set()),
    ],
)
def test_the_scan_sees_every_form_of_comparison(text: str, found: set[str]):
    import ast

    assert set(compared_strings(ast.parse(text))) == found
