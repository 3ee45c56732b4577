"""Tensors of safetensors files, alone or with the index that Hugging Face libraries write."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from distrib.checkpoint.convert.source import Stored, beside, dtype_of, refuse
from distrib.checkpoint.format import parse_json
from distrib.checkpoint.plan import whole_box

INDEX = ".index.json"
_MOST_INDEX_BYTES = 64 * 2**20


def read_file(path: Path) -> dict[str, Stored]:
    """Return the tensors of one file; each is read when it is asked for.

    Raises:
        CheckpointError: if the file is damaged.
    """
    try:
        file: Any = safe_open(path, framework="pt")
        found = {}
        for name in file.keys():  # noqa: SIM118 (it is no mapping)
            part = file.get_slice(name)
            shape = tuple(part.get_shape())
            get = partial(_read, file, name, str(path))
            found[name] = Stored(
                shape, dtype_of(part.get_dtype(), f"{path}: {name}"), ((whole_box(shape), get),)
            )
        return found
    except (SafetensorError, OSError) as error:
        refuse(str(path), f"cannot be read as safetensors: {error}")


def index_of(path: Path) -> dict[str, Any]:
    """Return the file name of each tensor that an index lists.

    Raises:
        CheckpointError: if it is no index.
    """
    if path.stat().st_size > _MOST_INDEX_BYTES:
        refuse(str(path), f"is {path.stat().st_size} bytes long; expected at most {_MOST_INDEX_BYTES}")
    document = parse_json(path.read_bytes(), str(path))
    names = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(names, dict):
        refuse(str(path), "has no weight_map")
    return names


def read_indexed(path: Path) -> dict[str, Stored]:
    """Return the tensors of all files that an index lists.

    Raises:
        CheckpointError: if one is missing, or does not hold what the index says.
    """
    where = index_of(path)
    files = {
        name: read_file(beside(path.parent, name, path)) for name in sorted(set(map(_text, where.values())))
    }
    for tensor, file in where.items():
        if tensor not in files[_text(file)]:
            refuse(str(path), f"says that {tensor!r} lies in {file!r}, where it does not")
    return {tensor: files[_text(file)][tensor] for tensor, file in where.items()}


def _text(name: Any) -> str:
    return name if isinstance(name, str) else json.dumps(name)


def _read(file: Any, name: str, where: str) -> torch.Tensor:
    try:
        tensor: torch.Tensor = file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        refuse(where, f"tensor {name!r} cannot be read: {error}")
    return tensor
