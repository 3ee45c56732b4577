"""What two checkpoints do not have in common: tensors by name, shape, dtype and value, and all that stands beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from distrib.checkpoint.describe import dtype_text
from distrib.checkpoint.format import StoredTensor
from distrib.checkpoint.hooks import added_files
from distrib.checkpoint.plan import numel
from distrib.checkpoint.progress import Progress, no_progress
from distrib.checkpoint.reader import Reader
from distrib.collectives.packing import flat_bytes

_PIECE = 2**20  # elements compared at a time: their float64 copies stay small
_ABSENT = object()


def differences(a: Reader, b: Reader, progress: Progress = no_progress) -> Iterator[str]:
    """Yield one line for each difference of two checkpoints, tensors first.

    Hosts, times, versions, strategies and numbers of ranks are no differences: they say who wrote a checkpoint, not
    what it holds. The ranks' random states are compared where as many ranks wrote both.

    Args:
        a: The first one.
        b: The second one, read by one process too.
        progress: Told about the bytes compared.
    """
    yield from _tensors(a, b, progress)
    yield from _settings(a, b)
    yield from _files(a, b)


def _tensors(a: Reader, b: Reader, progress: Progress) -> Iterator[str]:
    mine, theirs = _sources(a), _sources(b)
    pairs: dict[tuple[str, str], str] = {}
    for name in sorted({*mine, *theirs}):
        here, there = mine.get(name), theirs.get(name)
        if here is None or there is None:
            reader, source = (a, here) if here else (b, there)
            yield f"only in {reader.path}: {name} {_text(reader.manifest.tensors[source or ''])}"
            continue
        specs = a.manifest.tensors[here], b.manifest.tensors[there]
        if specs[0].spec != specs[1].spec:
            what = "shape" if specs[0].spec.shape != specs[1].spec.shape else "dtype"
            yield f"{what}: {name} {_text(specs[0])} -> {_text(specs[1])}"
        else:
            pairs.setdefault((here, there), name)
    done, total = 0, sum(numel(a.manifest.tensors[here].spec.shape) for here, _ in pairs)
    for (here, there), name in pairs.items():
        problem = values_problem(a.tensor(here), b.tensor(there))
        if problem:
            yield f"values: {name} {problem}"
        done += numel(a.manifest.tensors[here].spec.shape)
        progress(done, total)


def _sources(reader: Reader) -> dict[str, str]:
    """Return name -> name under which it is stored, of the tensors of models and optimizers."""
    return {name: name for name in reader.specs()} | dict(reader.manifest.aliases)


def _text(tensor: StoredTensor) -> str:
    return f"{dtype_text(tensor)} {list(tensor.spec.shape)}"


def values_problem(a: torch.Tensor, b: torch.Tensor) -> str | None:
    """Say how two tensors of one shape and dtype differ; None if they do not. NaN equals NaN."""
    count, most = 0, 0.0
    for x, y in zip(torch.split(a.reshape(-1), _PIECE), torch.split(b.reshape(-1), _PIECE), strict=True):
        if torch.equal(flat_bytes(x), flat_bytes(y)):
            continue
        wide = torch.complex128 if x.is_complex() else torch.float64
        p, q = x.to(wide), y.to(wide)
        other = (p != q) & ~(p.isnan() & q.isnan())
        if x.dtype in (torch.int64, torch.uint64):
            other |= x != y  # beyond 2**53 float64 cannot tell neighbours apart
        count += int(other.sum())
        gaps = (p - q)[other].abs()
        most = max(most, float(gaps.nan_to_num(torch.inf, torch.inf).max())) if len(gaps) else most
    gap = f"at most {most:.3g}" if most else "less than float64 can tell"
    return f"{count} of {a.numel()} differ, by {gap}" if count else None


def _settings(a: Reader, b: Reader) -> Iterator[str]:
    mine, theirs = _leaves(_documents(a)), _leaves(_documents(b))
    for path in {**mine, **theirs}:
        here, there = mine.get(path, _ABSENT), theirs.get(path, _ABSENT)
        if not _same(here, there):
            yield f"setting: {path} {_short(here)} -> {_short(there)}"
    if a.world_size == b.world_size:
        for rank in range(a.world_size):
            states = [_leaves(reader.rng(rank)) for reader in (a, b)]
            if states[0].keys() != states[1].keys() or not all(
                _same(x, states[1][path]) for path, x in states[0].items()
            ):
                yield f"random states of rank {rank} differ"


def _files(a: Reader, b: Reader) -> Iterator[str]:
    """Compare the files that hooks have added, by their checksums."""
    names = sorted({*added_files(list(a.manifest.files)), *added_files(list(b.manifest.files))})
    for name in names:
        here, there = a.manifest.files.get(name), b.manifest.files.get(name)
        if here is None or there is None:
            yield f"only in {(a if here else b).path}: file {name}"
        elif here != there:
            yield f"file: {name} {here.size} bytes -> {there.size} bytes, with other contents"


def _documents(reader: Reader) -> dict[str, Any]:
    return {
        "counters": reader.counters,
        "config": {**reader.config, **reader.info.get("config", {})},
        "objects": reader.objects,
        "loaders": [vars(position) for position in reader.loaders],
        "schedulers": reader.schedulers,
        "scaler": reader.scaler,
        "custom": reader.custom,
    }


def _leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Return path -> value of everything below dicts, lists and tuples; an empty one is a leaf itself."""
    if isinstance(value, Mapping) and value:
        below = [(f"{path}.{key}" if path else str(key), x) for key, x in value.items()]
    elif isinstance(value, (list, tuple)) and value:
        below = [(f"{path}[{at}]", x) for at, x in enumerate(value)]
    else:
        return {path: value}
    return {name: leaf for key, x in below for name, leaf in _leaves(x, key).items()}


def _same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.shape == b.shape and a.dtype is b.dtype and values_problem(a, b) is None
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind in "fc")
    return bool(a == b) or (a != a and b != b)  # noqa: PLR0124 (NaN)


def _short(value: Any) -> str:
    return "(absent)" if value is _ABSENT else f"{value!r:.60}"
