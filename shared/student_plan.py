"""What a run says that trains a smaller network of its task, perhaps with a teacher."""

from typing import Annotated

import msgspec
from msgspec import Meta

from shared.manifest import Digest

SCORE = "score"  # the metric by which students are compared

NetworkName = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9-]{0,62}\Z")]
Temperature = Annotated[float, Meta(gt=0, le=100)]
Weight = Annotated[float, Meta(ge=0, le=1)]


class Distillation(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Whose answers a student learns beside the labels (Hinton et al. 2015)."""

    teacher: Digest  # `base_digest_of` its parameters, which come with the message
    parameters_sha256: Digest  # of the blob in which the coordinator keeps them
    temperature: Temperature
    weight: Weight  # of the teacher's word; the labels have the rest


class StudentPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which of the task's networks is trained in place of its own."""

    network: NetworkName  # as `Task.student` knows it
    distil: Distillation | None = None  # None: from the labels alone


def encode_student(student: StudentPlan | None) -> bytes:
    """Return the JSON that travels, and that a device's question digest is over."""
    return b"" if student is None else msgspec.json.encode(student)
