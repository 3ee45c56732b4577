"""Loading: what is stored is compared with what is wanted before anything is touched, then each rank reads its bytes."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch

from distrib.checkpoint import format as file_format
from distrib.checkpoint.agreement import on_main, together
from distrib.checkpoint.claim import restore_aside
from distrib.checkpoint.codec import decode
from distrib.checkpoint.files import Directory
from distrib.checkpoint.format import MANIFEST, Manifest, StoredSlice, StoredTensor
from distrib.checkpoint.location import Url, locate
from distrib.checkpoint.opening import Opened, check, open_manifest, open_same
from distrib.checkpoint.parallel import each
from distrib.checkpoint.plan import Overlap, Piece, numel, overlaps, pieces, size_of
from distrib.checkpoint.storage import Storage
from distrib.checkpoint.transfer import read_box, relative, sub_tensor
from distrib.checkpoint.writer import CUSTOM_OBJECTS, LOADERS, OBJECTS, SCALER, SCHEDULERS
from distrib.collectives.base import Collectives
from distrib.errors import CheckpointError, did_you_mean
from distrib.state import LoaderPosition, ShardedState, Slice, TensorSpec, whole

_MOST_LISTED = 20
_LEAST_MAPPED = 2**16  # bytes; less is read


class Reader:
    """An open, checked checkpoint. Close it, or use it as a context manager; made by `open_checkpoint`.

    Attributes:
        path: Its directory.
        manifest: What it holds.
    """

    def __init__(self, directory: Directory, manifest: Manifest, collectives: Collectives) -> None:
        self.path, self.manifest = directory.path, manifest
        self._directory, self._collectives = directory, collectives

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the directory back; safe to call twice."""
        self._directory.close()

    @property
    def world_size(self) -> int:
        """Number of ranks that wrote it."""
        return self.manifest.world_size

    @property
    def counters(self) -> dict[str, Any]:
        """Numbers such as step and epoch."""
        found: dict[str, Any] = decode(self.manifest.counters, self._where(MANIFEST))
        return found

    @property
    def config(self) -> dict[str, Any]:
        """The configuration of the run that wrote it."""
        found: dict[str, Any] = decode(self.manifest.config, self._where(MANIFEST))
        return found

    @cached_property
    def objects(self) -> dict[str, Any]:
        """The objects of the sharded states that were saved, merged over the ranks."""
        found: dict[str, Any] = decode(self._json(OBJECTS), self._where(OBJECTS))
        return found

    @cached_property
    def loaders(self) -> list[LoaderPosition]:
        """Positions of the loaders, in the order of their preparation."""
        return [self._position(x) for x in self._json(LOADERS)]

    @cached_property
    def schedulers(self) -> list[dict[str, Any]]:
        """State dicts of the schedulers, in the order of their preparation."""
        return [decode(x, self._where(SCHEDULERS)) for x in self._json(SCHEDULERS)]

    @cached_property
    def scaler(self) -> dict[str, Any] | None:
        """State dict of the loss scaler, if one was saved."""
        if SCALER not in self.manifest.files:
            return None
        found: dict[str, Any] = decode(self._json(SCALER), self._where(SCALER))
        return found

    @cached_property
    def custom(self) -> Any:
        """State dicts of the user's own objects, as a list or dict like the one that was saved."""
        return decode(self._json(CUSTOM_OBJECTS), self._where(CUSTOM_OBJECTS), self._fetch)

    @property
    def info(self) -> dict[str, Any]:
        """Versions, strategy and whatever else `Contents.info` had."""
        found: dict[str, Any] = decode(self.manifest.info, self._where(MANIFEST))
        return found

    def rng(self, rank: int) -> dict[str, Any]:
        """Return the random states that rank `rank` of the writing run had, for `distrib.checkpoint.rng.restore`.

        The rule for another number of ranks is the caller's: the states of some ranks fit no other number of them.

        Raises:
            CheckpointError: if the writing run had no such rank.
        """
        name = f"rng/rank-{rank:05d}.json"
        found: dict[str, Any] = decode(self._json(name), self._where(name))
        return found

    def specs(self) -> dict[str, TensorSpec]:
        """Return name -> shape and dtype of the stored tensors of models and optimizers."""
        return self.manifest.specs()

    def check(
        self,
        state: ShardedState,
        *,
        strict: bool = True,
        ignore: Collection[str] = (),
        must_match: Collection[str] = (),
    ) -> frozenset[str]:
        """Compare what all ranks want with what is stored; nothing is read or changed. Collective.

        Args:
            state: This rank's slices, as `fill` will get them.
            strict: Whether a missing or unexpected tensor is an error. A wrong shape always is, and so is a dtype
                that only loses its meaning when converted: complex to real, floating-point to integer.
            ignore: Shell patterns of names, such as "model/head.*", that are left alone altogether.
            must_match: Patterns that have to fit a tensor of the checkpoint, or one that some rank wants.

        Returns:
            The names of `state` that the checkpoint can fill.

        Raises:
            CheckpointError: on every rank, with all that does not fit and the nearest stored name of each.
        """
        mine = {
            s.name: TensorSpec(tuple(s.global_shape), s.dtype)
            for found in state.tensors.values()
            for s in found
        }
        everyone = self._collectives.gather_object((mine, dict(state.aliases)))
        here = {name: spec for specs, _ in everyone for name, spec in specs.items()}
        wanted = {name: spec for name, spec in here.items() if not _ignored(name, ignore)}
        aliases = {name: target for _, names in everyone for name, target in names.items()}

        def compare() -> None:
            _check_patterns(must_match, {*self.specs(), *here})
            self._compare(wanted, aliases, ignore, strict=strict)

        together(self._collectives, "comparing the state", compare)
        return frozenset(name for name in mine if name in wanted and self._source(name, aliases))

    def fill(self, state: ShardedState, *, only: Collection[str] | None = None) -> None:
        """Read the stored values into the tensors of `state`, whatever layout wrote them. Collective.

        Only the byte ranges that this rank's slices need are read, straight into contiguous host memory; values of
        another dtype are read beside it and converted, one slice at a time. Sizes are checked first. A read error
        in the middle leaves the state partly overwritten, and the message says so.

        Args:
            state: Slices to fill; their tensors are changed in place and committed.
            only: Names to fill, such as `check` returned; None for all of them.

        Raises:
            CheckpointError: on every rank, if a tensor is missing, does not fit or cannot be read on any.
        """
        parts = [s for name, found in state.tensors.items() if only is None or name in only for s in found]
        jobs = together(self._collectives, "planning the load", lambda: self._plan(parts, state.aliases))
        together(self._collectives, "reading the checkpoint", lambda: self._read(jobs))

    def tensor(self, name: str) -> torch.Tensor:
        """Return a stored tensor whole, on the CPU."""
        return self._fetch(name)

    def _compare(
        self,
        wanted: Mapping[str, TensorSpec],
        aliases: Mapping[str, str],
        ignore: Collection[str],
        *,
        strict: bool,
    ) -> None:
        stored = self.specs()
        sources = {name: self._source(name, aliases) for name in wanted}
        problems = [
            _mismatch(name, wanted[name], stored[source]) for name, source in sources.items() if source
        ]
        if strict:
            names, used = {*stored, *self.manifest.aliases}, {*sources.values(), *aliases}
            problems += [_missing(name, spec, names) for name, spec in wanted.items() if not sources[name]]
            problems += [
                f"unexpected: {name!r} {_text(spec)} is stored, but has no place here{did_you_mean(name, wanted)}"
                for name, spec in stored.items()
                if name not in used and not _ignored(name, ignore)
            ]
        _raise_misfits([x for x in problems if x], str(self.path))

    def _source(self, name: str, aliases: Mapping[str, str]) -> str:
        """Return the name under which a tensor, or one that is tied to it here, is stored; or ""."""
        tied = (alias for alias, target in aliases.items() if target == name)
        found = (self.manifest.aliases.get(x, x) for x in (name, *tied))
        return next((x for x in found if x in self.manifest.tensors), "")

    def _plan(self, parts: Iterable[Slice], aliases: Mapping[str, str]) -> list[_Job]:
        """Pair slices with what is stored; raise if one has no match or a file that is needed is not whole."""
        jobs, problems = [], []
        for part in parts:
            spec = TensorSpec(tuple(part.global_shape), part.dtype)
            stored = self.manifest.tensors.get(self._source(part.name, aliases))
            if stored is None:
                problems.append(_missing(part.name, spec, self.specs()))
                continue
            problems.append(_mismatch(part.name, spec, stored.spec))
            jobs.append(_Job(part, stored))
        _raise_misfits([x for x in problems if x], str(self.path))
        for name in sorted({s.file for job in jobs for s in job.stored.slices}):
            self._directory.check_size(name, self.manifest.files[name])
        return jobs

    def _read(self, jobs: Sequence[_Job]) -> None:
        filled = each(self._filled, jobs, self._directory.threads)
        for job, tensor in zip(jobs, filled, strict=True):
            job.part.commit(tensor)

    @torch.no_grad()
    def _filled(self, job: _Job) -> torch.Tensor:
        part, stored = job
        tensor = part.get()
        if part.is_new and self._map(part, stored, tensor):
            return tensor
        try:
            self._read_slice(part, stored, tensor.detach())
        except CheckpointError as error:
            raise CheckpointError(
                error.code,
                f"{error.problem} (tensor {part.name!r} and others may be partly overwritten)",
                where=error.where,
                fix=error.fix,
            ) from error
        return tensor

    def _map(self, part: Slice, stored: StoredTensor, tensor: torch.Tensor) -> bool:
        """Let a new tensor be the file's own bytes, copied page by page when they are changed, where that is possible."""
        if not tensor.is_cpu or not tensor.is_contiguous() or stored.spec.dtype is not part.dtype:
            return False
        source = next((x for x in stored.slices if x.where == part.where), None)
        nbytes = tensor.numel() * tensor.element_size()
        if source is None or nbytes < _LEAST_MAPPED or source.offset % tensor.element_size():
            return False
        mapped = self._directory.mapped(source.file)
        if mapped is None:
            return False
        flat = torch.frombuffer(mapped, dtype=tensor.dtype, count=tensor.numel(), offset=source.offset)
        tensor.data = flat.view(tensor.shape)
        return True

    def _read_slice(self, part: Slice, stored: StoredTensor, tensor: torch.Tensor) -> None:
        views = _piece_views(part, tensor)
        if stored.spec.dtype is not part.dtype:
            values = torch.empty(tensor.shape, dtype=stored.spec.dtype)
            self._read_slice(dataclasses.replace(part, dtype=stored.spec.dtype), stored, values)
            tensor.copy_(values)
            return
        for source in stored.slices:
            found = list(overlaps(source.where, part.where, part.global_shape))
            if found:
                self._read_overlaps(source, found, views)

    def _read_overlaps(
        self, source: StoredSlice, found: Sequence[Overlap], views: Mapping[Piece, torch.Tensor]
    ) -> None:
        with self._directory.open(source.file) as file:

            def read(view: memoryview, at: int) -> None:
                self._directory.read_into(file, source.file, view, at)

            for have, want, box in found:
                target = sub_tensor(views[want], relative(box, want.box))
                offset = source.offset + have.offset * target.element_size()
                read_box(read, offset, have.box.size, relative(box, have.box), target)

    def _fetch(self, name: str) -> torch.Tensor:
        stored = self.manifest.tensors[name]
        tensor = torch.empty(stored.spec.shape, dtype=stored.spec.dtype)
        self._read_slice(whole(name, tensor), stored, tensor)
        return tensor

    def _json(self, name: str) -> Any:
        record = self.manifest.files.get(name)
        if record is None:
            raise CheckpointError(
                "D0704",
                "is not among the checkpoint's files",
                where=self._where(name),
                fix="load a checkpoint that save_state wrote",
            )
        return file_format.parse_json(self._directory.read(name, record), self._where(name))

    def _position(self, value: Any) -> LoaderPosition:
        fields = decode(value, self._where(LOADERS)) if isinstance(value, dict) else {}
        numbers = ("epoch", "seed", "consumed", "global_batch_size", "samples", "divided_by")
        if {*fields} != {*numbers, "stream"} or any(type(fields[name]) is not int for name in numbers):
            raise CheckpointError(
                "D0702", f"holds {value!r:.80}, which is no loader position", where=self._where(LOADERS)
            )
        return LoaderPosition(**fields)

    def _where(self, name: str) -> str:
        return self._directory.where(name)


class _Job(NamedTuple):
    part: Slice
    stored: StoredTensor


def open_checkpoint(directory: str | Path | Url, collectives: Collectives, *, verify: bool = True) -> Reader:
    """Open a checkpoint and check it. Collective.

    The ranks divide the work: together they read every byte once. Sizes are always checked.

    Args:
        directory: The checkpoint, on a file system that all ranks see, or at a URL.
        collectives: The ranks that load together; any number of them.
        verify: Whether to compare all checksums before anything can be loaded.

    Raises:
        CheckpointError: on every rank, if it is absent, incomplete, damaged, foreign or of another version.
    """
    path = locate(directory)
    first: list[Opened] = []  # on rank 0 by the first step

    def open_first() -> str:
        restore_aside(path, Storage())
        first.append(open_manifest(path))
        return first[0].digest

    digest = on_main(collectives, "opening the checkpoint", open_first)
    try:
        opened = together(
            collectives, "opening the checkpoint", lambda: first[0] if first else open_same(path, digest)
        )
    except BaseException:
        for each in first:
            each.directory.close()
        raise
    try:
        manifest = together(collectives, "reading the manifest", opened.parse)
        together(
            collectives,
            "checking the files",
            lambda: check(opened.directory, manifest, collectives, verify=verify),
        )
    except BaseException:
        opened.directory.close()
        raise
    return Reader(opened.directory, manifest, collectives)


def _piece_views(part: Slice, tensor: torch.Tensor) -> dict[Piece, torch.Tensor]:
    """Return each box of a slice as a view of the slice's tensor."""
    if tensor.numel() != size_of(part.where) or tensor.dtype is not part.dtype:
        raise CheckpointError(
            "D0710",
            f"the slice of {part.name!r} to fill is {tensor.dtype} {tuple(tensor.shape)}, "
            f"but was announced as {part.dtype} {part.where}",
            fix="this is a fault of the strategy; report it",
        )
    found = pieces(part.where, part.global_shape)
    if len(found) == 1 and tuple(tensor.shape) == found[0].box.size:
        return {found[0]: tensor}
    flat = tensor.view(-1)
    return {
        piece: flat.narrow(0, piece.offset, numel(piece.box.size)).view(piece.box.size) for piece in found
    }


def _check_patterns(patterns: Iterable[str], names: Collection[str]) -> None:
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise CheckpointError(
                "D0740",
                f"no tensor of the checkpoint or the run is called {pattern!r}{did_you_mean(pattern, names)}",
                where="load_state (ignore)",
                fix='patterns begin with the group: "model/head.*"; `distrib checkpoint show` lists all names',
            )


def _missing(name: str, spec: TensorSpec, stored: Iterable[str]) -> str:
    return f"missing: {name!r} {_text(spec)} is not stored{did_you_mean(name, stored)}"


def _mismatch(name: str, wanted: TensorSpec, stored: TensorSpec) -> str:
    if wanted.shape == stored.shape and torch.can_cast(stored.dtype, wanted.dtype):
        return ""
    return f"mismatch: {name!r} is stored as {_text(stored)}, but is {_text(wanted)} here"


def _text(spec: TensorSpec) -> str:
    return f"{str(spec.dtype).removeprefix('torch.')} {tuple(spec.shape)}"


def _ignored(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _raise_misfits(problems: Sequence[str], where: str) -> None:
    if not problems:
        return
    more = [f"and {len(problems) - _MOST_LISTED} more"] if len(problems) > _MOST_LISTED else []
    raise CheckpointError(
        "D0708",
        "the checkpoint does not fit what it is loaded into; nothing was changed:"
        + "".join(f"\n  {line}" for line in [*problems[:_MOST_LISTED], *more]),
        where=where,
        fix="build the model and optimizer as they were",
    )
