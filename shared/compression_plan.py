"""What a plan says about making its result smaller."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from shared.student_plan import NetworkName, Temperature, Weight


class DistilPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The table ``[compression.distil]``: devices train a student, with a teacher and without."""

    student: NetworkName  # of the task's networks
    rounds: Annotated[int, Meta(ge=1, le=1_000_000)] = 10  # of either
    temperature: Temperature = 4.0
    weight: Weight = 0.8  # of the teacher's word, beside the labels


class CompressionPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The table ``[compression]`` of a plan."""

    int8: bool = True  # static int8, with ranges that devices measure; else from weights alone
    # "distributed": means of ranges under noise; "none": their quantiles, where owners allow it.
    calibration_noise: Literal["distributed", "none"] = "distributed"
    # A device with more rows measures so many of them.
    calibration_max_rows: Annotated[int, Meta(ge=1, le=100_000)] = 500
    distil: DistilPlan | None = None  # a smaller network learns from the trained one; None: none
