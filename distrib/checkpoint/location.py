"""Where a checkpoint lies: a directory, or a URL of an object store."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias
from urllib.parse import unquote, urlsplit

from distrib.errors import CheckpointError

_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<rest>.*)")
_COLLAPSED = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):/(?P<rest>[^/].*)")  # what Path makes of a URL
_MAGIC = re.compile(r"[*?\[\]]")  # fsspec takes names with these for patterns when it removes


@dataclass(frozen=True)
class Url:
    """A place in an object store, such as `s3://bucket/run/step-1`; made by `locate`.

    Attributes:
        scheme: What stands before "://", in lower case; it chooses the file system.
        rest: What stands after it, without a slash at the end.
    """

    scheme: str
    rest: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.rest}"

    def __truediv__(self, name: str) -> Url:
        return Url(self.scheme, f"{self.rest}/{name}")

    @property
    def name(self) -> str:
        """The last part."""
        return self.rest.rpartition("/")[2]

    @property
    def parent(self) -> Url:
        """All but the last part; of a bucket, the bucket itself."""
        return Url(self.scheme, self.rest.rpartition("/")[0]) if "/" in self.rest.strip("/") else self


Location: TypeAlias = Path | Url


def locate(place: str | Path | Url) -> Location:
    """Return the absolute path or the URL that `place` names. Nothing is looked up.

    `file://` URLs are paths: a local or mounted directory gets all that one can do, such as an atomic swap.

    Raises:
        CheckpointError: if a URL cannot be one of a checkpoint.
    """
    if isinstance(place, Url):
        return place
    text = str(place)
    collapsed = _COLLAPSED.fullmatch(text)
    if collapsed:
        raise _unusable(
            text, "pathlib has taken a slash from a URL", f'give it as text: "{collapsed["scheme"]}://..."'
        )
    if "://" not in text:
        return Path(place).absolute()
    return _url(text)


def locate_below(base: str | Path | Url, name: str) -> Location:
    """Return the place `name`, which lies below `base` unless it is absolute or a URL."""
    if "://" in name or Path(name).is_absolute():
        return locate(name)
    place = locate(base)
    if isinstance(place, Path):
        return place / name
    return locate(f"{place}/{name.strip('/')}")


def _url(text: str) -> Location:
    found = _URL.fullmatch(text)
    if "::" in text or found is None:
        raise _unusable(
            text, "is no plain URL", 'write it like "s3://bucket/run/step-1", without chained file systems'
        )
    scheme, rest = found["scheme"].lower(), found["rest"].rstrip("/")
    if scheme == "file":
        return _local(text)
    if ":" in rest.partition("/")[0].rpartition("@")[0]:
        hidden = f"{scheme}://...@{rest.rpartition('@')[2]}"
        raise _unusable(
            hidden,
            "has a password in it, which would get into logs",
            "give credentials by environment variables or by the files that the store's own tools read",
        )
    parts = rest.lstrip("/").split("/")
    if not all(parts) or {".", ".."} & set(parts):
        raise _unusable(
            text, "has an empty, '.' or '..' part", "write the place out, beginning with the bucket"
        )
    if _MAGIC.search(rest):
        raise _unusable(text, "has one of the characters * ? [ ]", "name the place without them")
    return Url(scheme, rest)


def _local(text: str) -> Path:
    parts = urlsplit(text)
    if parts.netloc not in ("", "localhost") or parts.query or parts.fragment or not parts.path:
        raise _unusable(text, "is no URL of a local path", 'write three slashes: "file:///data/run"')
    return Path(unquote(parts.path))


def _unusable(text: str, problem: str, fix: str) -> CheckpointError:
    return CheckpointError("D0741", problem, where=text, fix=fix)
