"""TOML that people write, turned into frozen structs, or into one sentence on what to mend."""

import difflib
import re
import tomllib
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from shared.errors import ConfigError

T = TypeVar("T")
_UNKNOWN_FIELD = re.compile(r"unknown field `(?P<key>[^`]*)`(?: - at `(?P<path>[^`]*)`)?")


def read_toml(path: Path, kind: type[T]) -> T:
    """Read a TOML file into ``kind``, a struct that forbids unknown fields.

    Raises:
        ConfigError: unreadable, not TOML, or it does not fit ``kind``; names the key.
    """
    return convert(read_document(path), kind, source=str(path))


def read_document(path: Path) -> dict[str, Any]:
    """Read a TOML file as it is; raise ConfigError where it is unreadable or not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; check the path") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}; mend that line") from error


def convert(document: Any, kind: type[T], *, source: str) -> T:
    """Turn a plain document into ``kind``; raise ConfigError with the key that does not fit."""
    try:
        return msgspec.convert(document, kind)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{source}: {_explain(str(error), kind)}") from error


def _explain(message: str, kind: type) -> str:
    """Say msgspec's complaint in TOML's words, with a guess at what was meant."""
    if match := _UNKNOWN_FIELD.search(message):
        path = (match["path"] or "$").removeprefix("$").removeprefix(".")
        known = _fields_at(kind, path.split(".") if path else [])
        where = f"in [{path}]" if path else "at the top"
        guess = difflib.get_close_matches(match["key"], known, n=1)
        advice = f"did you mean {guess[0]!r}?" if guess else f"known here: {', '.join(known)}"
        return f"unknown key {match['key']!r} {where}; {advice}"
    text, _, path = message.partition(" - at `$")
    key = path.strip("`.") or "the document"
    return f"{key}: {text[:1].lower()}{text[1:]}; change it and try again"


def _fields_at(kind: Any, path: list[str]) -> list[str]:
    """Return the field names of the struct that lies at ``path`` below ``kind``."""
    for name in path:
        field = next((f for f in msgspec.structs.fields(kind) if f.encode_name == name), None)
        if field is None or not isinstance(field.type, type):
            return []
        kind = field.type
    return [field.encode_name for field in msgspec.structs.fields(kind)]
