import hashlib
import hmac
from collections.abc import Callable
from dataclasses import replace
from itertools import permutations

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import example, given
from hypothesis import strategies as st

from shared.errors import PeerError
from shared.secure_sum.config import MaskAlgorithm
from shared.secure_sum.keys import (
    Binding,
    MaskKey,
    SessionSecrets,
    agree,
    commit_seed,
    commit_share,
    mask_private_key,
    open_box,
    open_sealed_to,
    own_mask_key,
    pair_mask_key,
    seal_box,
    seal_to,
)

SECRET, SHARES = bytes(range(32)), bytes(range(64))
BINDING = Binding(
    config_digest=b"c" * 32,
    run_id="run-1",
    round_number=3,
    session=b"s" * 32,
    roster_digest=b"r" * 32,
)
OTHER_BINDINGS = [
    replace(BINDING, config_digest=b"C" * 32),
    replace(BINDING, run_id="run-2"),
    replace(BINDING, round_number=4),
    replace(BINDING, session=b"S" * 32),
    replace(BINDING, roster_digest=b"R" * 32),
]
ALGORITHMS: tuple[MaskAlgorithm, ...] = ("aes-128-ctr", "chacha20")
# Montgomery u-coordinates of small order (RFC 7748, section 6.1): every exchange with one is zero.
SMALL_ORDER = [
    bytes(32),
    (1).to_bytes(32, "little"),
    bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
    (2**255 - 20).to_bytes(32, "little"),
    (2**255 - 19).to_bytes(32, "little"),
]


def stream_of(seed: bytes) -> Callable[[int], bytes]:
    calls = iter(range(1000))
    return lambda size: hashlib.shake_256(seed + bytes([next(calls)])).digest(size)


def hkdf(secret: bytes, info: bytes, length: int) -> bytes:
    """Derive by RFC 5869 without a salt, written once more."""
    extracted = hmac.digest(bytes(32), secret, "sha256")
    content, block = b"", b""
    for counter in range(1, -(-length // 32) + 1):
        block = hmac.digest(extracted, block + info + bytes([counter]), "sha256")
        content += block
    return content[:length]


def info_of(tag: str, *parts: str | bytes) -> bytes:
    content = [tag, "run-1", 3, b"s" * 32, b"c" * 32, b"r" * 32, list(parts)]
    return b"shoal secure sum v1\0" + msgspec.msgpack.encode(content)


def test_a_pair_mask_is_the_hkdf_of_what_the_protocol_names() -> None:
    aes = pair_mask_key(SECRET, BINDING, "a", "b", "aes-128-ctr")
    chacha = pair_mask_key(SECRET, BINDING, "a", "b", "chacha20")

    assert aes.key + aes.iv == hkdf(SECRET, info_of("pair mask", "a", "b"), 32)
    expected = hkdf(SECRET, info_of("pair mask", "a", "b"), 48)
    assert chacha.key == expected[:32]
    assert chacha.iv == bytes(4) + expected[36:]


def test_an_own_mask_is_the_hkdf_of_what_the_protocol_names() -> None:
    mask = own_mask_key(SECRET[:31], BINDING, "a", "aes-128-ctr")
    assert mask.key + mask.iv == hkdf(SECRET[:31], info_of("own mask", "a"), 32)


def test_the_bytes_that_are_derived_never_change() -> None:
    mask = pair_mask_key(SECRET, BINDING, "a", "b", "aes-128-ctr")
    box = seal_box(SECRET, BINDING, sender="a", receiver="b", shares=SHARES)
    public = mask_private_key(SECRET[:31]).public_key().public_bytes_raw()
    assert [content.hex()[:32] for content in (mask.key + mask.iv, box, public)] == PINNED[:3]
    assert commit_seed(SECRET[:31], BINDING, "a").hex()[:32] == PINNED[3]
    share = commit_share("key", SECRET, BINDING, dealer="a", receiver="b")
    assert share.hex()[:32] == PINNED[4]


PINNED = [
    "b8491d34f575db197dfa145aea99c96e",
    "f1bb9bff0e2c30cdbb9a7dfd35f79cb2",
    "cdfa7623bcd70fb36c858f062b513c61",
    "e8695249e587aa60d0eb9f6879457fb9",
    "617c6ec05566969c3101c5761406a26f",
]


def test_both_ends_of_a_pair_derive_the_same() -> None:
    one, other = SessionSecrets.new(), SessionSecrets.new()
    here = agree(mask_private_key(bytes(one.key_seed)), other.mask_public)
    there = agree(mask_private_key(bytes(other.key_seed)), one.mask_public)
    assert here == there
    assert agree(one.box_private, other.box_public) == agree(other.box_private, one.box_public)


@pytest.mark.parametrize("public", SMALL_ORDER, ids=lambda public: public.hex()[:8])
def test_a_key_that_forces_a_known_result_is_refused(public: bytes) -> None:
    with pytest.raises(PeerError, match="unusable"):
        agree(X25519PrivateKey.generate(), public)
    with pytest.raises(PeerError, match="unusable"):
        seal_to(public, b"content", associated=b"")


@pytest.mark.parametrize("size", [0, 31, 33, 64])
def test_a_key_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(PeerError, match="unusable"):
        agree(X25519PrivateKey.generate(), bytes(size))


@pytest.mark.parametrize(("low", "high"), [("b", "a"), ("a", "a")])
def test_a_pair_stands_in_order(low: str, high: str) -> None:
    with pytest.raises(ValueError, match="in order"):
        pair_mask_key(SECRET, BINDING, low, high, "aes-128-ctr")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_no_key_and_initialisation_vector_ever_come_twice(algorithm: MaskAlgorithm) -> None:
    """One secret for all, which is worse than what ever happens: only what it is for differs."""
    devices = ["a", "b", "ab", "c", "bc", "abc"]
    seen: list[bytes] = []
    for binding in [BINDING, *OTHER_BINDINGS]:
        masks = [own_mask_key(SECRET, binding, device, algorithm) for device in devices]
        for one, other in permutations(devices, 2):
            # What GCM makes of zeros tells one pair of key and nonce from another.
            seen.append(
                seal_box(SECRET, binding, sender=one, receiver=other, shares=bytes(64))[:28]
            )
            if one < other:
                masks.append(pair_mask_key(SECRET, binding, one, other, algorithm))
        seen += [mask.key + mask.iv for mask in masks]
        # Not even half of it: neither a key with another vector, nor a vector with another key.
        seen += [half for mask in masks for half in (mask.key, mask.iv)]
    assert len(seen) == 6 * (30 + 3 * (6 + 15))
    assert len(set(seen)) == len(seen)


def test_a_box_is_never_sealed_by_the_key_of_a_mask() -> None:
    box = seal_box(SECRET, BINDING, sender="a", receiver="b", shares=bytes(64))
    key = hkdf(SECRET, info_of("box", "a", "b"), 28)
    assert AESGCM(key[:16]).decrypt(key[16:], box, None) == bytes(64)
    masks = [
        pair_mask_key(SECRET, BINDING, "a", "b", "aes-128-ctr"),
        own_mask_key(SECRET, BINDING, "a", "aes-128-ctr"),
    ]
    assert key[:16] not in {mask.key for mask in masks}


def test_a_box_opens_for_its_receiver_only() -> None:
    box = seal_box(SECRET, BINDING, sender="a", receiver="b", shares=SHARES)
    assert len(box) == 80
    assert open_box(SECRET, BINDING, sender="a", receiver="b", box=box) == SHARES
    wrong = [
        (SECRET[::-1], BINDING, "a", "b"),
        (SECRET, BINDING, "b", "a"),
        (SECRET, BINDING, "a", "c"),
        (SECRET, BINDING, "c", "b"),
        *((SECRET, binding, "a", "b") for binding in OTHER_BINDINGS),
    ]
    for secret, binding, sender, receiver in wrong:
        with pytest.raises(PeerError, match=f"the box from {sender} was not sealed"):
            open_box(secret, binding, sender=sender, receiver=receiver, box=box)


@given(bit=st.integers(0, 80 * 8 - 1))
def test_a_box_with_any_bit_changed_does_not_open(bit: int) -> None:
    box = bytearray(seal_box(SECRET, BINDING, sender="a", receiver="b", shares=SHARES))
    box[bit // 8] ^= 1 << bit % 8
    with pytest.raises(PeerError):
        open_box(SECRET, BINDING, sender="a", receiver="b", box=bytes(box))


@pytest.mark.parametrize("size", [0, 1, 15, 16, 79, 81])
def test_a_box_of_another_size_does_not_open(size: int) -> None:
    box = (seal_box(SECRET, BINDING, sender="a", receiver="b", shares=SHARES) + b"\0")[:size]
    with pytest.raises(PeerError):
        open_box(SECRET, BINDING, sender="a", receiver="b", box=box)


@pytest.mark.parametrize("size", [0, 63, 65])
def test_a_box_holds_two_shares(size: int) -> None:
    with pytest.raises(ValueError, match="a box holds 64 bytes"):
        seal_box(SECRET, BINDING, sender="a", receiver="b", shares=bytes(size))


@given(content=st.binary(max_size=100), associated=st.binary(max_size=20))
def test_what_is_sealed_to_a_key_opens_with_it(content: bytes, associated: bytes) -> None:
    key = X25519PrivateKey.generate()
    sealed = seal_to(key.public_key().public_bytes_raw(), content, associated=associated)
    assert len(sealed) == len(content) + 48
    assert open_sealed_to(key, sealed, associated=associated) == content


@given(bit=st.integers(0, 59 * 8 - 1))
@example(bit=255)  # which X25519 ignores, but HPKE does not
def test_what_is_sealed_to_a_key_does_not_open_with_any_bit_changed(bit: int) -> None:
    key = X25519PrivateKey.from_private_bytes(SECRET)
    sealed = bytearray(seal_to(key.public_key().public_bytes_raw(), b"eleven byte", associated=b""))
    sealed[bit // 8] ^= 1 << bit % 8
    with pytest.raises(PeerError, match="cannot be opened"):
        open_sealed_to(key, bytes(sealed), associated=b"")


def test_what_is_sealed_opens_with_nothing_else() -> None:
    key, stranger = X25519PrivateKey.generate(), X25519PrivateKey.generate()
    sealed = seal_to(key.public_key().public_bytes_raw(), b"content", associated=b"this")
    for private, content, associated in (
        (stranger, sealed, b"this"),
        (key, sealed, b"that"),
        (key, sealed[:-1], b"this"),
        (key, sealed + b"\0", b"this"),
        (key, sealed[:31], b"this"),
        (key, b"", b"this"),
        (key, bytes(len(sealed)), b"this"),
    ):
        with pytest.raises(PeerError, match="cannot be opened"):
            open_sealed_to(private, content, associated=associated)


def test_commitments_differ_wherever_anything_differs() -> None:
    seen = [
        commitment
        for binding in [BINDING, *OTHER_BINDINGS]
        for commitment in (
            commit_seed(SECRET, binding, "a"),
            commit_seed(SECRET, binding, "b"),
            commit_seed(SECRET[:31], binding, "a"),
            commit_share("seed", SECRET, binding, dealer="a", receiver="b"),
            commit_share("key", SECRET, binding, dealer="a", receiver="b"),
            commit_share("key", SECRET, binding, dealer="b", receiver="a"),
            commit_share("key", SECRET[::-1], binding, dealer="a", receiver="b"),
            commit_share("key", SECRET, binding, dealer="ab", receiver=""),
            commit_share("key", SECRET, binding, dealer="", receiver="ab"),
        )
    ]
    assert len(set(seen)) == len(seen) == 6 * 9
    assert all(len(commitment) == 32 for commitment in seen)


def test_fresh_secrets_are_new_each_time_and_repeat_with_the_same_entropy() -> None:
    one, other = SessionSecrets.new(), SessionSecrets.new()
    parts = [
        part
        for secrets in (one, other)
        for part in (
            bytes(secrets.mask_seed),
            bytes(secrets.key_seed),
            secrets.box_public,
            secrets.mask_public,
        )
    ]
    assert len(set(parts)) == 8
    assert [len(part) for part in parts[:4]] == [31, 31, 32, 32]
    again = [SessionSecrets.new(stream_of(b"seed")) for _ in range(2)]
    assert again[0].mask_seed == again[1].mask_seed
    assert again[0].box_public == again[1].box_public


def test_wiping_overwrites_the_seeds_and_lets_go_of_the_key() -> None:
    secrets = SessionSecrets.new()
    mask_seed, key_seed = secrets.mask_seed, secrets.key_seed
    assert any(mask_seed)
    assert any(key_seed)

    secrets.wipe()
    secrets.wipe()  # twice does no harm

    assert mask_seed == key_seed == bytes(31)
    assert secrets.mask_seed is mask_seed
    assert not hasattr(secrets, "box_private")


def test_no_secret_is_shown() -> None:
    secrets = SessionSecrets.new(stream_of(b"shown"))
    mask = own_mask_key(bytes(secrets.mask_seed), BINDING, "a", "aes-128-ctr")
    hidden = [bytes(secrets.mask_seed), bytes(secrets.key_seed), mask.key, mask.iv]
    shown = repr(secrets) + str(secrets) + repr(mask) + str(mask) + f"{[mask]} {(secrets,)}"
    for secret in hidden:
        assert secret.hex()[:12] not in shown
        assert repr(secret)[2:14] not in shown
    assert repr(mask) == "MaskKey()"
    with pytest.raises(PeerError) as refused:
        open_box(SECRET, BINDING, sender="a", receiver="b", box=SHARES)
    assert SECRET.hex()[:8] not in str(refused.value)


def test_a_mask_key_is_a_value() -> None:
    assert own_mask_key(SECRET, BINDING, "a", "chacha20") == own_mask_key(
        SECRET, BINDING, "a", "chacha20"
    )
    assert MaskKey(b"1", b"2") != MaskKey(b"1", b"3")
