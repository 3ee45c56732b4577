"""Directories of `torch.distributed.checkpoint`: `.metadata`, and `.distcp` files of pieces that torch.save wrote.

The metadata is a pickle. It is read by an unpickler that knows the handful of classes torch puts there, each as an inert
record, and refuses all others.
"""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from distrib.checkpoint.convert.pickles import Refused, Restricted, load_bytes
from distrib.checkpoint.convert.recognise import recognise
from distrib.checkpoint.convert.source import Found, Stored, beside, refuse
from distrib.checkpoint.plan import coverage_problem
from distrib.errors import CheckpointError
from distrib.state import Box

METADATA = ".metadata"
_MOST_METADATA_BYTES = 2**30
_META, _FILES = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"


class _Record:
    """What stands for an object of torch's: its attributes, and no behaviour."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})


class _Chunked(_Record):
    """TensorStorageMetadata."""

    size: Any
    properties: Any
    chunks: Any


class _Bytes(_Record):
    """BytesStorageMetadata."""


class _Piece(NamedTuple):
    """Bytes of a file that torch.save wrote."""

    folder: Path
    file: Any
    start: int
    length: int
    verify: bool

    def read(self, name: str) -> Any:
        """Return what they hold; `name` is for messages."""
        file = beside(self.folder, self.file, self.folder / METADATA)
        stop, size = self.start + self.length, file.stat().st_size
        if not 0 <= self.start <= stop <= size:
            refuse(str(file), f"is {size} bytes long; {name!r} should be bytes {self.start} to {stop}")
        with file.open("rb") as opened:
            opened.seek(self.start)
            return load_bytes(opened.read(self.length), f"{file}: {name}", verify=self.verify)


def _allowed() -> dict[tuple[str, str], Any]:
    records = ("Metadata", "ChunkStorageMetadata", "TensorProperties", "MetadataIndex", "StorageMeta")
    dtypes = {
        ("torch", str(x).removeprefix("torch.")): x
        for x in vars(torch).values()
        if isinstance(x, torch.dtype)
    }
    paths = ("pathlib", "pathlib._local")
    return {
        **{(_META, name): _Record for name in (*records, "_MEM_FORMAT_ENCODING")},
        (_META, "TensorStorageMetadata"): _Chunked,
        (_META, "BytesStorageMetadata"): _Bytes,
        (_FILES, "_StorageInfo"): _Record,
        ("torch", "Size"): torch.Size,
        ("torch.serialization", "_get_layout"): _Record,
        ("collections", "OrderedDict"): OrderedDict,
        **{
            (module, name): _Record
            for module in paths
            for name in ("PosixPath", "WindowsPath", "PurePosixPath")
        },
        **dtypes,
    }


def fits(path: Path) -> bool:
    """Whether a source is for this converter."""
    return (path / METADATA).is_file()


def read(path: Path, *, verify: bool) -> Found:
    """Return what the directory holds."""
    return recognise("torch.distributed.checkpoint", tree_of(path, verify=verify), str(path))


def tree_of(path: Path, *, verify: bool) -> dict[Any, Any]:
    """Return the state dict that was saved to a directory, with `Stored` for tensors.

    Args:
        path: The directory.
        verify: Whether to compare the checksums of what is read.

    Raises:
        CheckpointError: if the metadata name something else than torch does, or contradict themselves or the files.
    """
    metadata = _metadata(path / METADATA)
    where = str(path / METADATA)
    try:
        pieces = {
            (key.fqn, _offset(key)): _Piece(
                path, info.relative_path, int(info.offset), int(info.length), verify
            )
            for key, info in metadata.storage_data.items()
        }
        leaves = {
            name: _leaf(name, value, pieces, path) for name, value in metadata.state_dict_metadata.items()
        }
        return _nested(
            {tuple((metadata.planner_data or {}).get(name, (name,))): x for name, x in leaves.items()}
        )
    except (AttributeError, TypeError, ValueError, KeyError) as error:
        refuse(where, f"is not what torch writes: {type(error).__name__}: {error}")


def _metadata(file: Path) -> Any:
    size = file.stat().st_size
    if size > _MOST_METADATA_BYTES:
        refuse(str(file), f"is {size} bytes long; expected at most {_MOST_METADATA_BYTES}")
    data = file.read_bytes()
    try:
        return Restricted(io.BytesIO(data), _allowed()).load()
    except Refused as error:
        raise CheckpointError(
            "D0722",
            f"names {error}, which torch does not put there; to load it could run code of the file's",
            where=str(file),
            fix="do not load it; it was changed on purpose, or another storage wrote it",
        ) from error
    except Exception as error:  # noqa: BLE001 (what an unpickler makes of damaged bytes can be any error)
        refuse(str(file), f"cannot be read: {type(error).__name__}: {error}")


def _offset(key: Any) -> tuple[int, ...] | None:
    offset = vars(key).get("offset")
    return None if offset is None else tuple(offset)


def _leaf(name: str, value: Any, pieces: Mapping[Any, _Piece], path: Path) -> Any:
    if isinstance(value, _Bytes):
        return _piece(pieces, name, None, path).read(name)
    if not isinstance(value, _Chunked):
        refuse(str(path / METADATA), f"says nothing about {name!r} that torch would")
    shape, dtype = tuple(value.size), value.properties.state[0]
    boxes = [Box(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in value.chunks]
    problem = coverage_problem(shape, boxes)
    if problem is not None:
        refuse(str(path / METADATA), f"does not hold tensor {name!r} exactly once: {problem}")
    parts = tuple(
        (box, partial(_chunk, _piece(pieces, name, box.start, path), name, box, dtype)) for box in boxes
    )
    return Stored(shape, dtype, parts)


def _chunk(piece: _Piece, name: str, box: Box, dtype: torch.dtype) -> torch.Tensor:
    tensor = piece.read(name)
    if not isinstance(tensor, torch.Tensor) or (tuple(tensor.shape), tensor.dtype) != (box.size, dtype):
        refuse(
            str(piece.folder),
            f"{name!r} at {list(box.start)} is not the {dtype} tensor of {list(box.size)} that it should be",
        )
    return tensor.detach()


def _piece(pieces: Mapping[Any, _Piece], name: str, offset: tuple[int, ...] | None, path: Path) -> _Piece:
    if (name, offset) not in pieces:
        refuse(str(path / METADATA), f"does not say where {name!r} at {offset} lies")
    return pieces[name, offset]


def _nested(leaves: Mapping[tuple[Any, ...], Any]) -> dict[Any, Any]:
    """Return the tree that has each leaf at its path; an index in a path makes a list."""
    tree: dict[Any, Any] = {}
    for keys, leaf in leaves.items():
        at = tree
        for key in keys[:-1]:
            at = at.setdefault(key, {})
        at[keys[-1]] = leaf
    return {key: _with_lists(value) for key, value in tree.items()}


def _with_lists(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    below = {key: _with_lists(x) for key, x in value.items()}
    if below and all(type(key) is int for key in below) and sorted(below) == list(range(len(below))):
        return [below[at] for at in range(len(below))]
    return below
