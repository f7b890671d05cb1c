"""JSON that is made to break whoever reads it: refused in one sentence wherever strangers write."""

import time
from base64 import b64encode

import msgspec
import pytest

from edge_agent.enrolment import open_reply
from edge_agent.inference import protocol
from edge_agent.inference.protocol import RequestError
from shared.enrolment import DeviceId
from shared.errors import PeerError, UntrustedModelError
from shared.manifest import MAX_MANIFEST_BYTES, Digest
from shared.messages import PAYLOAD_TYPE, decode, utc_now
from shared.signed_manifest import PAYLOAD_TYPE as MANIFEST_TYPE
from shared.signed_manifest import open_manifest
from shared.signing import SigningKey, seal

KEY = SigningKey.generate()
TRUSTED = {KEY.public.key_id: KEY.public}
DEEP = b'{"nobody": ' + b"[" * 20_000 + b"]" * 20_000 + b"}"
HOSTILE = pytest.mark.parametrize(
    "document",
    [DEEP, b'{"payloadType": "\xff"}', b'{"v": 1, "id": "\xff"}', b"[" * 30_000, b"\x00"],
    ids=["deep", "no utf-8", "no utf-8 inside", "deep and open", "nul"],
)


@HOSTILE
def test_a_control_message_of_a_stranger_is_refused(document: bytes) -> None:
    with pytest.raises(PeerError):
        decode(document, device="edge-1", trusted=TRUSTED, now=utc_now())


@HOSTILE
def test_a_control_message_of_a_device_that_went_bad_is_refused(document: bytes) -> None:
    sealed = seal(document, payload_type=PAYLOAD_TYPE, key=KEY)
    with pytest.raises(PeerError, match="breaks the schema"):
        decode(sealed, device="edge-1", trusted=TRUSTED, now=utc_now())


@HOSTILE
def test_a_manifest_of_a_stranger_is_refused(document: bytes) -> None:
    with pytest.raises(UntrustedModelError, match="cannot be trusted"):
        open_manifest(document, trusted=TRUSTED)


@HOSTILE
def test_a_signed_manifest_is_refused_as_well(document: bytes) -> None:
    sealed = seal(document, payload_type=MANIFEST_TYPE, key=KEY)
    assert len(sealed) < MAX_MANIFEST_BYTES
    with pytest.raises(UntrustedModelError, match="cannot be trusted"):
        open_manifest(sealed, trusted=TRUSTED)


@HOSTILE
def test_an_enrolment_reply_of_a_stranger_is_refused(document: bytes) -> None:
    inside = msgspec.json.encode({"payload": b64encode(document).decode()})
    for sealed in (document, inside):
        with pytest.raises(PeerError, match="no enrolment reply"):
            open_reply(sealed, KEY.public.key_id)


@pytest.mark.parametrize("ending", ["\n", "\x00", "/", " "])
def test_names_end_where_they_seem_to_end(ending: str) -> None:
    """A pattern's ``$`` would let a newline pass, into topics, paths and logs."""
    for kind, text in ((DeviceId, "edge-1"), (Digest, "0" * 64)):
        assert msgspec.convert(text, kind) == text
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert(text + ending, kind)


def infer(shape: list[int], data: str | None) -> None:
    given = '"parameters": {"binary_data_size": 0}' if data is None else f'"data": {data}'
    tensor = f'{{"name": "x", "datatype": "FP32", "shape": {shape}, {given}}}'
    protocol.parse(f'{{"inputs": [{tensor}]}}'.encode(), None)


@pytest.mark.parametrize("data", ["[]", None])
@pytest.mark.parametrize(
    "shape",
    [[0, 2**62, 2**62], [0, 2**63], [1] * 65, [-1], [0, -1], [2**64], [0] + [2**31] * 3],
    ids=lambda shape: str(shape)[:20],
)
def test_shapes_that_no_array_can_have_are_the_clients_mistake(
    shape: list[int], data: str | None
) -> None:
    with pytest.raises(RequestError):
        infer(shape, data)


@pytest.mark.parametrize("shape", [[0, 2**31 - 1, 2**31 - 1, 2**31 - 1], [2**31 - 1] * 16])
@pytest.mark.parametrize("data", ["[]", None])
def test_the_largest_shapes_that_are_read_are_refused_too(
    shape: list[int], data: str | None
) -> None:
    with pytest.raises(RequestError):
        infer(shape, data)


def test_a_shape_of_a_hundred_thousand_dimensions_costs_no_time() -> None:
    """The product of so many large numbers took half a minute, and nobody else was answered."""
    started = time.process_time()
    with pytest.raises(RequestError):
        infer([2**31 - 1] * 100_000, "[]")
    assert time.process_time() - started < 1.0


def test_json_that_takes_many_times_its_size_in_memory_is_refused_unread() -> None:
    body = b'{"inputs": [' + b"[]," * (protocol.MAX_JSON_BYTES // 3) + b"[]]}"
    started = time.process_time()
    with pytest.raises(RequestError, match="send fewer rows at a time, or the tensors in binary"):
        protocol.parse(body, None)
    with pytest.raises(RequestError, match="over the limit"):
        protocol.parse(body, str(len(body)))
    assert time.process_time() - started < 0.5
