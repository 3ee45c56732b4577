"""What a checkpoint holds, as lines for people and as JSON: from manifests alone, without files."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from distrib.checkpoint.format import (
    CODES,
    PICKLED,
    Manifest,
    StoredSlice,
    StoredTensor,
    group_of,
    total_bytes,
)
from distrib.checkpoint.plan import describe, numel

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_WRITER = (
    "strategy",
    "distrib",
    "torch",
    "python",
    "host",
    "saved_at",
)  # the rest of `info` comes after these


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, right: Collection[int] = ()) -> list[str]:
    """Return rows as lines of aligned columns under a head.

    Args:
        head: Name of each column.
        rows: As many cells as `head` has.
        right: Indices of the columns whose cells end, not begin, below each other: numbers.
    """
    cells = [tuple(head), *map(tuple, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]

    def line(row: Sequence[str]) -> str:
        fields = (
            text.rjust(width) if at in right else text.ljust(width)
            for at, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join(fields).rstrip()

    return [line(row) for row in cells]


def size_text(num_bytes: int) -> str:
    """Return a number of bytes as a person says it: "37.2 KiB"."""
    value, unit = float(num_bytes), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.1f} {_UNITS[unit]}" if unit else f"{num_bytes} B"


def dtype_text(tensor: StoredTensor) -> str:
    """Return "float32" of a tensor of torch.float32."""
    return str(tensor.spec.dtype).removeprefix("torch.")


def nbytes(tensor: StoredTensor) -> int:
    """Return the bytes of all slices of a tensor."""
    return numel(tensor.spec.shape) * tensor.spec.dtype.itemsize


def lines_of(manifest: Manifest, path: str) -> list[str]:
    """Describe a checkpoint: its step, who wrote it, the settings of that run, and a table of its tensors."""
    info = dict(manifest.info)
    config = {**manifest.config, **info.pop("config", {})}
    facts = {
        **dict(manifest.counters),
        "world size": manifest.world_size,
        "files": f"{len(manifest.files)} ({size_text(total_bytes(manifest))})",
        **{key: info.pop(key) for key in _WRITER if key in info},
        **info,
    }
    return [
        path,
        *_pairs(facts),
        *(["config:", *_pairs(config)] if config else []),
        "",
        *tensor_table(manifest.tensors, manifest.aliases),
        *_pickle_lines(manifest),
    ]


def _pickle_lines(manifest: Manifest) -> list[str]:
    """Mark the registered objects that are pickles. They are counted, and never opened."""
    rows = [
        f"  {name.partition('/')[2]}  {size_text(nbytes(manifest.tensors[name]))}"
        for name in manifest.pickles()
    ]
    head = "pickles of registered objects, which run whatever code they name; only load_state(allow_pickle=True) opens them:"
    return ["", head, *rows] if rows else []


def tensor_table(tensors: Mapping[str, StoredTensor], aliases: Mapping[str, str]) -> list[str]:
    """Return the tensors in the order of their names, and a last line with the sum; tied names say so."""
    rows = [
        (
            name,
            str(list(x.spec.shape)),
            dtype_text(x) if group_of(name) != PICKLED else "pickle",
            size_text(nbytes(x)),
            str(len(x.slices)),
        )
        for name, x in tensors.items()
    ]
    rows += [(name, f"= {target}", "", "", "") for name, target in aliases.items()]
    total = sum(map(nbytes, tensors.values()))
    return [
        *table(("tensor", "shape", "dtype", "size", "slices"), sorted(rows), right=(3, 4)),
        f"{len(tensors)} tensors, {size_text(total)}",
    ]


def json_of(manifest: Manifest, path: str) -> dict[str, Any]:
    """Return all of a manifest as JSON for other programs; slices tell their region, file and byte offset."""
    return {
        "path": path,
        "world_size": manifest.world_size,
        "counters": dict(manifest.counters),
        "config": dict(manifest.config),
        "info": dict(manifest.info),
        "files": {name: record.size for name, record in manifest.files.items()},
        "aliases": dict(manifest.aliases),
        "pickles": manifest.pickles(),
        "tensors": {
            name: {
                "shape": list(x.spec.shape),
                "dtype": CODES[x.spec.dtype],
                "bytes": nbytes(x),
                "slices": [_slice_json(part) for part in x.slices],
            }
            for name, x in sorted(manifest.tensors.items())
        },
    }


def _slice_json(part: StoredSlice) -> dict[str, Any]:
    return {"where": describe(part.where), "file": part.file, "offset": part.offset}


def _pairs(values: Mapping[str, Any]) -> list[str]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= (
            {f"{name}.{key}": x for key, x in value.items()} if isinstance(value, Mapping) else {name: value}
        )
    width = max(map(len, flat), default=0)
    return [f"  {name.ljust(width)}  {_value(value)}".rstrip() for name, value in flat.items()]


def _value(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
