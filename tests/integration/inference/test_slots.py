import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from edge_agent.slot_files import MANIFEST, MODEL, unverified_manifest
from edge_agent.slots import Slots, verified_manifest
from shared.errors import UntrustedModelError
from shared.signing import SigningKey
from tests.integration.inference.crashing_slots import VERSIONS
from tests.integration.inference.tiny_models import TRUSTED, Version, linear


def deploy(slots: Slots, version: Version) -> Path:
    slots.folder.mkdir(parents=True, exist_ok=True)
    download = slots.folder / "download"
    download.write_bytes(version.content)
    slot = slots.stage(version.signed.sealed, download)
    slots.switch(slot)
    return slot


def test_the_first_version_becomes_current_and_has_none_before_it(tmp_path: Path) -> None:
    slots = Slots(tmp_path)
    assert slots.current is None
    slot = deploy(slots, linear(1))
    assert slots.current == slot
    assert slots.previous is None
    assert verified_manifest(slot, TRUSTED).version == linear(1).digest
    assert (slot / MODEL).read_bytes() == linear(1).content


def test_only_the_two_latest_versions_stay_on_the_disk(tmp_path: Path) -> None:
    slots = Slots(tmp_path)
    for seed in range(4):
        deploy(slots, linear(seed))
    assert slots.current is not None
    assert slots.previous is not None
    assert verified_manifest(slots.current, TRUSTED).version == linear(3).digest
    assert verified_manifest(slots.previous, TRUSTED).version == linear(2).digest
    assert sorted(path.name for path in slots.folder.iterdir()) == ["a", "b", "current"]


def test_a_staged_version_is_found_and_not_yet_current(tmp_path: Path) -> None:
    slots = Slots(tmp_path)
    deploy(slots, linear(1))
    (tmp_path / "download").write_bytes(linear(2).content)
    staged = slots.stage(linear(2).signed.sealed, tmp_path / "download")
    assert slots.current == slots.find(linear(1).digest, TRUSTED)
    assert slots.find(linear(2).digest, TRUSTED) == staged
    assert slots.previous is None  # it was never served
    assert slots.find(linear(3).digest, TRUSTED) is None


def test_a_damaged_or_foreign_slot_is_not_found(tmp_path: Path) -> None:
    slots = Slots(tmp_path)
    slot = deploy(slots, linear(1))
    stranger = SigningKey.generate().public
    assert slots.find(linear(1).digest, {stranger.key_id: stranger}) is None
    (slot / MODEL).write_bytes(linear(1).content[:-1])
    assert slots.find(linear(1).digest, TRUSTED) is None


def test_a_discarded_slot_is_empty_and_the_current_one_cannot_be(tmp_path: Path) -> None:
    slots = Slots(tmp_path)
    current = deploy(slots, linear(1))
    (tmp_path / "download").write_bytes(linear(2).content)
    staged = slots.stage(linear(2).signed.sealed, tmp_path / "download")
    slots.discard(staged)
    assert list(staged.iterdir()) == []
    with pytest.raises(ValueError, match="being served"):
        slots.discard(current)


def test_a_damaged_pointer_counts_as_no_model(tmp_path: Path) -> None:
    slots = Slots(tmp_path)
    deploy(slots, linear(1))
    (slots.folder / "current").write_bytes(b"{")
    assert slots.current is None
    deploy(slots, linear(2))
    assert slots.current is not None


def test_reading_what_is_no_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UntrustedModelError, match="cannot read"):
        unverified_manifest(tmp_path)
    (tmp_path / MANIFEST).write_bytes(b"{}")
    with pytest.raises(UntrustedModelError, match="is not a manifest"):
        unverified_manifest(tmp_path)


def test_a_crash_at_any_step_leaves_the_old_or_the_new_version_whole(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "tests.integration.inference.crashing_slots", str(tmp_path)],
        capture_output=True,
        check=True,
        timeout=60,
        env={**os.environ, "PYTHONWARNINGS": "error"},
    )
    crashes = json.loads(run.stdout)
    before, old, new, later = VERSIONS
    assert len(crashes) > 10
    seen: set[str] = set()
    for home in crashes:
        slots = Slots(Path(home))
        assert slots.current is not None
        current = verified_manifest(slots.current, TRUSTED).version
        assert current in {old.digest, new.digest}
        assert slots.find(current, TRUSTED) == slots.current
        if slots.previous is not None:
            previous = verified_manifest(slots.previous, TRUSTED).version
            assert previous == {old.digest: before, new.digest: old}[current].digest
            assert slots.find(previous, TRUSTED) == slots.previous
        (slots.folder / "download").unlink(missing_ok=True)
        deploy(slots, later)
        assert slots.find(later.digest, TRUSTED) == slots.current
        assert sorted(path.name for path in slots.folder.iterdir()) == ["a", "b", "current"]
        seen.add(current)
    assert seen == {old.digest, new.digest}
