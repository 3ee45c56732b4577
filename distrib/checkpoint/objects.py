"""Reading objects of a store: sizes from one listing, large ranges at the same time, small ones together."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from distrib.checkpoint.location import Url
from distrib.checkpoint.store import AT_ONCE, RANGE, Store

_WINDOW = 4 * 2**20  # bytes fetched for a small range: those after it are mostly asked for next
_MOST_WINDOWS = 4


class Objects:
    """The objects below a URL, which do not change while they are read."""

    def __init__(self, url: Url) -> None:
        self._store = Store(url)
        self._sizes: dict[str, dict[str, int]] = {}  # folder -> name -> bytes
        self._windows: OrderedDict[str, tuple[int, bytes]] = (
            OrderedDict()
        )  # name -> offset and bytes, latest last

    @contextmanager
    def open(self, name: str) -> Iterator[Object]:
        """Give an object; nothing has to be closed.

        Raises:
            FileNotFoundError: if there is none.
            CheckpointError: if the store refuses.
        """
        size = self._size(name)
        if size is None:
            raise FileNotFoundError(name)
        yield Object(self, name, size)

    def mapped(self, _name: str) -> None:
        """Return None: a store has no files to map."""

    def close(self) -> None:
        """Forget what was read."""
        self._windows.clear()

    def read(self, name: str) -> bytes:
        """Return all of one version of an object.

        Raises:
            FileNotFoundError: if there is none any more.
        """
        data = self._store.get(name)
        if data is None:
            raise FileNotFoundError(name)
        return data

    def read_into(self, name: str, size: int, view: memoryview, at: int) -> int:
        """Fill `view` as far as one request goes; returns the number of bytes."""
        stop = min(at + min(len(view), RANGE * AT_ONCE), size)
        if stop <= at:
            return 0
        if stop - at < _WINDOW:
            return self._from_window(name, size, view, at, stop)
        done = 0
        for part in self._store.read(name, at, stop):
            view[done : done + len(part)] = part
            done += len(part)
        return done

    def _from_window(self, name: str, size: int, view: memoryview, at: int, stop: int) -> int:
        start, data = self._windows.get(name, (0, b""))
        if not start <= at < stop <= start + len(data):
            start = at
            data = b"".join(self._store.read(name, at, min(at + _WINDOW, size)))
            self._windows[name] = start, data
            if len(self._windows) > _MOST_WINDOWS:
                self._windows.popitem(last=False)
        self._windows.move_to_end(name)
        part = data[at - start : stop - start]
        view[: len(part)] = part
        return len(part)

    def _size(self, name: str) -> int | None:
        folder, _, rest = name.partition("/")
        if not rest:
            return self._store.size(name)
        if folder not in self._sizes:
            self._sizes[folder] = self._store.sizes(folder)
        found = self._sizes[folder].get(name)
        return self._store.size(name) if found is None else found  # a listing may be late


class Object:
    """One object of a known size.

    Attributes:
        size: In bytes.
        piece: As many bytes as are asked for at the same time.
    """

    piece = RANGE * AT_ONCE

    def __init__(self, objects: Objects, name: str, size: int) -> None:
        self.size = size
        self._objects, self._name = objects, name

    def read(self) -> bytes:
        """Return all of it, in one request."""
        return self._objects.read(self._name)

    def read_into(self, view: memoryview, at: int) -> int:
        """Fill `view` from offset `at` on, as far as one request goes."""
        return self._objects.read_into(self._name, self.size, view, at)
