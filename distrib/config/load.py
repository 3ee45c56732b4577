"""From a file, the environment and flags to one RunConfig, and back to a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from distrib.config.checks import resolve, variable_of
from distrib.config.documents import Document, dump, parse, parse_scalar, plain
from distrib.config.run_config import RunConfig, assemble, settings_in
from distrib.config.schema import is_valid, keys, nested, sections
from distrib.config.settings import Setting, Source
from distrib.errors import ConfigError

FILE_VARIABLE: Final = "DISTRIB_CONFIG_FILE"
WIRE_VARIABLE: Final = "DISTRIB_CONFIG"
DEFAULT_FILE: Final = "distrib.yaml"
_PREFIX: Final = "DISTRIB_"


def load_config(
    file: str | Path | None = None,
    *,
    env: Mapping[str, str],
    flags: Mapping[str, tuple[object, str]] | None = None,
    cwd: Path | None = None,
    read_cwd: bool = True,
) -> RunConfig:
    """Combine flags, environment, file and defaults; the first of these that sets a key wins.

    Args:
        file: The YAML or JSON file; by default the one DISTRIB_CONFIG_FILE names, else `distrib.yaml` in `cwd`.
        env: Its `DISTRIB_<KEY>` and `DISTRIB_<SECTION>__<KEY>` count, unless empty; so must all others that start
            with DISTRIB_ be known.
        flags: dotted key -> (value, flag as the user typed it); a text is read as a file would read it, and a value
            that is None was not given.
        cwd: The folder that relative files start from; the working directory by default.
        read_cwd: Whether `distrib.yaml` is looked for.

    Raises:
        ConfigError: with every problem of every layer at once.
    """
    path = _choose_file(file, env, cwd or Path(), read_cwd=read_cwd)
    document = Document({}) if path is None else parse(_read(path, cwd or Path(), file, env), path)
    settings = [*_from_file(document, path), *_from_env(env), *_from_flags(flags or {})]
    return assemble(resolve(settings, document.problems), path)


def dump_config(config: RunConfig) -> str:
    """Write what was set as YAML; loading it gives the same values."""
    return dump(nested({key: _listed(value) for key, value in config.set_values().items()}))


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _choose_file(
    file: str | Path | None, env: Mapping[str, str], cwd: Path, *, read_cwd: bool
) -> Path | None:
    named = file if file is not None else env.get(FILE_VARIABLE) or None
    if named is not None:
        return Path(named)
    return Path(DEFAULT_FILE) if read_cwd and (cwd / DEFAULT_FILE).exists() else None


def _read(path: Path, cwd: Path, file: str | Path | None, env: Mapping[str, str]) -> str:
    by_variable = file is None and env.get(FILE_VARIABLE)
    try:
        return (cwd / path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:  # ValueError: a NUL or a lone surrogate in the path
        reason = error.strerror if isinstance(error, OSError) else str(error)
        reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else reason
        named = f" (named by {FILE_VARIABLE})" if by_variable else ""
        raise ConfigError(
            "D0102",
            f"the configuration cannot be read: {reason}{named}; expected a YAML or JSON file",
            where=str(path) if str(path).isprintable() else repr(str(path)),
            fix=f"correct {FILE_VARIABLE}, or unset it" if by_variable else "correct the path",
        ) from None


def _from_file(document: Document, path: Path | None) -> Iterator[Setting]:
    for name, located in document.entries.items():
        if name in sections() and isinstance(located.value, dict):
            for key, inner in located.value.items():
                yield Setting(f"{name}.{key}", plain(inner), Source("file", f"{path}:{inner.line}"))
        elif not (name in sections() and located.value is None):  # a section whose keys are all commented out
            yield Setting(name, plain(located), Source("file", f"{path}:{located.line}"))


def _from_env(env: Mapping[str, str]) -> Iterator[Setting]:
    for variable, text in env.items():
        if variable.startswith(_PREFIX) and variable not in (FILE_VARIABLE, WIRE_VARIABLE) and text:
            key = _key_of(variable)
            yield from settings_in({key: _from_text(key, text)}, Source("env", variable))


def _key_of(variable: str) -> str:
    by_variable = {variable_of(key): key for key in (*keys(), *sections())}
    return by_variable.get(variable, variable.removeprefix(_PREFIX).lower().replace("__", "."))


def _from_flags(flags: Mapping[str, tuple[object, str]]) -> Iterator[Setting]:
    for key, (value, flag) in flags.items():
        if value is not None:
            given = _from_text(key, value) if isinstance(value, str) else value
            yield from settings_in({key: given}, Source("flag", flag))


def _from_text(key: str, text: str) -> Any:
    """Read a text as YAML, unless only the text itself is possible: a path named 3."""
    value = parse_scalar(text)
    only_text = key in keys() and not is_valid(key, value) and is_valid(key, text)
    return text if only_text else value
