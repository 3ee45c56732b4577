"""One reader for all: rank 0 reads every batch and sends each rank its own, in one collective per micro-step."""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distrib.collectives.base import Collectives
from distrib.collectives.packing import flat_bytes
from distrib.data.options import Round
from distrib.errors import DataError

_HEADER = 16  # bytes: length of the message, and the capacity that a longer one needs
_FIRST_CAPACITY = 2**16
_ALIGN = 16
_LONGEST = 500  # characters of an error


def dispatched(rounds: Iterator[Round] | None, collectives: Collectives) -> Iterator[Round]:
    """Yield this rank's part of what rank 0 reads. Collective.

    Args:
        rounds: On rank 0 the rounds with all ranks' shares; None elsewhere.
        collectives: The ranks.

    Raises:
        DataError: on every rank, if reading fails on rank 0.
    """
    post = _Post(collectives)
    while True:
        messages, error = _read(rounds, post.world_size) if rounds is not None else (None, None)
        received = post.deliver(messages)
        if error is not None:
            raise error
        if received is None:
            return
        if isinstance(received, _Failure):
            raise DataError("D0515", f"rank 0, which reads for all, failed: {received.text}")
        yield received


class _Failure(NamedTuple):
    """What the other ranks are told of an error of rank 0, which need not survive a pickle."""

    text: str


def _read(rounds: Iterator[Round], world_size: int) -> tuple[list[bytearray], Exception | None]:
    """Return a message for each rank: its part of the next round, None at the end, or what went wrong."""
    try:
        found = next(rounds, None)
        parts = [None] * world_size if found is None else _parts(found)
        return [_packed(part) for part in parts], None
    except Exception as error:  # noqa: BLE001 (the other ranks wait for a message)
        failure = _Failure(f"{type(error).__name__}: {error}"[:_LONGEST])
        return [_packed(failure)] * world_size, error


def _parts(found: Round) -> list[Any]:
    """Return the round of each rank."""
    return [
        Round(found.step, (share,), (weight,), [batch], found.correction, found.state, found.last)
        for share, weight, batch in zip(found.shares, found.weights, found.batches, strict=True)
    ]


class _Post:
    """Sends one message to each rank: tensors as bytes, all else pickled, both in one buffer whose size is kept."""

    def __init__(self, collectives: Collectives) -> None:
        self._collectives, self.world_size = collectives, collectives.world_size
        self._capacity = _FIRST_CAPACITY

    def deliver(self, messages: list[bytearray] | None) -> Any:
        """Return what this rank is sent; `messages` are given on rank 0, packed. Collective."""
        needed = max(map(len, messages)) if messages is not None else 0
        found = self._scatter(messages, needed)
        length, capacity = found[:_HEADER].view(torch.int64).tolist()
        if capacity > self._capacity:  # all ranks hear of it, and the message comes in a larger buffer
            self._capacity = capacity
            found = self._scatter(messages, 0)
            length = int(found[:8].view(torch.int64))
        return _unpacked(found[_HEADER : _HEADER + length])

    def _scatter(self, messages: list[bytearray] | None, needed: int) -> Tensor:
        received = torch.empty(_HEADER + self._capacity, dtype=torch.uint8)
        sent = None
        if messages is not None:
            larger = 2 * needed if needed > self._capacity else 0
            sent = [self._framed(message, larger) for message in messages]
        return self._collectives.scatter_(received, sent)

    def _framed(self, message: bytearray, larger: int) -> Tensor:
        buffer = torch.empty(_HEADER + self._capacity, dtype=torch.uint8)
        buffer[:_HEADER] = torch.tensor([len(message), larger]).view(torch.uint8)
        if not larger:
            buffer[_HEADER : _HEADER + len(message)] = torch.frombuffer(message, dtype=torch.uint8)
        return buffer


class _Pickler(pickle.Pickler):
    """Leaves tensors out of the pickle, wherever they are; their bytes follow behind it."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5)
        self.data, self._at = list[Tensor](), 0

    def persistent_id(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return None
        flat = flat_bytes(x.cpu())
        at, self._at = self._at, self._at + _aligned(flat.numel())
        self.data.append(flat)
        return x.dtype, tuple(x.shape), at


class _Unpickler(pickle.Unpickler):
    """Puts the tensors back."""

    def __init__(self, file: io.BytesIO, data: Tensor) -> None:
        super().__init__(file)
        self._data = data

    def persistent_load(self, found: Any) -> Tensor:
        dtype, shape, at = found
        size = math.prod(shape) * dtype.itemsize
        return self._data[at : at + size].view(dtype).view(shape).clone()


def _packed(part: Any) -> bytearray:
    """Return the length of a pickle, the pickle, and the bytes of the tensors."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(part)
    text = file.getvalue()
    message = bytearray(len(text).to_bytes(_ALIGN, "little") + text.ljust(_aligned(len(text)), b" "))
    for flat in pickler.data:
        message += flat.numpy().tobytes().ljust(_aligned(flat.numel()), b"\0")
    return message


def _unpacked(message: Tensor) -> Any:
    size = int(message[:8].view(torch.int64))
    text = message[_ALIGN : _ALIGN + size].numpy().tobytes()
    return _Unpickler(
        io.BytesIO(text), message[_ALIGN + _aligned(size) :]
    ).load()  # from rank 0 of the same job


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN
