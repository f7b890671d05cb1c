"""What other users of the machine may read."""

import stat
from pathlib import Path

from cloud_coordinator.keys import load_keys
from shared.files import make_folder, write_private


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_home_is_its_owners_alone(tmp_path: Path) -> None:
    make_folder(tmp_path / "home")
    assert mode_of(tmp_path / "home") == 0o700


def test_a_home_that_the_owner_opened_up_stays_so(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o750)
    make_folder(home)
    assert mode_of(home) == 0o750


def test_every_secret_of_the_coordinator_is_its_owners_alone(tmp_path: Path) -> None:
    load_keys(tmp_path)
    assert {mode_of(path) for path in tmp_path.iterdir()} == {0o600}


def test_a_secret_that_was_readable_is_so_no_more_once_it_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b"old")
    path.chmod(0o644)
    write_private(path, b"new")
    assert mode_of(path) == 0o600
