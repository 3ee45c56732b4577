"""What the command line does with one checkpoint in one process."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path

import torch

from distrib.checkpoint.export import export_adapter, export_model
from distrib.checkpoint.location import Url, locate
from distrib.checkpoint.progress import Progress, no_progress, watched
from distrib.checkpoint.reader import Reader, open_checkpoint
from distrib.checkpoint.storage import Storage
from distrib.checkpoint.stored import stored_state
from distrib.checkpoint.tensorfile import write_bytes
from distrib.collectives.single import SingleCollectives
from distrib.errors import CheckpointError
from distrib.strategies.slices import module_prefix

_MOST_SETTINGS_BYTES = 2**24


def open_alone(path: str | Path | Url, *, verify: bool = True) -> Reader:
    """Open a checkpoint for one process, whatever wrote it."""
    return open_checkpoint(path, SingleCollectives(), verify=verify)


def local_directory(place: str | Path, what: str) -> Path:
    """Return the absolute path of a directory to write to.

    Args:
        place: A path, or a file:// URL.
        what: What is written there, for the message: "an export".

    Raises:
        CheckpointError: if it is the URL of an object store.
    """
    found = locate(place)
    if isinstance(found, Url):
        raise CheckpointError(
            "D0741",
            f"is a URL; {what} is written to a directory",
            where=str(found),
            fix="write it to a directory, and copy that: aws s3 cp --recursive, gcloud storage cp -r, huggingface-cli upload",
        )
    return found


def export_checkpoint(
    reader: Reader,
    out: str | Path,
    *,
    model: int = 0,
    adapter: str | None = None,
    dtype: str | None = None,
    max_shard_size: int | str = "10GB",
    include: Sequence[str] | None = None,
    settings: tuple[Path, str] | None = None,
    progress: Progress = no_progress,
) -> Path:
    """Write a stored model as Hugging Face libraries read it, with one tensor in memory at a time.

    Args:
        reader: The checkpoint.
        out: The directory to write to; no URL.
        model: Which model, by the order in which the run prepared them.
        adapter: Name of the adapter that alone is to be written; None for the whole model.
        dtype: "bfloat16" and the like, for floating-point tensors; None leaves them.
        max_shard_size: As for `export_model`; an adapter is one file.
        include: Shell patterns of names.
        settings: A file to copy into the directory, and its name there.
        progress: Told about the bytes written.

    Raises:
        CheckpointError: if nothing is to be exported, the settings cannot be read, or `out` not be written.
    """
    folder = local_directory(out, "an export")
    data = _read_settings(settings[0]) if settings else b""
    prefix = module_prefix(model)
    state = watched(stored_state(reader, prefix), progress)
    alone, as_dtype = SingleCollectives(), None if dtype is None else getattr(torch, dtype)
    if adapter is None:
        target = export_model(
            folder,
            state,
            alone,
            prefix=prefix,
            max_shard_size=max_shard_size,
            dtype=as_dtype,
            include=include,
        )
    else:
        target = export_adapter(
            folder, state, alone, prefix=prefix, adapter=adapter, dtype=as_dtype, include=include
        )
    if settings:
        _place(target, settings[1], data)
    return target


def _read_settings(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_SETTINGS_BYTES + 1)
    except OSError as error:
        raise CheckpointError(
            "D0725",
            f"cannot be read: {error.strerror}",
            where=str(path),
            fix="name the model's settings file",
        ) from error
    if len(data) > _MOST_SETTINGS_BYTES:
        raise CheckpointError(
            "D0725",
            f"is longer than {_MOST_SETTINGS_BYTES} bytes, so that it can be no settings file",
            where=str(path),
            fix="name the model's config.json or adapter_config.json",
        )
    return data


def _place(target: Path, name: str, data: bytes) -> None:
    storage, temp = Storage(), target / f".{name}.tmp-{secrets.token_hex(6)}"
    try:
        write_bytes(storage, temp, data, durable=True)
        storage.rename(temp, target / name)
    except OSError as error:
        raise CheckpointError(
            "D0725",
            f"cannot be written: {error.strerror}",
            where=str(target / name),
            fix="see that the disk has room and you may write there",
        ) from error
