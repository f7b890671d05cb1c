"""What devices found when they judged a version, as it is kept with its row. Types alone."""

from typing import Literal

import msgspec

from shared.statistics.vectors import Answer

Outcome = Literal["pass", "fail", "undecided"]


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What one gate says of one variant."""

    gate: str
    outcome: Outcome
    words: str  # what was found, and by how much it is too much


class Judged(msgspec.Struct, frozen=True, kw_only=True):
    """One variant, and what every gate says of it."""

    variant: str
    verdicts: tuple[Verdict, ...]

    @property
    def passed(self) -> bool:
        """Whether no gate held it back; one that could not decide did."""
        return not self.objection

    @property
    def objection(self) -> str:
        """Why it must not be served, by the first gate that says so; empty where it may."""
        return next((f"{v.gate}: {v.words}" for v in self.verdicts if v.outcome != "pass"), "")


class Judgement(msgspec.Struct, frozen=True, kw_only=True):
    """What came of judging one version."""

    run_id: str  # of the run that asked the devices
    reference: str  # what the variants are compared with, for people
    noise: Literal["distributed", "none"]
    devices: int  # whose scorecards are in the sum
    answers: tuple[Answer, ...]  # scores, summed
    variants: tuple[Judged, ...]
    ship: str  # the variant that is favoured; empty: none passed

    @property
    def objections(self) -> dict[str, str]:
        """Why each variant that was held back was."""
        return {judged.variant: judged.objection for judged in self.variants if judged.objection}
