"""Shamir's secret sharing over GF(2^255 - 19): any ``threshold`` shares rebuild, fewer say nothing.

A secret is 31 bytes, so it lies below the prime with seven bits to spare, and a rebuilt value that
does not is proof of a bad share. Python's own integers are fast enough: places are small numbers,
so that polynomials are evaluated without reducing at every step. They do not run in constant time;
who could time a device that closely already runs on it.

Follows A. Shamir, "How to Share a Secret", Communications of the ACM 22(11), 1979.
"""

import math
from collections.abc import Callable, Sequence
from operator import mul
from typing import Self

from shared.errors import PeerError

PRIME = 2**255 - 19
SECRET_BYTES = 31
SHARE_BYTES = 32
_SECRETS = 2 ** (8 * SECRET_BYTES)  # this many secrets are possible
_LOW_255_BITS = 2**255 - 1


def deal(
    secret: bytes, *, threshold: int, places: Sequence[int], entropy: Callable[[int], bytes]
) -> dict[int, bytes]:
    """Split a secret of 31 bytes into one share of 32 bytes for each of ``places``.

    Args:
        secret: 31 bytes.
        threshold: shares that rebuild it, from 1 to the number of places.
        places: where the polynomial is evaluated: distinct, each at least 1.
        entropy: returns that many random bytes, as `os.urandom` does.

    Raises:
        ValueError: the secret is no 31 bytes, or threshold or places are not as said.
    """
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"a secret has {SECRET_BYTES} bytes, this one has {len(secret)}")
    _check_places(places)
    if not 1 <= threshold <= len(places):
        raise ValueError(f"a threshold of {threshold} does not fit {len(places)} places")
    coefficients = _field_elements(threshold - 1, entropy)  # highest power first
    constant = int.from_bytes(secret, "big")
    return {
        place: _evaluate(coefficients, constant, place).to_bytes(SHARE_BYTES, "big")
        for place in places
    }


class Interpolation:
    """Rebuilds secrets from shares at the same places; the coefficients are computed once."""

    def __init__(self, places: Sequence[int]) -> None:
        """Prepare for shares at ``places``; raise ValueError unless distinct and at least 1."""
        _check_places(places)
        self.places = tuple(places)
        self._coefficients = _lagrange_at_zero(self.places)

    def without(self, place: int) -> Self:
        """Return the interpolation at all these places but one, for far less than a new one.

        Raises:
            ValueError: ``place`` is none of these, or the only one.
        """
        if place not in self.places or len(self.places) == 1:
            raise ValueError(f"place {place} cannot be left out of {len(self.places)}")
        fewer = object.__new__(type(self))
        inverse = pow(place, -1, PRIME)
        pairs = zip(self.places, self._coefficients, strict=True)
        kept = [(x, coefficient) for x, coefficient in pairs if x != place]
        fewer.places = tuple(x for x, _ in kept)
        fewer._coefficients = [c * (place - x) * inverse % PRIME for x, c in kept]
        return fewer

    def rebuild(self, shares: Sequence[bytes]) -> bytes:
        """Return the secret, 31 bytes, from one share per place, in the order of the places.

        With fewer places than the threshold, or with bad shares, the result is either an error or
        some other secret; compare it with its dealer's commitment.

        Raises:
            PeerError: a share is no field element, or together they rebuild no possible secret.
            ValueError: not one share per place.
        """
        if len(shares) != len(self.places):
            raise ValueError(f"{len(shares)} shares for {len(self.places)} places")
        total: int = sum(map(mul, self._coefficients, map(_share_value, shares))) % PRIME
        if total >= _SECRETS:
            raise PeerError("the shares rebuild no possible secret: at least one of them is bad")
        return total.to_bytes(SECRET_BYTES, "big")


def _check_places(places: Sequence[int]) -> None:
    if not places or len(set(places)) != len(places) or min(places) < 1 or max(places) >= PRIME:
        raise ValueError("places must be distinct numbers from 1 on")


def _field_elements(count: int, entropy: Callable[[int], bytes]) -> list[int]:
    """Draw uniform elements: 255 random bits, again where they reach the prime (19 in 2^255)."""
    elements: list[int] = []
    while len(elements) < count:
        content = entropy(SHARE_BYTES * (count - len(elements)))
        drawn = (
            int.from_bytes(content[start : start + SHARE_BYTES], "big") & _LOW_255_BITS
            for start in range(0, len(content), SHARE_BYTES)
        )
        elements.extend(value for value in drawn if value < PRIME)
    return elements


def _evaluate(coefficients: Sequence[int], constant: int, place: int) -> int:
    value = 0
    for coefficient in coefficients:
        value = (value + coefficient) * place
    return (value + constant) % PRIME


def _lagrange_at_zero(places: tuple[int, ...]) -> list[int]:
    """Return for each place x_i the product of x_j / (x_j - x_i) over all others, modulo p.

    One inversion serves all denominators (Montgomery's trick).
    """
    numerator = math.prod(places) % PRIME
    denominators = [
        x * math.prod([other - x for other in places if other != x]) % PRIME for x in places
    ]
    before = [1]
    for denominator in denominators:
        before.append(before[-1] * denominator % PRIME)
    after = pow(before.pop(), -1, PRIME) * numerator % PRIME
    coefficients = []
    for denominator, product in zip(reversed(denominators), reversed(before), strict=True):
        coefficients.append(after * product % PRIME)
        after = after * denominator % PRIME
    return coefficients[::-1]


def _share_value(share: bytes) -> int:
    value = int.from_bytes(share, "big")
    if len(share) != SHARE_BYTES or value >= PRIME:
        raise PeerError("a share is no element of the field")
    return value
