"""A local copy of what lies at a URL, for what has to work on files: conversions from other programs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from distrib.checkpoint.location import Url, locate
from distrib.checkpoint.progress import Progress, no_progress
from distrib.checkpoint.store import AT_ONCE, RANGE, Store
from distrib.errors import CheckpointError

_PIECE = RANGE * AT_ONCE  # bytes asked for at a time


@contextmanager
def fetched(place: str | Path | Url, progress: Progress = no_progress) -> Iterator[Path]:
    """Give the path of a file or directory; of a URL, a copy in a temporary directory (`TMPDIR`), removed afterwards.

    Args:
        place: A path or a URL.
        progress: Told about the bytes that have been copied.

    Raises:
        CheckpointError: if nothing is there, it does not fit on the disk, or the store does not answer.
    """
    found = locate(place)
    if isinstance(found, Path):
        yield found
        return
    with TemporaryDirectory(prefix="distrib-") as above:
        yield _copy(found, Path(above), progress)


def _copy(url: Url, above: Path, progress: Progress) -> Path:
    beside, target = Store(url.parent), above / url.name
    names = Store(url).sizes()
    sizes = {f"{url.name}/{name}": size for name, size in names.items() if name}
    alone = beside.size(url.name) if not sizes else None
    if alone is not None:
        sizes = {url.name: alone}
    _check(url, above, sizes)
    done, total = 0, sum(sizes.values())
    for name, size in sizes.items():
        (above / name).parent.mkdir(parents=True, exist_ok=True)
        with (above / name).open("wb") as file:
            for at in range(0, size, _PIECE):
                for part in beside.read(name, at, min(at + _PIECE, size)):
                    file.write(part)
                    done += len(part)
                progress(done, total)
            _check_whole(url.parent / name, file.tell(), size)
    return target


def _check(url: Url, above: Path, sizes: Mapping[str, int]) -> None:
    if not sizes:
        raise CheckpointError("D0721", "does not exist", where=str(url), fix="correct the URL")
    for name in sizes:
        if {"", ".", ".."} & set(name.split("/")) or "\0" in name or PurePosixPath(name).is_absolute():
            raise CheckpointError(
                "D0707",
                f"has an object {name!r}, which cannot be a file below it",
                where=str(url),
                fix="remove that object, or copy the others",
            )
    needed, free = sum(sizes.values()), shutil.disk_usage(above).free
    if needed > free:
        raise CheckpointError(
            "D0713",
            f"the copy of {url} needs {needed / 2**20:,.1f} MiB, but only {free / 2**20:,.1f} MiB are free",
            where=str(above.parent),
            fix="set TMPDIR to a directory with more room, or copy it to one yourself",
        )


def _check_whole(url: Url, found: int, size: int) -> None:
    if found != size:
        raise CheckpointError(
            "D0705",
            f"{found} bytes could be read; expected {size}",
            where=str(url),
            fix="see that nobody writes there meanwhile, and try again",
        )
