"""No field leaves a device without somebody having said what it tells."""

import msgspec
import pytest
from msgspec import inspect

from shared.disclosure import PLAIN_REPLY, SUMMED_REPLY, UPLINK, Tells
from shared.enrolment import EnrolmentRequest
from shared.messages import UP, Envelope
from shared.secure_sum.messages import (
    Advertised,
    Masked,
    Shared,
    SignedAnswer,
    Survivors,
)

STAGE_BODIES = (Advertised, Shared, Masked, Survivors)  # inside `SignedAnswer.body`
ENTRANCES = (*UP, Envelope, EnrolmentRequest, SignedAnswer, *STAGE_BODIES)


def structs_below(kind: type) -> set[type[msgspec.Struct]]:
    """Return the struct types that values of ``kind``, or of its fields, may be of."""
    found: set[type[msgspec.Struct]] = set()

    def visit(node: inspect.Type) -> None:
        match node:
            case inspect.StructType(cls=cls, fields=fields) if cls not in found:
                found.add(cls)
                for field in fields:
                    visit(field.type)
            case inspect.UnionType(types=types):
                for one in types:
                    visit(one)
            case inspect.VarTupleType(item_type=item) | inspect.ListType(item_type=item):
                visit(item)
            case inspect.Metadata(type=inner):
                visit(inner)

    visit(inspect.type_info(kind))
    return found


@pytest.mark.parametrize("kind", ENTRANCES, ids=lambda kind: kind.__name__)
def test_every_field_that_a_device_sends_is_declared(kind: type) -> None:
    sent = structs_below(kind) if kind is not Envelope else {Envelope}
    undeclared = [
        f"{struct.__name__}.{field}"
        for struct in sent
        for field in struct.__struct_fields__
        if field not in UPLINK.get(struct, {})
    ]
    assert not undeclared


@pytest.mark.parametrize("kind", UPLINK, ids=lambda kind: kind.__name__)
def test_nothing_is_declared_that_is_not_sent(kind: type[msgspec.Struct]) -> None:
    assert set(UPLINK[kind]) == set(kind.__struct_fields__)


def test_data_travel_in_no_message_but_in_lanes_and_in_what_an_owner_allowed() -> None:
    of_messages = {tells for fields in UPLINK.values() for tells in fields.values()}
    assert of_messages == {Tells.MACHINE}
    data = {name for name, tells in SUMMED_REPLY.items() if tells is Tells.DATA}
    assert data == {"lanes", "exact"}
    assert set(PLAIN_REPLY.values()) == {Tells.DATA}


def test_an_undeclared_field_is_found() -> None:
    class Curious(msgspec.Struct):
        label_counts: list[int]

    class Outer(msgspec.Struct):
        inner: tuple[Curious, ...] | None

    assert structs_below(Outer) == {Outer, Curious}
