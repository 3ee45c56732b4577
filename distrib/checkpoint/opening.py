"""Finding a checkpoint, opening it and seeing whether it is whole: manifest, sizes, checksums."""

from __future__ import annotations

import logging
import platform
import re
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from distrib.checkpoint import format as file_format
from distrib.checkpoint.claim import is_checkpoint, restore_aside
from distrib.checkpoint.files import Directory
from distrib.checkpoint.format import MANIFEST, Extent, Manifest
from distrib.checkpoint.location import Location, Url, locate
from distrib.checkpoint.parallel import each
from distrib.checkpoint.storage import Storage, entries
from distrib.collectives.base import Collectives
from distrib.errors import CheckpointError

_log = logging.getLogger(__name__)
_MOST_LISTED = 20
_SAME_S = 65.0  # nfs(5), acdirmax: a client may show for 60 s what was in a directory before
_LOOK_S = 0.25  # between two looks


def inspect(directory: str | Path | Url) -> Manifest:
    """Read and check the manifest of a checkpoint; no other file is opened.

    Args:
        directory: Its directory, or its URL.

    Raises:
        CheckpointError: if there is none, or it is damaged, foreign or of another version.
    """
    opened = open_manifest(locate(directory))
    with closing(opened.directory):
        return opened.parse()


def verify(directory: str | Path | Url) -> None:
    """Read every byte of a checkpoint and compare it with its checksum.

    Args:
        directory: Its directory, or its URL.

    Raises:
        CheckpointError: naming each file and tensor that is missing or damaged.
    """
    opened = open_manifest(locate(directory))
    with closing(opened.directory) as files:
        manifest = opened.parse()
        _raise_damage(_size_problems(files, manifest, 0, 1) or _byte_problems(files, manifest, 0, 1))


def latest(directory: str | Path | Url, prefix: str = "step-") -> Location | None:
    """Return the complete checkpoint with the highest number in `directory`, or None.

    Complete means: a good manifest, and every file there with its size. Checksums are left to `open_checkpoint`.

    Args:
        directory: Where checkpoints lie side by side, or a URL.
        prefix: What their names begin with.

    Raises:
        CheckpointError: if the store of a URL does not answer: nobody knows then what is there.
    """
    for _, path in reversed(numbered(directory, prefix, whole=False)):
        problem = incompleteness(path)
        if problem is None:
            return path
        at = "" if problem.where in (None, str(path)) else f"{problem.where} "
        _log.warning("skipped %s: %s%s", path, at, problem.problem)
    return None


def numbered(
    directory: str | Path | Url, prefix: str = "step-", *, whole: bool = True
) -> list[tuple[int, Location]]:
    """Return (number, path) of the directories named `<prefix><number>`, in numeric order.

    Args:
        directory: Where they lie, or a URL.
        prefix: What their names begin with.
        whole: Whether to leave out those without a manifest of ours.
    """
    parent = locate(directory)
    for name in entries(parent):
        aside = re.fullmatch(rf"\.({re.escape(prefix)}\d+)\.old-[0-9a-f]{{12}}", name)
        if aside:
            restore_aside(parent / aside[1], Storage())
    matches = (re.fullmatch(rf"{re.escape(prefix)}(\d+)", name) for name in entries(parent))
    found = [(int(m[1]), parent / m[0]) for m in matches if m and (not whole or is_checkpoint(parent / m[0]))]
    return sorted(found, key=lambda pair: (pair[0], str(pair[1])))


def incompleteness(path: Location) -> CheckpointError | None:
    """Return why a checkpoint cannot be loaded, as far as its manifest and the files' sizes tell; None if it can.

    Raises:
        CheckpointError: if the store of a URL does not answer.
    """
    try:
        opened = open_manifest(path)
        with closing(opened.directory) as files:
            problem = next(iter(_size_problems(files, opened.parse(), 0, 1)), None)
    except CheckpointError as error:
        problem = error
    if problem is not None and problem.code == "D0743":
        raise problem
    return problem


class Opened(NamedTuple):
    """An open directory and the bytes of its manifest, which nobody has looked at."""

    directory: Directory
    data: bytes

    @property
    def digest(self) -> str:
        return file_format.checksum(self.data)

    def parse(self) -> Manifest:
        """Return the manifest; from now on the directory's files can be opened by the names in it."""
        manifest = file_format.load(self.data, self.directory.where(MANIFEST))
        self.directory.enter(manifest.folder)
        return manifest


def open_manifest(path: Location) -> Opened:
    """Open a checkpoint and read its manifest's bytes. To be closed by the caller.

    Raises:
        CheckpointError: if nothing complete is there.
    """
    directory = _open(path)
    try:
        return Opened(directory, _manifest_bytes(directory))
    except BaseException:
        directory.close()
        raise


def open_same(path: Location, digest: str) -> Opened:
    """Open the checkpoint that rank 0 has opened, when this host sees it too.

    A client of a network file system, and a store, may show for a while what was there before: no checkpoint, or the
    one that has just been replaced. Ranks that read two checkpoints would end up with a mixture of them.
    """
    end = time.monotonic() + _SAME_S
    while True:
        try:
            opened = open_manifest(path)
            if opened.digest == digest:
                return opened
            opened.directory.close()
            seen = "another checkpoint than rank 0"
        except CheckpointError as error:
            if error.code not in ("D0701", "D0704"):
                raise
            seen = "no checkpoint, but rank 0 does"
        if time.monotonic() > end:
            raise CheckpointError(
                "D0717",
                f"host {platform.node()} sees {seen}",
                where=str(path),
                fix="load from a file system or store that all nodes share, and let no other job save there meanwhile",
            )
        time.sleep(_LOOK_S)


def _open(path: Location) -> Directory:
    if isinstance(path, Path) and not path.is_dir():
        raise CheckpointError(
            "D0701",
            "is not a directory" if path.exists() else "does not exist",
            where=str(path),
            fix="give the directory that save_state wrote; distrib.checkpoint.latest finds the newest",
        )
    return Directory(path)


def _manifest_bytes(directory: Directory) -> bytes:
    try:
        return directory.read(MANIFEST)
    except CheckpointError as error:
        if error.code != "D0704":
            raise
        raise CheckpointError(
            "D0701",
            f"is no complete checkpoint: it has no {MANIFEST}, which is written last",
            where=str(directory.path),
            fix="give the directory that save_state wrote; what another program saved has to be converted first",
        ) from error


def check(directory: Directory, manifest: Manifest, collectives: Collectives, *, verify: bool) -> None:
    """Compare this rank's part of the files with the manifest.

    Raises:
        CheckpointError: naming each file and tensor that is missing or damaged.
    """
    mine = collectives.rank, collectives.world_size
    problems = _size_problems(directory, manifest, *mine)
    if verify and not problems:
        problems = _byte_problems(directory, manifest, *mine)
    _raise_damage(problems)


def _raise_damage(problems: Sequence[CheckpointError]) -> None:
    if problems:
        first, rest = problems[0], problems[1:_MOST_LISTED]
        more = "".join(f"\n  {x.where}: {x.problem}" for x in rest)
        raise CheckpointError(first.code, first.problem + more, where=first.where, fix=first.fix)


def _size_problems(
    directory: Directory, manifest: Manifest, rank: int, world_size: int
) -> list[CheckpointError]:
    found = []
    for name in sorted(manifest.files)[rank::world_size]:
        try:
            directory.check_size(name, manifest.files[name])
        except CheckpointError as error:
            found.append(error)
            if len(found) > _MOST_LISTED:
                break
    return found


def _byte_problems(
    directory: Directory, manifest: Manifest, rank: int, world_size: int
) -> list[CheckpointError]:
    def problem(extent: Extent) -> CheckpointError | None:
        try:
            directory.check(extent)
        except CheckpointError as error:
            return error
        return None

    found = each(problem, portion(manifest, rank, world_size), directory.threads)
    return [x for x in found if x is not None]


def portion(manifest: Manifest, rank: int, world_size: int) -> list[Extent]:
    """Return the ranges that begin in this rank's part of all bytes, so that the ranks share the reading."""
    total, at, found = file_format.total_bytes(manifest), 0, []
    for extent in file_format.checked_bytes(manifest):
        if at * world_size // max(total, 1) == rank:
            found.append(extent)
        at = min(at + extent.stop - extent.start, max(total - 1, 0))
    return found
