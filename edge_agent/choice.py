"""Which file of a version this device serves: the fastest that is right here, tried on the spot.

The coordinator measured on its own processor; here another one counts. So what fits this device is
downloaded, checked against the golden batch and timed side by side in a throwaway process. A choice
is remembered for the version, the runtime and the processor that it was made with.
"""

import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from edge_agent.inference.messages import SelfTestResult
from edge_agent.telemetry import read_accelerator
from shared.errors import UnfitModelError
from shared.files import write_atomic
from shared.manifest import Artifact, Manifest

_CHOICES = "choices.json"
_REMEMBERED = 8  # choices; a device goes back to few versions
_NO_WORSE = 1.05  # times the fastest: within that the smallest file is taken
_WORTH_TRYING = 1.25  # times the shipped file's size: larger ones cost more than they may gain
_CPUINFO = Path("/proc/cpuinfo")


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """What of this device decides about files."""

    features: frozenset[str]  # the words of `Artifact.needs` that hold here
    accelerator: bool
    runtime: str  # version of ONNX Runtime
    largest_bytes: int  # of a file in a slot

    @property
    def name(self) -> str:
        """What a remembered choice is valid for, beside the version."""
        return " ".join([self.runtime, *sorted(self.features), *["gpu"] * self.accelerator])


class _Choice(msgspec.Struct, frozen=True):
    version: str
    profile: str
    artifact: str  # digest of the file


def read_profile(*, largest_bytes: int, cpuinfo: Path = _CPUINFO) -> Profile:
    """Look at this device; what cannot be read counts as not there."""
    try:
        text = cpuinfo.read_text()
    except OSError:
        text = ""
    return Profile(
        features=cpu_features(text, platform.machine()),
        accelerator=bool(read_accelerator()),
        runtime=importlib.metadata.version("onnxruntime"),
        largest_bytes=largest_bytes,
    )


def cpu_features(cpuinfo: str, machine: str) -> frozenset[str]:
    """Return the words of `Artifact.needs` that a processor satisfies.

    Args:
        cpuinfo: text of /proc/cpuinfo.
        machine: as `platform.machine` names it.
    """
    lines = (line.partition(":") for line in cpuinfo.splitlines())
    flags = next((set(v.split()) for k, _, v in lines if k.strip() in {"flags", "Features"}), set())
    features = set()
    if flags & {"avx512_vnni", "avx_vnni"}:
        features.add("vnni")
    if machine in {"aarch64", "arm64"}:
        features.add("arm64")
    return frozenset(features)


def worth_trying(manifest: Manifest, profile: Profile) -> list[list[Artifact]]:
    """Return the files to try, in groups: a later group only if nothing of the earlier one passed.

    Raises:
        UnfitModelError: no file fits this device; says why for the shipped one.
    """
    fitting = [a for a in manifest.artifacts if not _misfit(a, profile)]
    if not fitting:
        raise UnfitModelError(
            f"no file of this version fits this device: {manifest.ship} "
            + _misfit(manifest.shipped, profile)
        )
    limit = _WORTH_TRYING * manifest.shipped.size_bytes
    first = [a for a in fitting if profile.accelerator or a.size_bytes <= limit]
    rest = [[a] for a in sorted(fitting, key=lambda a: a.size_bytes) if a not in first]
    return [first, *rest] if first else rest


def fastest(results: Mapping[str, SelfTestResult], artifacts: Sequence[Artifact]) -> Artifact:
    """Return the fastest file that passed; of those within 5 % of it the smallest.

    Args:
        results: of those that passed, by digest; not empty.
        artifacts: that were tried.
    """
    best = min(result.p50_ms for result in results.values())
    close = [
        a for a in artifacts if a.sha256 in results and results[a.sha256].p50_ms <= _NO_WORSE * best
    ]
    return min(close, key=lambda a: (a.size_bytes, results[a.sha256].p50_ms))


class Choices:
    """Choices that were made on this device."""

    def __init__(self, home: Path, profile: Profile) -> None:
        self.profile = profile
        self._path = home / "models" / _CHOICES

    def of(self, version: str, manifest: Manifest) -> Artifact | None:
        """Return what was chosen for ``version`` on a device just like this, if it still fits."""
        for choice in self._read():
            if (choice.version, choice.profile) == (version, self.profile.name):
                known = manifest.artifact(choice.artifact)
                return None if known is None or _misfit(known, self.profile) else known
        return None

    def remember(self, version: str, artifact: Artifact) -> None:
        """Keep a choice, and forget the oldest ones."""
        fresh = _Choice(version, self.profile.name, artifact.sha256)
        others = [c for c in self._read() if (c.version, c.profile) != (version, fresh.profile)]
        write_atomic(self._path, msgspec.json.encode([*others, fresh][-_REMEMBERED:]))

    def forget(self, version: str) -> None:
        """Choose anew the next time."""
        kept = [choice for choice in self._read() if choice.version != version]
        write_atomic(self._path, msgspec.json.encode(kept))

    def _read(self) -> list[_Choice]:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=list[_Choice])
        except (OSError, msgspec.DecodeError):  # nothing is lost but a second
            return []


def _misfit(artifact: Artifact, profile: Profile) -> str:
    """Return why a file cannot be served here; empty where it can."""
    if lacking := sorted(set(artifact.needs) - profile.features):
        return f"needs a processor with {', '.join(lacking)}"
    if artifact.size_bytes > profile.largest_bytes:
        return (
            f"takes {artifact.size_bytes:,} bytes and a slot holds {profile.largest_bytes:,}; "
            "raise SHOAL_AGENT_MODEL_SLOT_BYTES if the disk has room"
        )
    return ""
