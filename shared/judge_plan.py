"""What a plan says about judging its result on devices, before anybody serves it."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from shared.judging import MAX_CANDIDATES

Share = Annotated[float, Meta(ge=0, le=1)]
_EXACT_BINS, _NOISED_BINS = 100, 10  # noise adds up over the bins below a quantile
_NOISED_REACH = 0.1  # a device's gain is clipped to this, which noise hides ten times better


class JudgePlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The table ``[judge]`` of a plan. Every limit is against the version that is current."""

    noise: Literal["distributed", "none"] = "distributed"  # "none": where owners allow exact sums
    max_rows: Annotated[int, Meta(ge=1, le=1_000_000)] = 500  # a device judges on so many at most
    min_devices: Annotated[int, Meta(ge=0, le=1_000_000)] = 0  # 0: as many as a sum must be of
    # Files at most: fp32 and the smallest ones. Under noise each one more costs precision.
    candidates: Annotated[int, Meta(ge=1, le=MAX_CANDIDATES - 1)] = 8
    max_loss: Share = 0.005  # of the mean score
    max_worst_decile_loss: Share = 0.02  # of the score that a tenth of the devices is below
    max_label_loss: Share = 0.05  # of the share of right answers of any one class; exact sums only
    max_latency_ratio: Annotated[float, Meta(ge=0.01, le=1000)] = 1.5  # p95, on the same device
    max_failed: Share = 0.1  # of the devices may be unable to run a file
    max_bytes: Annotated[int, Meta(ge=1)] | None = None  # of a file
    max_memory_bytes: Annotated[int, Meta(ge=1)] | None = None  # that it takes, on any device

    @property
    def is_exact(self) -> bool:
        """Whether sums come without noise."""
        return self.noise == "none"

    @property
    def bins(self) -> int:
        """Bins of the histogram of scores."""
        return _EXACT_BINS if self.is_exact else _NOISED_BINS

    @property
    def reach(self) -> float:
        """Largest gain or loss of one device that counts."""
        return 1.0 if self.is_exact else _NOISED_REACH
