"""Which files of a version a device tries, and which one it takes."""

from pathlib import Path
from typing import Any

import pytest

from edge_agent.choice import (
    Choices,
    Profile,
    cpu_features,
    fastest,
    read_profile,
    worth_trying,
)
from edge_agent.inference.messages import SelfTestResult
from shared.errors import UnfitModelError
from shared.manifest import Artifact, Manifest
from tests.integration.inference.tiny_models import linear

SIZES = {"fp32": 400, "fp16": 200, "int8-weights": 100, "int8-vnni": 110, "int8-x86": 110}
NEEDS = {"int8-vnni": ("vnni",)}


def manifest_of(ship: str = "int8-weights", **sizes: int) -> Manifest:
    artifacts = tuple(
        Artifact(
            variant=name,
            sha256=f"{number:064x}",
            size_bytes=size,
            needs=NEEDS.get(name, ()),
        )
        for number, (name, size) in enumerate((sizes or SIZES).items())
    )
    return linear().changed(artifacts=artifacts, ship=ship).signed.manifest


def profile(**changed: Any) -> Profile:
    given: dict[str, Any] = {
        "features": frozenset({"vnni"}),
        "accelerator": False,
        "runtime": "1.32",
        "largest_bytes": 1000,
    }
    return Profile(**given | changed)


def names(groups: list[list[Artifact]]) -> list[list[str]]:
    return [[artifact.variant for artifact in group] for group in groups]


def test_small_files_are_tried_together_and_larger_ones_only_if_none_of_them_passes() -> None:
    assert names(worth_trying(manifest_of(), profile())) == [
        ["int8-weights", "int8-vnni", "int8-x86"],
        ["fp16"],
        ["fp32"],
    ]


def test_what_the_processor_lacks_is_not_tried() -> None:
    groups = worth_trying(manifest_of(), profile(features=frozenset()))
    assert names(groups)[0] == ["int8-weights", "int8-x86"]


def test_an_accelerator_makes_every_file_worth_a_try() -> None:
    assert names(worth_trying(manifest_of(), profile(accelerator=True))) == [list(SIZES)]


def test_files_larger_than_a_slot_are_left_out() -> None:
    assert names(worth_trying(manifest_of(), profile(largest_bytes=200)))[-1] == ["fp16"]


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"largest_bytes": 5}, "int8-weights takes 100 bytes and a slot holds 5; raise SHOAL"),
        ({"features": frozenset()}, "int8-vnni needs a processor with vnni"),
    ],
)
def test_a_version_without_a_fitting_file_is_refused(
    changed: dict[str, Any], sentence: str
) -> None:
    only = (
        manifest_of("int8-vnni", **{"int8-vnni": 100}) if "features" in changed else manifest_of()
    )
    with pytest.raises(UnfitModelError, match=sentence):
        worth_trying(only, profile(**changed))


def result(milliseconds: float) -> SelfTestResult:
    return SelfTestResult(
        version="0" * 64,
        artifact="0" * 64,
        provider="",
        load_ms=1,
        p50_ms=milliseconds,
        largest_difference=0,
        peak_memory_bytes=0,
    )


def test_the_fastest_wins_and_the_smallest_among_equals() -> None:
    manifest = manifest_of()
    by_name = {artifact.variant: artifact for artifact in manifest.artifacts}

    def winner(**milliseconds: float) -> str:
        named = {
            by_name[name.replace("_", "-")].sha256: result(v) for name, v in milliseconds.items()
        }
        return fastest(named, manifest.artifacts).variant

    assert winner(fp32=1.0, int8_weights=1.2) == "fp32"
    assert winner(fp32=1.0, int8_weights=1.04) == "int8-weights"
    assert winner(int8_vnni=1.0, int8_weights=1.3, fp32=1.01) == "int8-vnni"


def test_a_choice_is_remembered_for_this_version_runtime_and_processor(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    manifest = manifest_of()
    choices = Choices(tmp_path, profile())
    assert choices.of("v1", manifest) is None
    choices.remember("v1", manifest.artifacts[2])
    assert choices.of("v1", manifest) == manifest.artifacts[2]
    assert choices.of("v2", manifest) is None
    assert Choices(tmp_path, profile(largest_bytes=5)).of("v1", manifest) is None
    assert Choices(tmp_path, profile(runtime="1.33")).of("v1", manifest) is None
    assert Choices(tmp_path, profile(features=frozenset())).of("v1", manifest) is None
    choices.forget("v1")
    assert choices.of("v1", manifest) is None


def test_few_choices_are_kept_and_a_damaged_file_costs_nothing(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    manifest = manifest_of()
    choices = Choices(tmp_path, profile())
    for number in range(20):
        choices.remember(f"v{number}", manifest.artifacts[0])
    assert choices.of("v0", manifest) is None
    assert choices.of("v19", manifest) == manifest.artifacts[0]
    (tmp_path / "models" / "choices.json").write_bytes(b"{")
    assert choices.of("v19", manifest) is None


@pytest.mark.parametrize(
    ("cpuinfo", "machine", "features"),
    [
        ("processor : 0\nflags\t\t: fpu avx2 avx512_vnni\n", "x86_64", {"vnni"}),
        ("flags : fpu avx2 avx_vnni\n", "x86_64", {"vnni"}),
        ("flags : fpu avx2\n", "x86_64", set()),
        ("Features\t: fp asimd asimddp\n", "aarch64", {"arm64"}),
        ("", "riscv64", set()),
    ],
)
def test_features_are_read_from_the_kernel(cpuinfo: str, machine: str, features: set[str]) -> None:
    assert cpu_features(cpuinfo, machine) == features


def test_a_device_whose_processor_cannot_be_read_still_has_a_profile(tmp_path: Path) -> None:
    found = read_profile(largest_bytes=7, cpuinfo=tmp_path / "nothing")
    assert found.features <= {"arm64"}
    assert found.largest_bytes == 7
