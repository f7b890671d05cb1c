"""TOML that people write, turned into frozen structs, or into one sentence on what to mend."""

import difflib
import re
import tomllib
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec import inspect

from shared.errors import ConfigError

T = TypeVar("T")
_MISSING_FIELD = re.compile(r"Object missing required field `(?P<key>[^`]*)`")
_NO_CHOICE = re.compile(r"Invalid enum value (?P<value>.*)")
_UNKNOWN_FIELD = re.compile(r"Object contains unknown field `(?P<key>[^`]*)`")
_STEP = re.compile(r"\[[^]]*\]|[^.\[\]]+")


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
    text, _, place = message.partition(" - at `$")
    path = place.strip("`").removeprefix(".")
    where = f"in [{path}]" if path else "at the top"
    if match := _UNKNOWN_FIELD.fullmatch(text):
        known = _keys(_type_at(kind, path))
        guess = difflib.get_close_matches(match["key"], known, n=1)
        advice = f"did you mean {guess[0]!r}?" if guess else f"known here: {', '.join(known)}"
        return f"unknown key {match['key']!r} {where}; {advice}"
    if match := _MISSING_FIELD.fullmatch(text):
        return f"key {match['key']!r} is missing {where}; add it"
    if match := _NO_CHOICE.fullmatch(text):
        choices = ", ".join(map(repr, _choices(_type_at(kind, path))))
        return f"{path}: there is no {match['value']}; choose one of {choices}"
    return f"{path or 'the document'}: {text[:1].lower()}{text[1:]}; change it and try again"


def _type_at(kind: type, path: str) -> inspect.Type:
    """Return the type of what lies at ``path``, such as ``features[0].minimum``, below ``kind``."""
    found = _bare(inspect.type_info(kind))
    for step in _STEP.findall(path):
        match found:
            case inspect.StructType(fields=fields):
                found = next((f.type for f in fields if f.encode_name == step), inspect.AnyType())
            case inspect.VarTupleType(item_type=item) | inspect.ListType(item_type=item):
                found = item
            case _:
                return inspect.AnyType()
        found = _bare(found)
    return found


def _bare(found: inspect.Type) -> inspect.Type:
    """Take off limits, and the None of what may be left out."""
    match found:
        case inspect.Metadata(type=inner):
            return _bare(inner)
        case inspect.UnionType(types=types):
            (first, *_) = (t for t in types if not isinstance(t, inspect.NoneType))
            return _bare(first)
    return found


def _keys(found: inspect.Type) -> list[str]:
    match found:
        case inspect.StructType(fields=fields):
            return [field.encode_name for field in fields]
    return []


def _choices(found: inspect.Type) -> list[object]:
    match found:
        case inspect.LiteralType(values=values):
            return list(values)
        case inspect.EnumType(cls=enum):
            return [member.value for member in enum]
    return []
