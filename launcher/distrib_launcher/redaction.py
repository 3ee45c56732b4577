"""Passwords, tokens and keys are taken out of everything that the launcher itself prints or stores.

A name tells that a value is secret: that of a variable, a flag or a setting. In running text, where no name stands
beside it, a value is looked for by what the environment and the command line hold, and by well-known shapes. Redact
before a text is cut to a width: half a secret is not recognized.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final
from urllib.parse import quote

_SHORTEST = 8  # characters; what is shorter turns up in other words, and no service gives out or accepts less
_WORD = 16  # letters; up to here a value of letters alone may be a word that texts are made of, such as "postgres"
_NUMBER = 12  # digits; likewise
_LINE = 16  # characters; a shorter line of a value of several lines is not looked for by itself

# Names are compared in capitals with "_" between their words and at both ends: hubToken is _HUB_TOKEN_.
_SURE = re.compile(
    r"(?:PASSWORD|PASSWD|PASSPHRASE|SECRETS?|CREDENTIALS?|API_?KEY|WEBHOOK|_SSHPASS)_"
    r"|_(?:ACCESS|PRIVATE|AUTH|ENCRYPTION|SIGNING|MASTER|ACCOUNT|STORAGE|SSH|DEPLOY|SUBSCRIPTION)_KEY_(?:\d+_)?$"
    r"|(?:TOKEN|[A-Z0-9]_PWD|[A-Z0-9]_PASS|[A-Z0-9]_PAT|COOKIE|_CONNECTION_STRING)_(?:\d+_)?$"
)
_UNSURE = re.compile(r"TOKEN_|_(?:KEY|PRIVATE|AUTH)_")  # its value has to look like chance
_ABOUT = re.compile(  # what follows the word says that the value is something about the secret
    r"_(?:PATH|FILE|FILENAME|DIR|FOLDER|HOME|SOCK|SOCKET|NAME|TYPE|ENDPOINT|HOST|LENGTH|LEN|COUNT|SIZE|LIMIT|TTL"
    r"|TIMEOUT|EXPIRY|(?<!WEBHOOK_)UR[LI]|(?<!SECRET_)ID)_$"
)
_OTHER = re.compile(  # tokens of a text, passes over data, keys that are meant to be seen
    r"_(?:PAD|EOS|BOS|UNK|MASK|SEP|CLS|SPECIAL|IMAGE|IMG|VIDEO|AUDIO|START|STOP|END|BEGIN|FIRST|NEXT|LAST|WORD|NUM|N"
    r"|PER|MAX|MIN|ONE|SINGLE|SECOND|MULTI|FORWARD|BACKWARD)_(?:TOKEN|PASS)_$|_PUBLIC_KEY_"
)
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_NO_NAME = re.compile(r"[^A-Za-z0-9]+")
_EMPTY_WORDS = frozenset(["", "true", "false", "none", "null", "yes", "no", "on", "off", "auto", "0", "1"])
_CHANCE = re.compile(r"[0-9a-fA-F]{32,}|(?=\S*[a-z])(?=\S*[A-Z])(?=\S*[0-9])\S{20,}")

_FLAG = re.compile(r"--?([A-Za-z][\w.-]*)")
_LONG_OR_LETTER = re.compile(r"--[A-Za-z][\w.-]*(?:=.*)?|-[A-Za-z]", re.DOTALL)
_ASSIGNMENT = re.compile(r"([-+~]*([A-Za-z_][\w.\-/]*)=)(.+)", re.DOTALL)

_URL_PASSWORD = re.compile(r"(\b[A-Za-z][A-Za-z0-9+.-]*://[^\s/:@'\"<>]*:)([^\s/'\"<>]+)(?=@)")
_URL_USER = re.compile(r"(\bhttps?://)(?=[^\s/:@]*[0-9])([^\s/:@'\"<>]{16,})(?=@)")
_SHAPES: Final[Mapping[str, str]] = {  # long, and begun by letters that nothing else begins with
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{30,}",
    "a GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{40,})",
    "a GitLab token": r"\bglpat-[A-Za-z0-9_-]{20,}",
    "a Slack token": r"\bxox[abeprs]-[A-Za-z0-9-]{20,}",
    "an API key": r"\bsk-(?=[A-Za-z_-]*[0-9])[A-Za-z0-9_-]{32,}",
    "a Google API key": r"\bAIza[A-Za-z0-9_-]{35}",
    "an AWS key id": r"\b(?:AKIA|ASIA)[A-Z2-7]{16}\b",
    "a JSON web token": r"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]+",
    "a bearer token": r"(?<=\b[Bb]earer )[A-Za-z0-9._~+/=-]{16,}",
}
_SHAPE = re.compile("|".join(f"({shape})" for shape in _SHAPES.values()), re.DOTALL)


class Redactor:
    """Replaces secrets by `<redacted: NAME>`.

    Args:
        env: The launcher's environment. A variable whose name looks secret gives a value to look for, unless that is
            short, a plain word or number, or the path of something that exists; any variable gives the password of a
            URL in it.
        command_line: Words of which those that `words` replaces are looked for in texts too.
        exists: Tells whether a path is there.
    """

    def __init__(
        self,
        env: Mapping[str, str],
        command_line: Sequence[str] = (),
        *,
        exists: Callable[[str], bool] = os.path.exists,
    ) -> None:
        self._exists = exists
        told = [(name, value) for name, value in env.items() if self._is_secret(name, value)]
        told += [(name, found[2]) for name, value in env.items() for found in _URL_PASSWORD.finditer(value)]
        told += [(name, value) for _, name, value in self._parts(command_line) if name]
        self._marks = _marks(told)
        longest_first = sorted(self._marks, key=len, reverse=True)
        self._values = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def text(self, text: str) -> str:
        """Return a text without secrets. Known values are also found as JSON, a shell, Python or a URL writes them."""
        text = self._values.sub(lambda found: self._marks[found[0]], text)
        text = _SHAPE.sub(lambda found: _mark(list(_SHAPES)[(found.lastindex or 1) - 1]), text)
        text = _URL_PASSWORD.sub(lambda found: found[1] + _mark("password"), text)
        return _URL_USER.sub(lambda found: found[1] + _mark("user"), text)

    def words(self, words: Sequence[str]) -> list[str]:
        """Return a command line without secrets: one word for each, `--token X`, `--token=X` and `token=X` alike."""
        return [
            self.text(shown) + (_mark(name) if name else self.text(value))
            for shown, name, value in self._parts(words)
        ]

    def mapping(self, values: Mapping[str, str]) -> dict[str, str]:
        """Return an environment, or other named values, without secrets."""
        return {
            name: _mark(name) if self._is_secret(name, value) else self.text(value)
            for name, value in values.items()
        }

    def _parts(self, words: Iterable[str]) -> Iterator[tuple[str, str, str]]:
        """Yield of each word what can be shown, and the rest with the name that makes it a secret, if one does."""
        flag = ""
        for word in words:
            if flag and not _LONG_OR_LETTER.fullmatch(word) and self._is_secret(flag, word):
                yield "", flag, word
                flag = ""
                continue
            found = _FLAG.fullmatch(word)
            flag = found[1] if found else ""
            assigned = _ASSIGNMENT.fullmatch(word)
            if assigned and self._is_secret(assigned[2], assigned[3]):
                yield assigned[1], assigned[2], assigned[3]
            else:
                yield "", "", word

    def _is_secret(self, name: str, value: str) -> bool:
        if value.lower() in _EMPTY_WORDS or not names_secret(name, value):
            return False
        return not (os.path.isabs(value) and self._exists(value))  # noqa: PTH117 (a path only perhaps)


def names_secret(name: str, value: str) -> bool:
    """Whether a variable, flag or setting of this name holds a secret.

    Args:
        name: Such as `HF_TOKEN`, `api-key`, `wandb.apiKey`.
        value: Of a name that may mean something else, such as `SORT_KEY`, only a value that looks like chance counts.
    """
    spelled = f"_{_NO_NAME.sub('_', _CAMEL.sub('_', name)).strip('_').upper()}_"
    if _ABOUT.search(spelled) or _OTHER.search(spelled):
        return False
    if _SURE.search(spelled):
        return True
    return bool(_UNSURE.search(spelled) and _CHANCE.fullmatch(value))


def _mark(name: str) -> str:
    return f"<redacted: {name}>"


def _marks(told: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return what to put in the place of each value, however it may be written. Of equal values the first name counts."""
    marks: dict[str, str] = {}
    for name, value in told:
        for part in (value, *_long_lines(value)):
            for form in _forms(part):
                marks.setdefault(form, _mark(name))
    names = "".join(marks.values())
    return {form: mark for form, mark in marks.items() if form not in names}


def _long_lines(value: str) -> list[str]:
    """Return the lines of a key that takes several, since a report shows lines."""
    lines = value.splitlines()
    return [line for line in lines if len(line) >= _LINE and "-----" not in line] if len(lines) > 1 else []


def _forms(value: str) -> set[str]:
    """Return how a value may stand in a text: itself, or within quotes, also twice over. Empty if it is no rarity."""
    value = value.strip()
    few_kinds = (value.isalpha() and len(value) < _WORD) or (value.isdigit() and len(value) < _NUMBER)
    if len(value) < _SHORTEST or few_kinds:
        return set()
    once = {value, *_quoted(value)}
    return once | {twice for form in once for twice in _quoted(form)}


def _quoted(value: str) -> Iterator[str]:
    yield json.dumps(value)[1:-1]
    yield json.dumps(value, ensure_ascii=False)[1:-1]
    yield repr(value)[1:-1]
    yield shlex.quote(f" {value}")[2:-1]  # the blank makes it quote, and leave nothing but the inner part
    yield quote(value, safe="", errors="surrogateescape")
