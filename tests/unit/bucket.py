"""An object store in memory: whole objects, multi-part uploads, and requests that fail when a test says so."""

from __future__ import annotations

import fnmatch
import threading
from dataclasses import dataclass, field

from fsspec.spec import AbstractBufferedFile, AbstractFileSystem


@dataclass
class Service:
    """What stands behind all clients: objects by key, and which request is to fail.

    `fail_at` counts requests from 1; `stuck` lets all later ones fail too; `lost` lets a request take effect although
    its client is told that it failed, as when a connection breaks before the answer.
    """

    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    open_uploads: int = 0
    fail_at: int = 0
    stuck: bool = False
    lost: bool = False
    conditional: bool = True
    watcher: object = None
    lock: threading.RLock = field(default_factory=threading.RLock)

    def inject(self, fail_at=0, *, stuck=False, lost=False):
        """Count requests from now on."""
        self.requests, self.fail_at, self.stuck, self.lost = [], fail_at, stuck, lost

    def request(self, what, key, effect):
        """Do `effect`, unless this request is to fail; its client then sees an error of no kind it knows."""
        with self.lock:
            self.requests.append((what, key))
            number = len(self.requests)
            fails = self.fail_at and (number == self.fail_at or (self.stuck and number > self.fail_at))
            if fails and not self.lost:
                raise RuntimeError(f"request {number} refused: {what}")
            result = effect()
            if self.watcher:
                self.watcher(what, key)
            if fails:
                raise RuntimeError(f"no answer to request {number}: {what}")
            return result

    def matching(self, pattern):
        """Keys that fit a shell pattern."""
        return sorted(key for key in self.objects if fnmatch.fnmatchcase(key, pattern))


class Bucket(AbstractFileSystem):
    """A client of `service`, which a test sets; `bucket://name/key`."""

    protocol = "bucket"
    cachable = False
    service = Service()

    def _ask(self, what, key, effect):
        return self.service.request(what, key, effect)

    def _get(self, key):
        if key not in self.service.objects:
            raise FileNotFoundError(key)
        return self.service.objects[key]

    def info(self, path, **_):
        return self._ask("head", path, lambda: {"name": path, "size": len(self._get(path)), "type": "file"})

    def exists(self, path, **_):
        return self._ask("head", path, lambda: path in self.service.objects)

    def cat_file(self, path, start=None, end=None, **_):
        return self._ask("get", path, lambda: self._get(path)[start:end])

    def cat_ranges(self, paths, starts, ends, on_error="return", **_):
        assert on_error == "raise"
        return [self.cat_file(*each) for each in zip(paths, starts, ends, strict=True)]

    def _below(self, path):
        return [key for key in sorted(self.service.objects) if key.startswith(f"{path}/")]

    def find(self, path, detail=False, **_):
        def effect():
            return {key: {"name": key, "size": len(self.service.objects[key])} for key in self._below(path)}

        return self._ask("list", path, effect)

    def ls(self, path, detail=False, **_):
        def effect():
            return sorted({f"{path}/{key[len(path) + 1 :].partition('/')[0]}" for key in self._below(path)})

        return self._ask("list", path, effect)

    def rm(self, path, recursive=False, **_):
        keys = self._ask(
            "list", path, lambda: [*self._below(path), *([path] if path in self.service.objects else [])]
        )
        if not keys:
            raise FileNotFoundError(path)
        for key in keys:
            self._ask("delete", key, lambda key=key: self.service.objects.pop(key, None))

    def pipe_file(self, path, value, mode="overwrite", **_):
        def effect():
            if mode == "create" and path in self.service.objects:
                raise FileExistsError(path)
            self.service.objects[path] = bytes(value)

        if mode == "create" and not self.service.conditional:
            raise NotImplementedError("If-None-Match")
        self._ask("put", path, effect)

    def _open(self, path, mode="rb", block_size=None, autocommit=True, **_):
        assert mode == "wb"
        return Upload(self, path, mode, block_size=block_size, autocommit=autocommit)


class Upload(AbstractBufferedFile):
    """A multi-part upload: nothing is seen before it is complete."""

    parts = None

    def _initiate_upload(self):
        def effect():
            self.fs.service.open_uploads += 1

        self.fs._ask("create-upload", self.path, effect)
        self.parts = []

    def _upload_chunk(self, final=False):
        self.buffer.seek(0)
        data = self.buffer.read()
        self.fs._ask("upload-part", self.path, lambda: self.parts.append(data))
        if final:

            def effect():
                self.fs.service.objects[self.path] = b"".join(self.parts)
                self.fs.service.open_uploads -= 1

            self.fs._ask("complete-upload", self.path, effect)
            self.parts = None
        return True

    def discard(self):
        if self.parts is not None:

            def effect():
                self.fs.service.open_uploads -= 1

            self.fs._ask("abort-upload", self.path, effect)
            self.parts = None
