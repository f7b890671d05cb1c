"""Keys of one secure sum: agreed by X25519, derived by HKDF-SHA256, bound to what they are for.

Every key is derived under its own tag and the whole `Binding`, so that no key, and with it no pair
of key and initialisation vector, ever serves two purposes, pairs, directions, rounds or sessions.
All of it is built from `cryptography`; nothing here is clever.
"""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Self

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from shared.errors import PeerError
from shared.secure_sum.config import MaskAlgorithm

SEED_BYTES = 31  # below the prime of shamir.py, with seven bits to spare
IV_BYTES = 16
BOX_CONTENT_BYTES = 64  # two shares
_GCM_KEY_BYTES, _GCM_NONCE_BYTES = 16, 12
_MASK_KEY_BYTES: dict[MaskAlgorithm, int] = {"aes-128-ctr": 16, "chacha20": 32}
_DOMAIN = b"shoal secure sum v1\0"
_SEALING = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_128_GCM)  # HPKE, RFC 9180, base mode


class SessionSecrets:
    """What one device keeps to itself in one session; in memory only, and overwritten at its end.

    Attributes:
        mask_seed: 31 bytes, b: of the device's own mask.
        key_seed: 31 bytes, of which `mask_private_key` makes the key that pair masks come from.
        box_private: the key that boxes are agreed with; a peer never gets shares of this one.
        box_public: 32 bytes.
        mask_public: 32 bytes.
    """

    def __init__(self, mask_seed: bytes, key_seed: bytes, box_private: X25519PrivateKey) -> None:
        self.mask_seed, self.key_seed = bytearray(mask_seed), bytearray(key_seed)
        self.box_private = box_private
        self.box_public = box_private.public_key().public_bytes_raw()
        self.mask_public = mask_private_key(key_seed).public_key().public_bytes_raw()

    @classmethod
    def new(cls, entropy: Callable[[int], bytes] = os.urandom) -> Self:
        """Draw fresh secrets; a session never uses those of another."""
        box_private = X25519PrivateKey.from_private_bytes(entropy(32))
        return cls(entropy(SEED_BYTES), entropy(SEED_BYTES), box_private)

    def wipe(self) -> None:
        """Overwrite the seeds and let go of the private key, which its library then overwrites."""
        self.mask_seed[:] = bytes(len(self.mask_seed))
        self.key_seed[:] = bytes(len(self.key_seed))
        self.__dict__.pop("box_private", None)

    def __repr__(self) -> str:
        return f"SessionSecrets(box_public={self.box_public.hex()[:12]}…)"


@dataclass(frozen=True, slots=True)
class Binding:
    """The one session that a key belongs to; part of every derivation."""

    config_digest: bytes
    run_id: str
    round_number: int
    session: bytes
    roster_digest: bytes


@dataclass(frozen=True, slots=True)
class MaskKey:
    """What one mask is expanded from."""

    key: bytes = field(repr=False)  # 16 bytes for AES-128, 32 for ChaCha20
    iv: bytes = field(repr=False)  # 16 bytes; of ChaCha20 the first four, a counter, are zero


def mask_private_key(key_seed: bytes) -> X25519PrivateKey:
    """Make the mask key of its seed: whoever rebuilt the seed can check it by the public half."""
    if len(key_seed) != SEED_BYTES:
        raise ValueError(f"a key seed has {SEED_BYTES} bytes")
    return X25519PrivateKey.from_private_bytes(_hkdf(key_seed, _DOMAIN + b"mask private key", 32))


def agree(private: X25519PrivateKey, peer_public: bytes) -> bytes:
    """Return the 32 bytes that both ends of a pair compute.

    Raises:
        PeerError: the peer's key is no 32 bytes, or forces a result that everybody knows.
    """
    try:
        return private.exchange(X25519PublicKey.from_public_bytes(peer_public))
    except ValueError as error:  # a wrong length, or the all-zero result of a small-order point
        raise PeerError("a peer's X25519 key is unusable") from error


def pair_mask_key(
    secret: bytes, binding: Binding, low: str, high: str, algorithm: MaskAlgorithm
) -> MaskKey:
    """Derive the mask that two devices share; ``low`` < ``high``, so both ends derive the same."""
    if low >= high:
        raise ValueError("the ids of a pair stand in order, and are two")
    return _mask_key(secret, _info(binding, "pair mask", low, high), algorithm)


def own_mask_key(
    mask_seed: bytes, binding: Binding, device_id: str, algorithm: MaskAlgorithm
) -> MaskKey:
    """Derive the mask that hides a vector from those who know all of its pair masks."""
    return _mask_key(mask_seed, _info(binding, "own mask", device_id), algorithm)


def seal_box(
    secret: bytes, binding: Binding, *, sender: str, receiver: str, shares: bytes
) -> bytes:
    """Encrypt the two shares of one dealer for one peer: 64 bytes become 80.

    The key is of this ordered pair and seals this one message, so its nonce may be derived too.
    """
    if len(shares) != BOX_CONTENT_BYTES:
        raise ValueError(f"a box holds {BOX_CONTENT_BYTES} bytes")
    cipher, nonce = _box_cipher(secret, binding, sender, receiver)
    return cipher.encrypt(nonce, shares, None)


def open_box(secret: bytes, binding: Binding, *, sender: str, receiver: str, box: bytes) -> bytes:
    """Return the 64 bytes that ``sender`` sealed; raise PeerError where nobody did."""
    cipher, nonce = _box_cipher(secret, binding, sender, receiver)
    try:
        content = cipher.decrypt(nonce, box, None)
    except InvalidTag as error:
        raise PeerError(f"the box from {sender} was not sealed for {receiver} here") from error
    if len(content) != BOX_CONTENT_BYTES:
        raise PeerError(f"the box from {sender} does not hold two shares")
    return content


def commit_seed(mask_seed: bytes, binding: Binding, device_id: str) -> bytes:
    """Return the 32 bytes by which everybody can check a rebuilt mask seed."""
    return hashlib.sha256(_info(binding, "seed commitment", device_id, mask_seed)).digest()


def commit_share(
    kind: Literal["seed", "key"], share: bytes, binding: Binding, *, dealer: str, receiver: str
) -> bytes:
    """Return the 32 bytes by which a bad share is told from a good one, and its dealer named."""
    return hashlib.sha256(
        _info(binding, f"{kind} share commitment", dealer, receiver, share)
    ).digest()


def seal_to(public: bytes, content: bytes, *, associated: bytes) -> bytes:
    """Encrypt ``content`` so that only the holder of ``public``'s private half reads it (HPKE).

    Args:
        public: X25519, 32 bytes.
        content: grows by 48 bytes: an ephemeral key, and a tag.
        associated: what both ends know and the content belongs to; not sent.

    Raises:
        PeerError: ``public`` is unusable.
    """
    try:
        key = X25519PublicKey.from_public_bytes(public)
        return _SEALING.encrypt(content, key, _DOMAIN + associated)
    except ValueError as error:
        raise PeerError("the X25519 key to seal to is unusable") from error


def open_sealed_to(private: X25519PrivateKey, sealed: bytes, *, associated: bytes) -> bytes:
    """Return what was sealed to this key; raise PeerError where it was altered or never was."""
    try:
        return _SEALING.decrypt(sealed, private, _DOMAIN + associated)
    except (InvalidTag, ValueError) as error:
        raise PeerError("what was sealed to this session's key cannot be opened") from error


def _info(binding: Binding, tag: str, *parts: str | bytes) -> bytes:
    """Name one use of one key; MessagePack keeps the parts apart."""
    return _DOMAIN + msgspec.msgpack.encode(
        (
            tag,
            binding.run_id,
            binding.round_number,
            binding.session,
            binding.config_digest,
            binding.roster_digest,
            parts,
        )
    )


def _hkdf(secret: bytes, info: bytes, length: int) -> bytes:
    return HKDF(hashes.SHA256(), length, salt=None, info=info).derive(secret)


def _mask_key(secret: bytes, info: bytes, algorithm: MaskAlgorithm) -> MaskKey:
    key_bytes = _MASK_KEY_BYTES[algorithm]
    content = _hkdf(secret, info, key_bytes + IV_BYTES)
    key, iv = content[:key_bytes], content[key_bytes:]
    if algorithm == "chacha20":
        iv = bytes(4) + iv[4:]  # its block counter stands first and begins at zero
    return MaskKey(key, iv)


def _box_cipher(
    secret: bytes, binding: Binding, sender: str, receiver: str
) -> tuple[AESGCM, bytes]:
    info = _info(binding, "box", sender, receiver)
    content = _hkdf(secret, info, _GCM_KEY_BYTES + _GCM_NONCE_BYTES)
    return AESGCM(content[:_GCM_KEY_BYTES]), content[_GCM_KEY_BYTES:]
