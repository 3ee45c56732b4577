"""All that is wrong with a checkpoint's bytes, one finding for each file and tensor."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

from distrib.checkpoint.files import Directory
from distrib.checkpoint.format import Manifest, checked_bytes
from distrib.checkpoint.location import Url, locate
from distrib.checkpoint.opening import inspect
from distrib.checkpoint.progress import Progress, no_progress
from distrib.errors import CheckpointError


def damage(directory: str | Path | Url, progress: Progress = no_progress) -> Iterator[CheckpointError]:
    """Read every byte of a checkpoint and yield what is missing, cut short or changed.

    A file whose size is wrong is one finding; of all others each damaged tensor, or the file's head, is one.

    Raises:
        CheckpointError: if the manifest cannot be trusted, so that nothing can be said about the rest.
    """
    manifest = inspect(directory)
    opened = Directory(locate(directory))
    opened.enter(manifest.folder)
    try:
        broken = {}
        for name in sorted(manifest.files):
            try:
                opened.check_size(name, manifest.files[name])
            except CheckpointError as error:
                broken[name] = error
        yield from broken.values()
        yield from _damaged(opened, manifest, broken.keys(), progress)
    finally:
        opened.close()


def _damaged(
    opened: Directory, manifest: Manifest, skipped: Collection[str], progress: Progress
) -> Iterator[CheckpointError]:
    extents = [x for x in checked_bytes(manifest) if x.file not in skipped]
    done, total = 0, sum(x.stop - x.start for x in extents)
    for extent in extents:
        try:
            opened.check(extent)
        except CheckpointError as error:
            yield error
        done += extent.stop - extent.start
        progress(done, total)
