"""Reading what `torch.save` wrote without running code: only tensors and plain values come back."""

from __future__ import annotations

import io
import pickle
import struct
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from distrib.checkpoint.convert.source import refuse
from distrib.errors import CheckpointError


def check_archive(file: Path | io.BytesIO, where: str) -> None:
    """Compare a zip file's members with their CRC-32, which torch writes and does not look at.

    Raises:
        CheckpointError: naming the member that is damaged.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError, struct.error) as error:
        refuse(where, f"is a damaged zip file: {error}")
    if damaged is not None:
        refuse(where, f"has a member {damaged!r} that does not match its checksum")


def is_archive(data: bytes) -> bool:
    """Whether a file that begins so is a zip file, as torch.save writes it since torch 1.6."""
    return data[:4] == b"PK\x03\x04"


def load(path: Path, *, inert: Sequence[tuple[type, str]] = ()) -> Any:
    """Return what `torch.save` wrote, on the CPU; a zip file's tensors are mapped, and read when they are used.

    Args:
        path: The file.
        inert: Classes of ours that stand for those of another program, by its names.

    Raises:
        CheckpointError: if it names anything else than tensors and plain values, or is damaged.
    """
    with path.open("rb") as file:
        mapped = is_archive(file.read(4))
    return _load(path, str(path), mapped=mapped, inert=inert)


def load_bytes(data: bytes, where: str, *, verify: bool) -> Any:
    """Return what `torch.save` wrote into `data`, as `load` does; with `verify`, only if it has its checksums."""
    if verify and is_archive(data):
        check_archive(io.BytesIO(data), where)
    return _load(io.BytesIO(data), where, mapped=False, inert=())


def load_trusted(path: Path) -> Any:
    """Return what `torch.save` or `pickle` wrote, running whatever code it names; for callers who were told to."""
    return torch.load(path, map_location="cpu", weights_only=False)  # noqa: TID251 (the user asked for it by name)


def _load(source: Path | io.BytesIO, where: str, *, mapped: bool, inert: Sequence[tuple[type, str]]) -> Any:
    try:
        with torch.serialization.safe_globals(list(inert)), warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "Detected pickle protocol"
            )  # what it cannot read is refused anyway
            return torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)  # noqa: TID251 (no code is run)
    except pickle.UnpicklingError as error:
        raise _unsafe(source, where) from error
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001 (what an unpickler makes of damaged bytes can be any error)
        refuse(
            where,
            f"cannot be read as what torch.save writes: {type(error).__name__}: {error}".splitlines()[0],
        )


def _unsafe(source: Path | io.BytesIO, where: str) -> CheckpointError:
    return CheckpointError(
        "D0722",
        f"holds more than tensors and plain values{_named(source)}; to load them could run code of the file's",
        where=where,
        fix="save it again from your program with plain values only: torch.save(model.state_dict(), path)",
    )


def _named(source: Path | io.BytesIO) -> str:
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(source)
    except Exception:  # noqa: BLE001 (no zip file, or a damaged one: torch cannot list them)
        return ""
    return f": {', '.join(sorted(names))}" if names else ""


class Refused(pickle.UnpicklingError):
    """A pickle names something that is not allowed."""


class Restricted(pickle.Unpickler):
    """Unpickles only what `allowed` lists, each as the class or value given there.

    Args:
        file: What to read.
        allowed: (module, name) -> what it is to be.
    """

    def __init__(self, file: io.BytesIO, allowed: Mapping[tuple[str, str], Any]) -> None:
        super().__init__(file)
        self._allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        """Return what a name stands for, or refuse it."""
        if (module, name) not in self._allowed:
            raise Refused(f"{module}.{name}")
        return self._allowed[module, name]

    def persistent_load(self, key: Any) -> Any:
        """Refuse references to things outside of the pickle."""
        raise Refused(f"the persistent id {key!r:.60}")
