"""What fits in a batch, and what no batch is."""

from collections.abc import Mapping

import pytest

from shared.framing import MAX_BATCH_BYTES, MAX_MESSAGE_BYTES, Frames, small_contents


class Item:
    def __init__(self, size: int) -> None:
        self.size = size
        self.deflated = 0

    def deflate(self) -> bytes:
        self.deflated += 1
        return b"x" * self.size


def parsed(body: bytes) -> list[bytes]:
    frames = Frames()
    frames.ParseFromString(body)
    return frames.parts


@pytest.mark.parametrize("parts", [[b""], [b"one"], [b"", b"x" * 300, b"three" * 20]])
def test_parts_come_back_as_they_were(parts: list[bytes]) -> None:
    assert parsed(Frames(parts).SerializeToString()) == parts


@pytest.mark.parametrize(
    "body", [b"", b"\0\0\0", b"\0\0\0\5four", b"\xff\xff\xff\xffx", b"\0\0\0\0" * 99]
)
def test_a_body_that_lies_is_refused(body: bytes) -> None:
    with pytest.raises(ValueError, match="batch"):
        parsed(body)


def test_small_messages_are_taken_whole_and_of_large_ones_what_is_small() -> None:
    small, large = {"a": Item(10), "b": Item(20)}, {"d": Item(MAX_MESSAGE_BYTES), "c": Item(10)}
    assert set(small_contents([small, large])) == {"a", "b", "c"}


def test_of_a_message_with_many_objects_no_more_is_taken_than_of_a_small_one() -> None:
    size = MAX_MESSAGE_BYTES // 3
    chosen = small_contents([{str(n): Item(size) for n in range(9)}])
    assert set(chosen) == {"0", "1"}


def test_a_shared_object_is_deflated_once_and_counts_once() -> None:
    shared, large = Item(MAX_MESSAGE_BYTES // 2), Item(MAX_MESSAGE_BYTES)
    messages: list[Mapping[str, Item]] = [{"s": shared, str(n): Item(1)} for n in range(100)]
    messages += [{"l": large, f"l{n}": Item(1)} for n in range(100)]

    assert len(small_contents(messages)) == 201
    assert (shared.deflated, large.deflated) == (1, 1)


def test_a_batch_has_an_end() -> None:
    size = MAX_MESSAGE_BYTES // 2
    chosen = small_contents([{str(n): Item(size)} for n in range(1000)])
    assert MAX_BATCH_BYTES - 2 * size < sum(map(len, chosen.values())) <= MAX_BATCH_BYTES
