"""Python values as JSON, without pickle: what comes back is equal and of the same types, and runs no code.

JSON's own types stand for themselves; every other value is an object with the key "$", its kind. A type that is not
listed here is refused on the way out, with the path to the value; a kind that is not is refused on the way in.
"""

from __future__ import annotations

import base64
import math
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch

from distrib.checkpoint.format import CODES, DTYPES, PICKLED, group_of
from distrib.checkpoint.tensorfile import chunks
from distrib.errors import CheckpointError

Spill = Callable[[str, torch.Tensor], str]
Fetch = Callable[[str], torch.Tensor]

INLINE_BYTES = 16 * 1024  # larger tensors go to a safetensors file, where there is one
_MAX_DEPTH = 100
_JSON_INT = 2**63  # beyond it other JSON readers lose digits
_NUMPY_KINDS = "biufc"
_KINDS = {
    tuple: "tuple",
    torch.Size: "torch.Size",
    set: "set",
    frozenset: "frozenset",
    bytes: "bytes",
    bytearray: "bytearray",
    complex: "complex",
    OrderedDict: "OrderedDict",
    Counter: "Counter",
    torch.dtype: "torch.dtype",
    torch.device: "torch.device",
}
_DTYPE_NAMES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
_NUMPY_DTYPE = re.compile(r"[<>|=][biufc]\d{1,2}")


@dataclass(frozen=True)
class Pickled:
    """A pickle that nobody has opened; `distrib.checkpoint.pickled` makes them, and is the one that may open them.

    Attributes:
        name: Of the tensor whose bytes it is: "pickled/<index>.<class>".
        data: The pickle. Empty on the way out, where the tensor has it.
    """

    name: str
    data: bytes = b""

    def __repr__(self) -> str:
        return f"<pickle {self.name}, {len(self.data)} bytes>"


def encode(value: Any, path: str, spill: Spill | None = None) -> Any:
    """Return the JSON form of `value`.

    Args:
        value: Any nesting of None, bool, numbers, str, bytes, lists, tuples, dicts with any of these as keys, sets,
            torch dtypes, devices, sizes and tensors, numpy scalars and arrays.
        path: How to call the value in messages: "scheduler 0".
        spill: Called with path and tensor for each large tensor; stores it and returns the name to fetch it by.
            None: every tensor is put into the JSON.

    Raises:
        CheckpointError: if some value is of another type; the message has its path.
    """
    return _Encoder(spill).encode(value, path, 0)


def decode(tree: Any, path: str, fetch: Fetch | None = None) -> Any:
    """Return the value that `encode` turned into `tree`; tensors are on the CPU.

    Raises:
        CheckpointError: if `tree` is nothing that `encode` makes.
    """
    try:
        return _Decoder(fetch).decode(tree)
    except (ValueError, TypeError, KeyError, RuntimeError, OverflowError, RecursionError) as error:
        raise CheckpointError(
            "D0702",
            f"holds a value that distrib does not write: {type(error).__name__}: {error}",
            where=path,
            fix="load another checkpoint; this file is damaged, or a newer distrib wrote it",
        ) from error


class _Encoder:
    def __init__(self, spill: Spill | None) -> None:
        self.spill = spill

    def encode(self, value: Any, path: str, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            _refuse(path, f"lies more than {_MAX_DEPTH} levels deep, or contains itself")
        kind = type(value)
        if value is None or kind in (bool, str):
            return value
        if kind is int:
            return value if abs(value) < _JSON_INT else {"$": "int", "v": hex(value)}
        if kind is float:
            return value if math.isfinite(value) else {"$": "float", "v": repr(value)}
        if kind is list:
            return self.items(value, path, depth)
        if kind is dict:
            return self.mapping(value, path, depth)
        return self.tagged(value, path, depth)

    def items(self, values: Iterable[Any], path: str, depth: int) -> list[Any]:
        return [self.encode(x, f"{path}[{i}]", depth + 1) for i, x in enumerate(values)]

    def mapping(self, value: Mapping[Any, Any], path: str, depth: int) -> Any:
        if all(type(key) is str for key in value) and "$" not in value:
            return {key: self.encode(x, f"{path}[{key!r}]", depth + 1) for key, x in value.items()}
        return {"$": "dict", "v": self.pairs(value, path, depth)}

    def pairs(self, value: Mapping[Any, Any], path: str, depth: int) -> list[list[Any]]:
        return [
            [self.encode(key, f"a key of {path}", depth + 1), self.encode(x, f"{path}[{key!r}]", depth + 1)]
            for key, x in value.items()
        ]

    def tagged(self, value: Any, path: str, depth: int) -> dict[str, Any]:
        kind = type(value)
        if kind is Pickled:
            return {"$": "pickle", "v": value.name}
        if kind in (torch.Tensor, torch.nn.Parameter):
            return self.tensor(value, path)
        if isinstance(value, np.generic) or kind is np.ndarray:
            return _numpy(value, path)
        if kind not in _KINDS:
            _refuse(path, f"is a {kind.__module__}.{kind.__qualname__}")
        return {"$": _KINDS[kind], "v": self.content(value, path, depth)}

    def content(self, value: Any, path: str, depth: int) -> Any:
        """Return what stands beside the kind."""
        if isinstance(value, (set, frozenset)):
            return sorted(self.items(value, path, depth), key=repr)
        if isinstance(value, tuple):
            return self.items(value, path, depth)
        if isinstance(value, dict):
            return self.pairs(value, path, depth)
        if isinstance(value, (bytes, bytearray)):
            return _base64(value)
        return [repr(value.real), repr(value.imag)] if isinstance(value, complex) else str(value)

    def tensor(self, value: torch.Tensor, path: str) -> dict[str, Any]:
        if value.layout is not torch.strided or value.dtype not in CODES:
            _refuse(path, f"is a tensor of dtype {value.dtype} and layout {value.layout}")
        if self.spill is not None and value.numel() * value.element_size() > INLINE_BYTES:
            return {"$": "stored", "v": self.spill(path, value)}
        data = b"".join(map(bytes, chunks(value)))
        return {"$": "tensor", "dtype": CODES[value.dtype], "shape": list(value.shape), "v": _base64(data)}


class _Decoder:
    def __init__(self, fetch: Fetch | None) -> None:
        self.fetch = fetch
        self.kinds: dict[str, Callable[[dict[str, Any]], Any]] = {
            "int": lambda x: int(x["v"], 16),
            "float": lambda x: float(x["v"]),
            "tuple": lambda x: tuple(self.items(x)),
            "set": lambda x: set(self.items(x)),
            "frozenset": lambda x: frozenset(self.items(x)),
            "bytes": lambda x: _bytes(x["v"]),
            "bytearray": lambda x: bytearray(_bytes(x["v"])),
            "complex": lambda x: complex(*map(float, x["v"])),
            "dict": lambda x: dict(self.pairs(x)),
            "OrderedDict": lambda x: OrderedDict(self.pairs(x)),
            "Counter": lambda x: Counter(dict(self.pairs(x))),
            "torch.Size": lambda x: torch.Size(self.items(x)),
            "torch.dtype": lambda x: _DTYPE_NAMES[x["v"]],
            "torch.device": lambda x: torch.device(x["v"]),
            "tensor": _tensor,
            "numpy": _array,
            "stored": self.stored,
            "pickle": self.pickle,
        }

    def decode(self, tree: Any) -> Any:
        if isinstance(tree, list):
            return [self.decode(x) for x in tree]
        if not isinstance(tree, dict):
            return tree
        if "$" not in tree:
            return {key: self.decode(x) for key, x in tree.items()}
        return self.kinds[tree["$"]](tree)

    def items(self, tree: dict[str, Any]) -> list[Any]:
        return [self.decode(x) for x in tree["v"]]

    def pairs(self, tree: dict[str, Any]) -> list[tuple[Any, Any]]:
        return [(self.decode(key), self.decode(x)) for key, x in tree["v"]]

    def stored(self, tree: dict[str, Any]) -> torch.Tensor:
        if self.fetch is None:
            raise ValueError(f"tensor {tree['v']!r} is said to be stored apart, where nothing is")
        return self.fetch(tree["v"])

    def pickle(self, tree: dict[str, Any]) -> Pickled:
        if group_of(tree["v"]) != PICKLED:
            raise ValueError(f"pickle {tree['v']!r} lies outside {PICKLED}/")
        return Pickled(tree["v"], self.stored(tree).numpy().tobytes())


def _numpy(value: Any, path: str) -> dict[str, Any]:
    array = np.asarray(value)
    if array.dtype.kind not in _NUMPY_KINDS or array.dtype.itemsize > 16:
        _refuse(path, f"is a numpy value of dtype {array.dtype}")
    scalar = {} if isinstance(value, np.ndarray) else {"scalar": True}
    return {
        "$": "numpy",
        "dtype": array.dtype.str,
        "shape": list(array.shape),
        "v": _base64(array.tobytes()),
        **scalar,
    }


def _array(tree: dict[str, Any]) -> Any:
    if not _NUMPY_DTYPE.fullmatch(tree["dtype"]):
        raise ValueError(f"numpy dtype {tree['dtype']!r}")
    array = np.frombuffer(_bytes(tree["v"]), np.dtype(tree["dtype"])).reshape(tree["shape"]).copy()
    return array[()] if tree.get("scalar") else array


def _tensor(tree: dict[str, Any]) -> torch.Tensor:
    data = bytearray(_bytes(tree["v"]))
    dtype, shape = DTYPES[tree["dtype"]], tree["shape"]
    flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return flat.reshape(shape)


def _base64(data: bytes | bytearray) -> str:
    return base64.b64encode(data).decode("ascii")


def _bytes(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


def _refuse(path: str, problem: str) -> NoReturn:
    raise CheckpointError(
        "D0709",
        f"{path} {problem}; a checkpoint stores None, bool, numbers, str, bytes, lists, tuples, dicts, sets, tensors, "
        "numpy arrays, torch dtypes, devices and sizes, and never a pickle",
        fix="return only such values from its state_dict(), and rebuild the rest in load_state_dict()",
    )
