"""An object store or any other file system that fsspec reaches: the few operations that checkpoints need.

There is no rename, no append and no directory to rely on. What is relied on: an object is seen whole or not at all, and
who has written one reads it back. Every failure is a `CheckpointError` with the URL and the store's own words.
"""

from __future__ import annotations

import contextlib
import importlib
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from distrib.checkpoint.location import Url
from distrib.errors import CheckpointError

Write = Callable[["bytes | memoryview"], None]

# Stores of keys, where one request shows a whole object. Any other file system has folders, which have to be made,
# and files that grow while they are written, so that a file that others read needs a rename.
_KEYS = frozenset(
    {"abfs", "abfss", "adl", "az", "gcs", "gs", "hf", "memory", "oci", "oss", "s3", "s3a", "tos"}
)
_PART = 32 * 2**20  # bytes uploaded at a time, at least; S3 takes 5 MiB to 5 GiB
_MOST_PARTS = 9_000  # of one object; S3 takes 10,000
AT_ONCE = 8  # ranges that a reader asks for at the same time
RANGE = 8 * 2**20  # bytes of one of them


class Store:
    """What lies below a URL, by names relative to it: "model/rank-00000.safetensors".

    Args:
        url: The place; nothing has to be there.

    Raises:
        CheckpointError: if the URL's file system is unknown or a package for it is not installed.
    """

    def __init__(self, url: Url) -> None:
        self.url = url
        self._fs, root = _connect(url)
        self._root = root.rstrip("/")
        self._has_keys = url.scheme in _KEYS

    def get(self, name: str, stop: int | None = None) -> bytes | None:
        """Return the first `stop` bytes of an object, by default all of one version of it; None if there is none."""
        with self._calling("reading", name):
            try:
                found: bytes = self._fs.cat_file(
                    self._key(name), **({} if stop is None else {"start": 0, "end": stop})
                )
            except FileNotFoundError:
                return None
        return found

    def read(self, name: str, start: int, stop: int) -> Sequence[bytes]:
        """Return bytes `start` to `stop` of an object, in pieces that were fetched at the same time.

        Fewer, if the object ends before.
        """
        starts = list(range(start, stop, RANGE))
        ends = [min(at + RANGE, stop) for at in starts]
        with self._calling("reading", name):
            found: list[bytes] = self._fs.cat_ranges(
                [self._key(name)] * len(starts), starts, ends, on_error="raise"
            )
        return found

    def size(self, name: str) -> int | None:
        """Return an object's size in bytes; None if there is none."""
        with self._calling("looking at", name):
            self._fs.invalidate_cache()
            try:
                return int(self._fs.info(self._key(name))["size"])
            except FileNotFoundError:
                return None

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Return the size in bytes of every object below, at any depth, by name; as the store lists them."""
        with self._calling("listing", folder):
            self._fs.invalidate_cache()
            try:
                found = self._fs.find(self._key(folder), detail=True)
            except FileNotFoundError:
                return {}
            skip = len(self._root) + 1
            return {
                name[skip:]: int(info["size"]) for name, info in found.items() if name.startswith(self._root)
            }

    def names(self) -> list[str]:
        """Return what lies directly below, objects and folders, sorted; as the store lists it."""
        with self._calling("listing", ""):
            self._fs.invalidate_cache()
            try:
                found = self._fs.ls(self._root, detail=False)
            except FileNotFoundError:
                return []
            names = {
                name.rstrip("/").rpartition("/")[2]
                for name in found
                if len(name.rstrip("/")) > len(self._root)
            }
            return sorted(names)

    def put(self, name: str, data: bytes) -> None:
        """Write an object that readers see whole or not at all, in place of an older one."""
        with self._calling("writing", name):
            if self._has_keys:
                self._fs.pipe_file(self._key(name), data)
                return
            folder, _, base = name.rpartition("/")
            hidden = self._key(f"{folder}/.{base}.tmp-{secrets.token_hex(6)}".lstrip("/"))
            self._make_folder(name)
            self._fs.pipe_file(hidden, data)
            self._fs.mv(hidden, self._key(name))

    def create(self, name: str, data: bytes) -> bool:
        """Write an object unless there is one; one request where the store can, else a look before it.

        Returns:
            False if there was one.
        """
        with self._calling("writing", name):
            self._make_folder(name)
            key = self._key(name)
            try:
                self._fs.pipe_file(key, data, mode="create")
            except FileExistsError:
                return False
            except Exception:  # noqa: BLE001 (stores without conditional writes each refuse them in their own words)
                self._fs.invalidate_cache()
                if self._fs.exists(key):
                    return False
                self._fs.pipe_file(key, data)
            return True

    def remove(self, name: str) -> None:
        """Remove an object, or a folder with all below it; nothing if there is none."""
        with self._calling("removing", name):
            self._fs.invalidate_cache()
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm(self._key(name), recursive=True)

    @contextmanager
    def writing(self, name: str, size: int) -> Iterator[Write]:
        """Write a new object piece by piece; large ones are uploaded in parts while they grow.

        If the body fails, the upload is given up. Whatever is left of it is under a name that nobody reads.

        Args:
            name: One that no object has.
            size: How many bytes it is going to have.

        Raises:
            CheckpointError: if the store refuses a part, or has another number of bytes in the end.
        """
        part = max(_PART, -(-size // _MOST_PARTS // 2**20) * 2**20)
        with self._calling("writing", name):
            self._make_folder(name)
            file = self._fs.open(self._key(name), "wb", block_size=part)

        def write(data: bytes | memoryview) -> None:
            with self._calling("writing", name):
                file.write(data)

        try:
            yield write
            with self._calling("writing", name):
                file.close()
        except BaseException:
            with contextlib.suppress(CheckpointError), self._calling("giving up", name):
                _give_up(file)
            raise
        found = self.size(name)
        if found != size:
            raise CheckpointError(
                "D0745",
                f"{size} bytes were written, but the store has {'none' if found is None else found}",
                where=str(self.url / name),
                fix="save again; if it happens again, the store or what stands before it loses data",
            )

    def _key(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _make_folder(self, name: str) -> None:
        if not self._has_keys:  # s3fs would make a bucket that does not exist
            self._fs.makedirs(self._key(name).rpartition("/")[0], exist_ok=True)

    @contextmanager
    def _calling(self, what: str, name: str) -> Iterator[None]:
        try:
            yield
        except CheckpointError:
            raise
        except Exception as error:  # what a file system's client raises is not always an OSError
            raise CheckpointError(
                "D0743",
                f"{what} it failed: {type(error).__name__}: {error}",
                where=str(self.url / name if name else self.url),
                fix="see that the bucket exists, credentials allow reading, writing, listing and deleting, and the store "
                "can be reached",
            ) from error


def _connect(url: Url) -> tuple[Any, str]:
    try:
        fsspec = importlib.import_module("fsspec.core")
    except ImportError as error:
        raise _lacks(url, f"fsspec, which cannot be imported: {error}") from error
    try:
        found: tuple[Any, str] = fsspec.url_to_fs(str(url))
    except ImportError as error:
        raise _lacks(url, f"a package for {url.scheme}:// ({error})") from error
    except ValueError as error:
        raise CheckpointError(
            "D0741",
            f"is a URL that fsspec cannot use: {error}",
            where=str(url),
            fix="use a scheme that fsspec knows, such as s3, gs or az; or a path",
        ) from error
    except Exception as error:  # some clients look for credentials when they are made
        raise CheckpointError(
            "D0743",
            f"connecting failed: {type(error).__name__}: {error}",
            where=str(url),
            fix="see to its credentials",
        ) from error
    return found


def _lacks(url: Url, what: str) -> CheckpointError:
    return CheckpointError(
        "D0742",
        f"checkpoints there need {what}",
        where=str(url),
        fix="pip install 'distrib[remote]' and the package of the store: s3fs, gcsfs, adlfs, ...",
    )


def _give_up(file: Any) -> None:
    """Close a file that is not to be; fsspec's own close would complete the upload, also when it is collected."""
    if not isinstance(file, importlib.import_module("fsspec.spec").AbstractBufferedFile):
        file.close()  # a local file or memory: what has been written is there, under a name that nobody reads
        return
    try:
        file.discard()
    finally:
        file.closed = True
