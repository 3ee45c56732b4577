"""What Hugging Face libraries want beside the weights: configuration, generation settings, tokenizer, adapter settings."""

from __future__ import annotations

import copy
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distrib.checkpoint.agreement import on_main
from distrib.checkpoint.export import Include, export_adapter, export_model
from distrib.checkpoint.storage import Storage, remove_tree
from distrib.collectives.base import Collectives
from distrib.state import ShardedState


def write_model(
    directory: str | Path,
    model: nn.Module,
    state: ShardedState,
    collectives: Collectives,
    *,
    max_shard_size: int | str = "10GB",
    dtype: torch.dtype | None = None,
    include: Include | None = None,
    adapter: str | None = None,
    tokenizer: Any = None,
) -> list[str]:
    """Write a model and all that belongs to it, as `from_pretrained` loads it. Collective.

    Args:
        directory: Made if it is missing; only rank 0 needs to see it.
        model: The plain model.
        state: This rank's slices of it, under "model/".
        collectives: The ranks that hold it.
        max_shard_size: Of one file, in bytes or as "5GB"; an adapter is one file whatever this says.
        dtype: Converts floating-point weights; None leaves them.
        include: Shell patterns of names, or a function of a name; None for all, or all of the adapter.
        adapter: Name of an adapter in PEFT's model: it alone is written, as PEFT reads it.
        tokenizer: Anything with `save_pretrained`, which is saved beside the weights.

    Returns:
        The names of the files beside the weights.

    Raises:
        CheckpointError: on every rank, if there is nothing to write, or rank 0 cannot.
    """
    if adapter is None:
        export_model(
            directory, state, collectives, max_shard_size=max_shard_size, dtype=dtype, include=include
        )
    else:
        export_adapter(directory, state, collectives, adapter=adapter, dtype=dtype, include=include)
    return write_companions(directory, model, collectives, tokenizer=tokenizer, dtype=dtype, adapter=adapter)


def write_companions(
    directory: str | Path,
    model: nn.Module,
    collectives: Collectives,
    *,
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
    adapter: str | None = None,
    storage: Storage | None = None,
) -> list[str]:
    """Write the files that belong to an exported model. Collective; rank 0 writes.

    They are `config.json` and `generation_config.json`, where the model has such objects of transformers'
    (`model.config`, `model.generation_config`), and what the tokenizer saves. Each file appears whole under its name.

    Args:
        directory: That of the weights; it exists.
        model: The plain model.
        collectives: The ranks.
        tokenizer: Anything with `save_pretrained`: a tokenizer, an image processor.
        dtype: That of the weights in the file; by default that of the model's own. It is noted in `config.json`.
        adapter: Name of an adapter in PEFT's model: its `adapter_config.json` takes the place of the first two.
        storage: The file operations; tests make them fail.

    Returns:
        The names of the files, on every rank.

    Raises:
        CheckpointError: on every rank, if rank 0 cannot write.
    """
    files, target = storage or Storage(), Path(directory).absolute()
    savers = [*_settings(model, dtype, adapter), *([tokenizer] if tokenizer is not None else [])]
    return on_main(collectives, "writing the model's settings", lambda: _write(files, target, savers))


def _write(storage: Storage, target: Path, savers: list[Any]) -> list[str]:
    temp = target / f".settings.tmp-{secrets.token_hex(6)}"
    storage.make_dir(temp)
    try:
        for each in savers:
            each.save_pretrained(str(temp))
        names = sorted(str(file.relative_to(temp)) for file in temp.rglob("*") if file.is_file())
        for name in names:
            storage.make_dirs((target / name).parent)
            storage.rename(temp / name, target / name)
        return names
    finally:
        remove_tree(storage, temp)


def _settings(model: nn.Module, dtype: torch.dtype | None, adapter: str | None) -> Iterator[Any]:
    """Yield copies of the settings, as they describe the weights that are written."""
    if adapter is not None:
        settings = copy.deepcopy(getattr(model, "peft_config", {}).get(adapter))
        if settings is not None:
            settings.inference_mode = True  # as PEFT writes it: whoever loads it decides whether to train on
            yield settings
        return
    config = getattr(model, "config", None)
    if hasattr(config, "save_pretrained"):
        yield _described(copy.deepcopy(config), model, dtype or _dtype_of(model))
    generation = getattr(model, "generation_config", None)
    if hasattr(generation, "save_pretrained"):
        yield generation


def _described(config: Any, model: nn.Module, dtype: torch.dtype | None) -> Any:
    config.architectures = [
        type(model).__name__.removeprefix("FSDP")
    ]  # fully_shard puts that before a class's name
    if dtype is not None:  # its key was torch_dtype before transformers 4.56
        setattr(
            config, "dtype" if hasattr(config, "dtype") else "torch_dtype", str(dtype).removeprefix("torch.")
        )
    return config


def _dtype_of(model: nn.Module) -> torch.dtype | None:
    return next((x.dtype for x in model.parameters() if x.is_floating_point()), None)
