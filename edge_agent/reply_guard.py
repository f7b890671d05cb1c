"""The last look at a reply before it leaves: nothing in it that was not declared.

What each record of a reply tells is written down once, in shared/disclosure.py. A test holds our
code to it; this holds every single reply to it, so that a field that somebody adds without saying
what it tells stays on the device, in a release as in a test.
"""

from collections.abc import Mapping

from shared.disclosure import PLAIN_REPLY, SUMMED_REPLY, Tells

Records = Mapping[str, Mapping[str, object]]  # a `RecordDict`, without Flower
_LANE_TYPES = {"uint16", "uint32", "uint64"}  # what is masked is an unsigned integer


class UndeclaredFieldError(Exception):
    """Our own bug: a reply holds what nobody has declared. Nothing of it may be sent."""


def check_reply(content: Records, *, is_summed: bool) -> None:
    """Raise UndeclaredFieldError unless all that ``content`` holds may leave this device.

    Args:
        content: of a reply that is about to be sent.
        is_summed: whether it is part of a secure sum; else of a plain round.
    """
    declared = SUMMED_REPLY if is_summed else PLAIN_REPLY
    for name, record in content.items():
        if name not in declared:
            _check_keys(name, record, declared)
        elif is_summed and not _is_masked(record):
            raise UndeclaredFieldError(f"the record {name!r} of a reply is no masked vector")


def _check_keys(name: str, record: Mapping[str, object], declared: Mapping[str, Tells]) -> None:
    for key in record:
        if f"{name}.{key}" not in declared:
            raise UndeclaredFieldError(f"the field '{name}.{key}' of a reply is not declared")
    if not record:  # its name alone says something
        raise UndeclaredFieldError(f"the record {name!r} of a reply is not declared")


def _is_masked(record: Mapping[str, object]) -> bool:
    return all(getattr(array, "dtype", "") in _LANE_TYPES for array in record.values())
