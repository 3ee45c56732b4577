"""The manifest: what a checkpoint holds, which bytes lie where, and their checksums.

    {"format": "distrib-checkpoint", "version": 1, "xxh3": <of the body>, "body": {...}}

It is written last and is the only thing that a reader trusts: names, offsets and sizes are checked against each
other and against the files before any of them is used. Tensors lie in safetensors files, all else in JSON, but for the
files that hooks have added.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
import xxhash

from distrib.checkpoint.plan import Shape, Where, coverage_problem, describe, fits, size_of, whole_box
from distrib.errors import CheckpointError
from distrib.state import Box, Interval, TensorSpec

MANIFEST = "manifest.json"
VERSION = 1
MAGIC = b'{"format":"distrib-checkpoint",'
MAX_JSON_BYTES = 64 * 2**20  # a larger document is refused before it is parsed, and before it is written
MAX_JSON_VALUES = 3_000_000  # so is one with more values, which take up to 70 bytes each
CUSTOM = "custom"  # group of the tensors that belong to documents, not to models or optimizers
PICKLED = "pickled"  # group of the pickles, each the bytes of one tensor: nothing else of a checkpoint is one

DTYPES: Mapping[str, torch.dtype] = {  # the codes of the safetensors format
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES: Mapping[torch.dtype, str] = {dtype: code for code, dtype in DTYPES.items()}
ITEMSIZE: Mapping[str, int] = {code: dtype.itemsize for code, dtype in DTYPES.items()}

_PART = r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}"
_SAFE_NAME = re.compile(rf"(?:{_PART}/){{0,8}}{_PART}")
_SAFE_GROUP = re.compile(_PART)
_MAX_DIMS = 64


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file: its size, and the XXH3-64 of its first `hashed` bytes; slices with checksums of their own follow."""

    size: int
    hashed: int
    xxh3: str


@dataclass(frozen=True, slots=True)
class StoredSlice:
    """Where the bytes of a slice lie: row-major from byte `offset` of `file` on."""

    where: Where
    file: str
    offset: int
    xxh3: str


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A logical tensor and the slices that are together all of it."""

    spec: TensorSpec
    slices: tuple[StoredSlice, ...]


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds.

    Attributes:
        world_size: Number of ranks that wrote it.
        files: Path within the checkpoint -> its record; the manifest itself is not among them.
        tensors: "<group>/<name>" -> where it is stored.
        aliases: Name of a tied tensor -> the name under which it is stored.
        counters: Numbers such as step and epoch.
        config: The configuration of the run that wrote it.
        info: Versions, strategy, time: for people.
        folder: Where the files lie, beside the manifest; "" for its own directory. Each save to an object store has
            another one, so that the files of two saves never mix.
    """

    world_size: int
    files: Mapping[str, FileRecord]
    tensors: Mapping[str, StoredTensor]
    aliases: Mapping[str, str] = field(default_factory=dict)
    counters: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)
    folder: str = ""

    def specs(self) -> dict[str, TensorSpec]:
        """Return name -> spec of the tensors of models and optimizers."""
        return {name: x.spec for name, x in self.tensors.items() if group_of(name) not in (CUSTOM, PICKLED)}

    def pickles(self) -> list[str]:
        """Return the names of the pickled objects: "pickled/<index>.<class>"."""
        return sorted(name for name in self.tensors if group_of(name) == PICKLED)


def group_of(name: str) -> str:
    """Return the folder of a logical tensor: "model" of "model/layers.0.weight"."""
    return name.partition("/")[0]


def is_safe_name(name: str) -> bool:
    """Whether `name` can be that of a file of a checkpoint: a path that leads nowhere else on any system."""
    return _SAFE_NAME.fullmatch(name) is not None


def stored_key(name: str, shape: Shape, where: Where) -> str:
    """Return the name of a slice within its safetensors file: the tensor's own when it is whole."""
    plain = name.partition("/")[2]
    if where == whole_box(shape):
        return plain
    if isinstance(where, Interval):
        return f"{plain}[{where.start}:{where.stop}]"
    return plain + describe(where).replace(" ", "")


def check_group(name: str) -> None:
    """Refuse a tensor name that is not "<group>/<name>" with a group that can be a folder."""
    group, _, rest = name.partition("/")
    if not rest or not _SAFE_GROUP.fullmatch(group):
        raise CheckpointError(
            "D0716",
            f"tensor name {name!r} cannot be stored; expected 'group/name' such as 'model/layers.0.weight'",
            fix="this is a fault of the strategy's sharded_state; report it",
        )


def code_of(name: str, dtype: torch.dtype) -> str:
    """Return the safetensors code of a dtype, or refuse it by the tensor's name."""
    if dtype not in CODES:
        raise CheckpointError(
            "D0716",
            f"tensor {name!r} has dtype {dtype}, which safetensors cannot store; expected one of {', '.join(CODES.values())}",
            fix="convert it to one of these, or keep it out of the state",
        )
    return CODES[dtype]


def checksum(data: bytes | memoryview) -> str:
    """Return the XXH3-64 of `data` in hexadecimal."""
    return xxhash.xxh3_64_hexdigest(data)


def canonical_json(value: Any) -> bytes:
    """Return the one JSON text of a value: sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def bounded(data: bytes, what: str) -> bytes:
    """Return a JSON text that can be read again, or refuse to write it.

    Raises:
        CheckpointError: D0766, if it is larger than a reader takes.
    """
    num_values = data.count(b",")
    if len(data) > MAX_JSON_BYTES or num_values > MAX_JSON_VALUES:
        raise CheckpointError(
            "D0766",
            f"{what} would be {len(data):,} bytes of JSON with {num_values:,} values; expected at most "
            f"{MAX_JSON_BYTES:,} and {MAX_JSON_VALUES:,}",
            fix="keep large data in tensors or arrays, which have files of their own",
        )
    return data


def parse_json(data: bytes, where: str) -> Any:
    """Parse JSON from an untrusted file.

    Raises:
        CheckpointError: if it is not JSON, nests too deeply, or repeats a key.
    """
    if data.count(b",") > MAX_JSON_VALUES:
        raise CheckpointError(
            "D0707",
            f"holds more than {MAX_JSON_VALUES:,} values",
            where=where,
            fix="do not load it; it was not written by distrib",
        )
    try:
        return json.loads(
            data, object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_finite
        )
    except (ValueError, RecursionError) as error:
        reason = "it nests too deeply" if isinstance(error, RecursionError) else str(error)
        raise CheckpointError(
            "D0702",
            f"is not valid JSON: {reason}",
            where=where,
            fix="load another checkpoint; this file is damaged or was not written by distrib",
        ) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text:.20} is larger than any number")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


def dump(manifest: Manifest) -> bytes:
    """Return the text of a manifest."""
    body = canonical_json(
        {
            "world_size": manifest.world_size,
            "files": {
                n: {"size": f.size, "hashed": f.hashed, "xxh3": f.xxh3} for n, f in manifest.files.items()
            },
            "tensors": {name: _dump_tensor(tensor) for name, tensor in manifest.tensors.items()},
            "aliases": dict(manifest.aliases),
            "counters": manifest.counters,
            "config": manifest.config,
            "info": manifest.info,
            **({"folder": manifest.folder} if manifest.folder else {}),
        }
    )
    bounded(body, "the manifest")
    return b'%s"version":%d,"xxh3":"%s","body":%s}\n' % (MAGIC, VERSION, checksum(body).encode(), body)


def _dump_tensor(tensor: StoredTensor) -> dict[str, Any]:
    return {
        "shape": tensor.spec.shape,
        "dtype": CODES[tensor.spec.dtype],
        "slices": [
            {"file": s.file, "offset": s.offset, "xxh3": s.xxh3, **_dump_where(s.where)}
            for s in tensor.slices
        ],
    }


def _dump_where(where: Where) -> dict[str, Any]:
    if isinstance(where, Interval):
        return {"interval": [where.start, where.stop]}
    return {"start": where.start, "size": where.size}


def load(data: bytes, where: str) -> Manifest:
    """Parse and check a manifest.

    Args:
        data: The file's bytes.
        where: Its path, for messages.

    Raises:
        CheckpointError: if it is foreign, of another version, damaged, or contradicts itself.
    """
    document = parse_json(data, where)
    _check_version(document, where)
    body = document.get("body")
    if not isinstance(body, dict) or document.get("xxh3") != checksum(canonical_json(body)):
        raise CheckpointError(
            "D0702",
            f"does not match its checksum {document.get('xxh3')!r}",
            where=where,
            fix="load another checkpoint; this file was damaged or changed after it was written",
        )
    return _Parser(where).manifest(body)


def _check_version(document: Any, where: str) -> None:
    if not isinstance(document, dict) or document.get("format") != "distrib-checkpoint":
        raise CheckpointError(
            "D0701",
            "is not the manifest of a distrib checkpoint",
            where=where,
            fix="give the directory that save_state wrote (it holds manifest.json, model/ and optimizer/)",
        )
    version = document.get("version")
    if version != VERSION or type(version) is not int:
        newer = type(version) is int and version > VERSION
        raise CheckpointError(
            "D0703",
            f"has format version {version!r}; this distrib reads version {VERSION}",
            where=where,
            fix="upgrade distrib" if newer else "load another checkpoint; this file is damaged",
        )


def _drained(mapping: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name in list(mapping):
        yield name, mapping.pop(name)


class _Parser:
    """Turns the body of a manifest into values, and refuses whatever is not exactly what `dump` writes."""

    def __init__(self, where: str) -> None:
        self.where = where

    def manifest(self, body: dict[str, Any]) -> Manifest:
        """Return the manifest, and leave nothing of what `body` lists: it would be in memory twice."""
        files = {self.file_name(n): self.file(n, x) for n, x in _drained(self.mapping(body, "files"))}
        tensors = {n: self.tensor(n, x, files) for n, x in _drained(self.mapping(body, "tensors"))}
        self.check_layout(files, tensors)
        aliases = self.mapping(body, "aliases")
        for name, target in aliases.items():
            if self.text(target, f"alias of {name!r}") not in tensors or name in tensors:
                self.refuse(f"alias {name!r} -> {target!r} leads to no stored tensor, or hides one")
        return Manifest(
            world_size=self.integer(body.get("world_size"), "world_size", 1),
            files=files,
            tensors=tensors,
            aliases=aliases,
            counters=self.mapping(body, "counters"),
            config=self.mapping(body, "config"),
            info=self.mapping(body, "info"),
            folder=self.folder(body.get("folder", "")),
        )

    def folder(self, value: Any) -> str:
        name = self.text(value, "folder")
        if name and not _SAFE_GROUP.fullmatch(name):
            self.refuse(f"folder {name!r} is not a name within the checkpoint")
        return name

    def file_name(self, name: str) -> str:
        if not is_safe_name(name):
            self.refuse(f"file name {name!r} is not 'name' or 'folder/name' within the checkpoint")
        return name

    def file(self, name: str, value: Any) -> FileRecord:
        record = self.as_mapping(value, f"files[{name!r}]")
        size = self.integer(record.get("size"), f"size of {name!r}", 0)
        hashed = self.integer(record.get("hashed"), f"hashed of {name!r}", 0)
        if hashed > size:
            self.refuse(f"{hashed} bytes of {name!r} are hashed, but it has {size}")
        return FileRecord(size, hashed, self.text(record.get("xxh3"), f"xxh3 of {name!r}"))

    def tensor(self, name: str, value: Any, files: Mapping[str, FileRecord]) -> StoredTensor:
        record = self.as_mapping(value, f"tensors[{name!r}]")
        shape = self.integers(record.get("shape"), f"shape of {name!r}")
        code = record.get("dtype")
        if not isinstance(code, str) or code not in DTYPES:
            self.refuse(f"tensor {name!r} has unknown dtype {code!r}")
        slices = record.get("slices")
        if not isinstance(slices, list):
            self.refuse(f"tensor {name!r} has no list of slices")
        stored = tuple(self.slice(name, shape, ITEMSIZE[code], x, files) for x in slices)
        problem = coverage_problem(shape, [s.where for s in stored])
        if problem is not None:
            self.refuse(f"tensor {name!r} is not stored exactly once: {problem}")
        return StoredTensor(TensorSpec(shape, DTYPES[code]), stored)

    def slice(
        self, name: str, shape: Shape, itemsize: int, value: Any, files: Mapping[str, FileRecord]
    ) -> StoredSlice:
        record = self.as_mapping(value, f"a slice of {name!r}")
        file, where = self.text(record.get("file"), f"file of {name!r}"), self.region(record, name)
        offset = self.integer(record.get("offset"), f"offset of {name!r}", 0)
        if file not in files:
            self.refuse(f"tensor {name!r} lies in {file!r}, which is not among the files")
        if not fits(where, shape):
            self.refuse(f"slice {describe(where)} of tensor {name!r} does not lie within shape {shape}")
        end = offset + size_of(where) * itemsize
        if offset < files[file].hashed or end > files[file].size:
            self.refuse(
                f"bytes {offset} to {end} of tensor {name!r} do not lie in the data of {file!r} "
                f"({files[file].hashed} to {files[file].size})"
            )
        return StoredSlice(where, file, offset, self.text(record.get("xxh3"), f"xxh3 of {name!r}"))

    def region(self, record: Mapping[str, Any], name: str) -> Where:
        if "interval" in record:
            bounds = self.integers(record["interval"], f"interval of {name!r}")
            if len(bounds) != 2 or bounds[0] > bounds[1]:
                self.refuse(f"tensor {name!r} has interval {list(bounds)}")
            return Interval(*bounds)
        start = self.integers(record.get("start"), f"start of {name!r}")
        size = self.integers(record.get("size"), f"size of {name!r}")
        if len(start) != len(size):
            self.refuse(f"tensor {name!r} has a slice with start {list(start)} and size {list(size)}")
        return Box(start, size)

    def check_layout(self, files: Mapping[str, FileRecord], tensors: Mapping[str, StoredTensor]) -> None:
        """Every byte of a file is hashed once: its head by the file, each other by the slice it belongs to."""
        ends = {name: record.hashed for name, record in files.items()}
        for item in sorted(extents(tensors), key=lambda x: (x.file, x.start, x.stop)):
            if item.start != ends[item.file]:
                self.refuse(
                    f"tensor {item.name!r} begins at byte {item.start} of {item.file!r}, not {ends[item.file]}"
                )
            ends[item.file] = item.stop
        for name, record in files.items():
            if ends[name] != record.size:
                self.refuse(f"bytes {ends[name]} to {record.size} of {name!r} belong to no tensor")

    def mapping(self, body: Mapping[str, Any], key: str) -> dict[str, Any]:
        return self.as_mapping(body.get(key), key)

    def as_mapping(self, value: Any, what: str) -> dict[str, Any]:
        return value if isinstance(value, dict) else self.refuse(f"{what} is {_short(value)}, not an object")

    def text(self, value: Any, what: str) -> str:
        return value if isinstance(value, str) else self.refuse(f"{what} is {_short(value)}, not a string")

    def integer(self, value: Any, what: str, least: int) -> int:
        if type(value) is not int or value < least:
            self.refuse(f"{what} is {_short(value)}, not an integer of at least {least}")
        return value

    def integers(self, value: Any, what: str) -> tuple[int, ...]:
        if not isinstance(value, list) or len(value) > _MAX_DIMS:
            self.refuse(f"{what} is {_short(value)}, not a list of at most {_MAX_DIMS} integers")
        return tuple(self.integer(x, what, 0) for x in value)

    def refuse(self, problem: str) -> NoReturn:
        raise CheckpointError(
            "D0707",
            f"contradicts itself: {problem}",
            where=self.where,
            fix="do not load it; it was not written by distrib, or was changed on purpose",
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


@dataclass(frozen=True, slots=True)
class Extent:
    """The bytes [start, stop) of `file` that are a slice of tensor `name`, or the file's own head (name None)."""

    file: str
    start: int
    stop: int
    xxh3: str
    name: str | None = None


def extents(tensors: Mapping[str, StoredTensor]) -> Iterator[Extent]:
    """Yield the bytes of every stored slice."""
    for name, tensor in tensors.items():
        for part in tensor.slices:
            stop = part.offset + size_of(part.where) * tensor.spec.dtype.itemsize
            yield Extent(part.file, part.offset, stop, part.xxh3, name)


def checked_bytes(manifest: Manifest) -> Iterable[Extent]:
    """Return every checksummed range of every file, in the order of files and bytes."""
    heads = (Extent(name, 0, x.hashed, x.xxh3) for name, x in manifest.files.items())
    return sorted((*heads, *extents(manifest.tensors)), key=lambda x: (x.file, x.start, x.stop))


def total_bytes(manifest: Manifest) -> int:
    """Return the size of all files of a checkpoint but the manifest."""
    return sum(x.size for x in manifest.files.values())
