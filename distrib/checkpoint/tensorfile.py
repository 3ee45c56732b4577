"""Writing a safetensors file as a stream: no second copy of a tensor, checksums computed on the way.

Format: https://github.com/huggingface/safetensors#format (8 bytes of header length, JSON header, data).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash

from distrib.checkpoint.format import ITEMSIZE, FileRecord, checksum
from distrib.checkpoint.plan import Shape, numel
from distrib.checkpoint.storage import Storage, writing
from distrib.checkpoint.store import Write
from distrib.collectives.packing import flat_bytes
from distrib.errors import CheckpointError

_CHUNK = 2**20  # bytes hashed and written together, so that the second finds them in the cache
_BLOCK = 64 * 2**20  # bytes copied from a device at a time
_ALIGN = 64  # bytes; where the data begin


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its key, and how to get it when its turn comes."""

    key: str
    shape: Shape
    dtype: str
    get: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Size of its data."""
        return numel(self.shape) * ITEMSIZE[self.dtype]


@dataclass(frozen=True)
class Written:
    """What was written: the file's record, and (offset, checksum) of each entry in the order given."""

    record: FileRecord
    parts: tuple[tuple[int, str], ...]


def in_file_order(dtype: str, key: str) -> tuple[int, str]:
    """Sort key of a tensor within its file: wide elements first, so that all data are aligned."""
    return -ITEMSIZE[dtype], key


def header(entries: Sequence[Entry], metadata: Mapping[str, str]) -> bytes:
    """Return the file's first bytes, up to the data.

    Raises:
        CheckpointError: if two entries have the same key.
    """
    table: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for entry in entries:
        if entry.key in table or entry.key == "__metadata__":
            raise CheckpointError(
                "D0716",
                f"two tensors would have the name {entry.key!r} in one safetensors file",
                fix="rename one of the parameters or buffers",
            )
        table[entry.key] = {
            "dtype": entry.dtype,
            "shape": entry.shape,
            "data_offsets": [at, at + entry.nbytes],
        }
        at += entry.nbytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGN)
    return len(text).to_bytes(8, "little") + text


def write_tensors(
    storage: Storage,
    path: Path,
    entries: Sequence[Entry],
    *,
    durable: bool,
    metadata: Mapping[str, str] | None = None,
) -> Written:
    """Write `entries`, sorted by `in_file_order`, to a new file.

    Args:
        storage: The file operations.
        path: A file that does not exist.
        entries: The tensors; each is asked for when its turn comes.
        durable: Whether to return only when the bytes are on the medium.
        metadata: Texts for the header's `__metadata__`.

    Raises:
        CheckpointError: if an entry's tensor has not the shape and dtype it promised.
        OSError: if the file system refuses.
    """
    head = header(entries, metadata or {})
    with writing(storage, path, durable=durable) as write:
        return stream_tensors(write, head, entries)


def stream_tensors(write: Write, head: bytes, entries: Sequence[Entry]) -> Written:
    """Write the `header` of `entries` and their data, to wherever `write` appends.

    Raises:
        CheckpointError: if an entry's tensor has not the shape and dtype it promised.
    """
    write(head)
    at, parts = len(head), []
    for entry in entries:
        parts.append((at, _write(write, entry)))
        at += entry.nbytes
    return Written(FileRecord(at, len(head), checksum(head)), tuple(parts))


def write_bytes(storage: Storage, path: Path, data: bytes, *, durable: bool) -> FileRecord:
    """Write a small file whole and return its record."""
    with writing(storage, path, durable=durable) as write:
        write(data)
    return record_of(data)


def record_of(data: bytes | memoryview) -> FileRecord:
    """Return the record of a file that holds no tensors of ours, which is checksummed whole."""
    return FileRecord(len(data), len(data), checksum(data))


def _write(write: Write, entry: Entry) -> str:
    tensor = entry.get()
    if tensor.numel() * tensor.element_size() != entry.nbytes or tensor.layout is not torch.strided:
        raise CheckpointError(
            "D0710",
            f"tensor {entry.key!r} is {tensor.dtype} {tuple(tensor.shape)} ({tensor.layout}), "
            f"but was announced as {entry.dtype} {entry.shape}",
            fix="do not change the model or optimizer while it is being saved",
        )
    hasher = xxhash.xxh3_64()
    for chunk in chunks(tensor):
        hasher.update(chunk)
        write(chunk)
    return hasher.hexdigest()


def chunks(tensor: torch.Tensor) -> Iterator[memoryview]:
    """Yield a tensor's bytes, row-major, as views of host memory."""
    flat = flat_bytes(tensor)
    for begin in range(0, flat.numel(), _BLOCK):
        host = flat[begin : begin + _BLOCK].cpu().numpy().data
        for start in range(0, len(host), _CHUNK):
            yield host[start : start + _CHUNK]
