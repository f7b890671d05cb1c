"""Looks for numbers and words in bytes, however they may be wrapped and written."""

import base64
import re
import struct
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

_BASE64 = re.compile(rb"[A-Za-z0-9+/_-]{12,}={0,2}")
_HEX = re.compile(rb"(?<![0-9A-Za-z])(?:[0-9a-fA-F]{2}){8,}(?![0-9A-Za-z])")
_LENGTH_HEADER = re.compile(rb"content-length: \d+\r\n", re.IGNORECASE)
_DEEPEST = 5
_WINDOW = 16  # bytes of a vector that are no coincidence

Needles = Mapping[str, tuple[bytes, ...]]  # by what they are, every way to write it in bytes


class Heard:
    """Bytes that were overheard, and what each piece of base64 or hex in them says, and so on."""

    def __init__(self, streams: Iterable[bytes]) -> None:
        layers: dict[bytes, None] = {}  # each once
        for stream in streams:
            _unwrap(_LENGTH_HEADER.sub(b"", stream), _DEEPEST, layers)
        self._all = b"\n".join(layers)

    def __len__(self) -> int:
        return len(self._all)

    def found(self, needles: Needles) -> set[str]:
        """Return which needles are in there."""
        return {name for name, ways in needles.items() if any(self._holds(way) for way in ways)}

    def _holds(self, way: bytes) -> bool:
        if not way.replace(b".", b"", 1).isdigit():
            return way in self._all
        position = self._all.find(way)
        while position >= 0:  # as a whole number, and no part of a longer one or of base64
            before = self._all[max(0, position - 1) : position]
            after = self._all[position + len(way) :][:1]
            if before not in _WORD and after not in _WORD:
                return True
            position = self._all.find(way, position + 1)
        return False


def _unwrap(content: bytes, depth: int, layers: dict[bytes, None]) -> None:
    if content in layers:
        return
    layers[content] = None
    if depth == 0:
        return
    for match in _BASE64.finditer(content):
        text = match[0].rstrip(b"=").translate(bytes.maketrans(b"-_", b"+/"))
        text = text[: len(text) - (len(text) % 4 == 1)]
        _unwrap(base64.b64decode(text + b"=" * (-len(text) % 4)), depth - 1, layers)
    for match in _HEX.finditer(content):
        _unwrap(bytes.fromhex(match[0].decode()), depth - 1, layers)


_WORD = {
    bytes([byte]) for byte in b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
}
_WORD |= {b".", b"+", b"/", b"_", b"-", b"="}


def count(value: float) -> tuple[bytes, ...]:
    """Return a whole number as text, as doubles, and as 64 bit integers."""
    whole = int(value)
    texts = (str(whole).encode(), f"{whole}.0".encode())
    return (*texts, *_both(struct.pack("<d", whole)), *_both(struct.pack("<q", whole)))


def number(value: float) -> tuple[bytes, ...]:
    """Return a number with digits behind its point as text and as doubles."""
    single = repr(float(np.float32(value))).encode()
    return (repr(value).encode(), single, *_both(struct.pack("<d", value)))


def singles(values: Iterable[float]) -> tuple[bytes, ...]:
    """Return numbers that stand beside each other, as float32."""
    return tuple(np.array(list(values), kind).tobytes() for kind in ("<f4", ">f4", "<f8", ">f8"))


def vector(values: NDArray[Any]) -> tuple[bytes, ...]:
    """Return some places of a vector, each long enough to be no coincidence, in several types."""
    kinds = ("<f4", ">f4", "<f8", ">f8") if values.dtype.kind == "f" else (values.dtype.str,)
    written = [values.astype(kind).tobytes() for kind in kinds]
    return tuple(
        content[start : start + _WINDOW]
        for content in written
        for start in (0, len(content) // 2 // _WINDOW * _WINDOW, len(content) - _WINDOW)
        if start >= 0 and content[start : start + _WINDOW].strip(b"\0")
    )


def secret(value: bytes) -> tuple[bytes, ...]:
    """Return bytes as they would stand in a log."""
    return (value, value.hex().encode(), base64.b64encode(value).rstrip(b"="), repr(value).encode())


def _both(little: bytes) -> tuple[bytes, bytes]:
    return little, little[::-1]
