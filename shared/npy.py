"""Vectors in numpy's file format, as Flower carries them, read without believing their header.

numpy's own reader evaluates the header as Python and allocates what it claims, which takes down
whoever reads a hostile one.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from shared.errors import PeerError

_BEFORE_HEADER = 10  # bytes of magic, version and length
_VECTOR_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00([\s\S]{2})"
    rb"\{'descr': '([ -&(-~]{1,16})', 'fortran_order': False, 'shape': \(([0-9, ]{0,64})\), \} *\n"
)


def read_vector(content: bytes, types: Mapping[str, Any], *, what: str) -> Any:
    """Return a vector, shape (d,), that shares its memory with ``content``.

    Args:
        content: in numpy's format 1.0.
        types: the types that are welcome, by their names in the format, such as ``<f4``.
        what: names the sender's document in a complaint, such as "the reply".

    Raises:
        PeerError: it is no vector of these types, or its header says something else.
    """
    header = _VECTOR_HEADER.match(content)
    if header is None or header.end() != _BEFORE_HEADER + int.from_bytes(header[1], "little"):
        raise PeerError(f"{what}'s vector is not in numpy's format 1.0")
    name, shape = header[2].decode("ascii"), header[3].decode("ascii")
    wanted = types.get(name)
    width = np.dtype(wanted).itemsize if wanted else 1
    size, rest = divmod(len(content) - header.end(), width)
    if wanted is None or shape != f"{size}," or rest:
        names = " or ".join(np.dtype(each).name for each in types.values())
        raise PeerError(f"{what} holds {name} of shape ({shape}) in place of a {names} vector")
    return np.frombuffer(content, dtype=wanted, offset=header.end(), count=size)
