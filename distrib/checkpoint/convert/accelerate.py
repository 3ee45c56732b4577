"""Directories of Accelerate's `save_state`, and of Hugging Face models: weights, optimizer, scheduler, scaler, objects.

One process and DDP write model.safetensors (or pytorch_model.bin) and optimizer.bin; FSDP writes pytorch_model_fsdp.bin,
or DCP directories pytorch_model_fsdp_0/ and optimizer_0/; DeepSpeed writes its own checkpoint into pytorch_model/.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import count, takewhile
from pathlib import Path
from typing import Any

from distrib.checkpoint.convert import dcp, deepspeed
from distrib.checkpoint.convert.pickles import load, load_trusted
from distrib.checkpoint.convert.safetensor import INDEX, index_of, read_file, read_indexed
from distrib.checkpoint.convert.source import Found, beside, numbered_files, refuse, stored_tree, values_of
from distrib.errors import CheckpointError

_SAFE, _PICKLED, _FSDP = "model", "pytorch_model", "pytorch_model_fsdp"
_RANK_FILES = re.compile(rf"{_FSDP}(?:_\d+)?_rank\d+\.bin")
_LOADERS = re.compile(r"(?:sampler|dl_state_dict)(?:_\d+)?\.bin")


def fits(path: Path) -> bool:
    """Whether a source is for this converter."""
    names = (f"{_SAFE}.safetensors", f"{_PICKLED}.bin", f"{_FSDP}.bin")
    return path.is_dir() and (
        any((path / each).exists() for name in names for each in (name, name + INDEX))
        or any((path / each).is_dir() for each in (f"{_FSDP}_0", _PICKLED))
        or any(_RANK_FILES.fullmatch(each.name) for each in path.iterdir())
    )


def read(path: Path, *, allow_pickle: bool, verify: bool) -> Found:
    """Return what the directory holds.

    Args:
        path: The directory.
        allow_pickle: Whether objects that were registered may be unpickled where they are no plain values.
        verify: Whether to compare the checksums of pieces within files.

    Raises:
        CheckpointError: if a file is damaged, or would have to be unpickled.
    """
    _refuse_rank_files(path)
    custom = [_custom(file, allow_pickle=allow_pickle) for file in _counted(path, "custom_checkpoint_{}.pkl")]
    scaler = path / "scaler.pt"
    zero = deepspeed.read(path / _PICKLED) if (path / _PICKLED).is_dir() else None
    return Found(
        "accelerate",
        zero.models if zero else list(_models(path, verify=verify)),
        zero.optimizers if zero else list(_optimizers(path, verify=verify)),
        [load(file) for file in numbered_files(path, "scheduler", ".bin")],
        load(scaler) if scaler.is_file() else None,
        custom,
        zero.step if zero else None,
        [*(zero.left_out if zero else ()), *_left_out(path)],
    )


def _models(path: Path, *, verify: bool) -> Iterable[Mapping[str, Any]]:
    shards = list(_counted(path, f"{_FSDP}_{{}}"))
    if shards:
        return [dcp.tree_of(each, verify=verify).get("model", {}) for each in shards]
    if (path / f"{_FSDP}.bin").is_file():
        return [_state_dict(file) for file in numbered_files(path, _FSDP, ".bin")]
    for index in (path / f"{_SAFE}.safetensors{INDEX}", path / f"{_PICKLED}.bin{INDEX}"):
        if index.is_file():
            return [read_indexed(index) if index.name.split(".")[0] == _SAFE else _indexed_pickles(index)]
    found: list[Mapping[str, Any]] = [read_file(x) for x in numbered_files(path, _SAFE, ".safetensors")]
    return found or [_state_dict(file) for file in numbered_files(path, _PICKLED, ".bin")]


def _optimizers(path: Path, *, verify: bool) -> Iterable[Mapping[str, Any]]:
    shards = list(_counted(path, "optimizer_{}"))
    if shards:
        return [dcp.tree_of(each, verify=verify).get("optimizer", {}) for each in shards]
    return [stored_tree(load(file), str(file)) for file in numbered_files(path, "optimizer", ".bin")]


def _state_dict(file: Path) -> Mapping[str, Any]:
    found = stored_tree(load(file), str(file))
    return found if isinstance(found, Mapping) else refuse(str(file), f"holds a {type(found).__name__}")


def _indexed_pickles(index: Path) -> Mapping[str, Any]:
    where = index_of(index)
    files = {
        str(name): _state_dict(beside(index.parent, name, index)) for name in dict.fromkeys(where.values())
    }
    missing = next((tensor for tensor, file in where.items() if tensor not in files[file]), None)
    if missing is not None:
        refuse(str(index), f"says that {missing!r} lies in {where[missing]!r}, where it does not")
    return {tensor: files[file][tensor] for tensor, file in where.items()}


def _counted(path: Path, pattern: str) -> Iterable[Path]:
    """Return what is there of pattern 0, 1, 2 ..."""
    return takewhile(Path.exists, (path / pattern.format(at) for at in count()))


def _custom(file: Path, *, allow_pickle: bool) -> Any:
    try:
        return values_of(load(file))
    except CheckpointError as error:
        if error.code != "D0722":
            raise
        if allow_pickle:
            return load_trusted(file)
        fix = "if you trust whoever wrote it, convert with --allow-pickle; else move the file away to leave it out"
        raise CheckpointError(error.code, error.problem, where=error.where, fix=fix) from error


def _left_out(path: Path) -> list[str]:
    names = sorted(each.name for each in path.iterdir())
    loaders = [name for name in names if _LOADERS.fullmatch(name)]
    rng = [name for name in names if re.fullmatch(r"random_states_\d+\.pkl", name)]
    found = []
    if rng:
        found.append(f"random states: {', '.join(rng)} are pickles, which are not opened")
    if loaders:
        found.append(f"positions of loaders: {', '.join(loaders)} do not tell which samples were used")
    return found


def _refuse_rank_files(path: Path) -> None:
    found = next((each for each in path.iterdir() if _RANK_FILES.fullmatch(each.name)), None)
    if found is not None:
        raise CheckpointError(
            "D0724",
            "is one rank's part of a model, which does not say what part",
            where=str(found),
            fix="load it in Accelerate and save it with state_dict_type SHARDED_STATE_DICT or FULL_STATE_DICT",
        )
