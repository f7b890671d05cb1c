"""The coordinator's TUF repository, judged by python-tuf's own client."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from tuf.api.exceptions import DownloadHTTPError, RepositoryError
from tuf.api.metadata import Metadata, Root
from tuf.ngclient import FetcherInterface, Updater, UpdaterConfig

from cloud_coordinator.database import Database
from cloud_coordinator.trust.keys import load_trust_keys
from cloud_coordinator.trust.metadata import ListedFile
from cloud_coordinator.trust.repository import TrustRepository
from shared.errors import ConfigError, NotFoundError
from shared.release_names import Role, artifact_target
from shared.signing import SigningKey

NOW = datetime.now(UTC).replace(microsecond=0)
DAY = timedelta(days=1)
CONTENT = b"a model"
SHA256 = "f" * 64


class Site:
    """A repository over its database, with keys in a folder and a clock that can be set."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.now = folder, NOW
        self.database = Database(f"sqlite:///{folder / 'shoal.db'}")
        self.database.migrate()
        self.start()

    def start(self) -> None:
        """Begin another life of the coordinator."""
        keys = load_trust_keys(self.folder / "trust")
        self.trust = TrustRepository(self.database, keys, clock=lambda: self.now)
        self.trust.renew()

    def list(self, role: Role, model_version: str = "1" * 64, sha256: str = SHA256) -> None:
        file = ListedFile(artifact_target(role, sha256), len(CONTENT), sha256)
        with self.database.transaction() as session:
            self.trust.list_files(session, role, model_version, [file])

    def versions(self) -> dict[str, int]:
        return {role.role: role.version for role in self.trust.status()}


class _Fetcher(FetcherInterface):
    def __init__(self, trust: TrustRepository) -> None:
        self._trust = trust

    def _fetch(self, url: str) -> Iterator[bytes]:
        try:
            return iter([self._trust.metadata(url.rsplit("/", 1)[1])])
        except NotFoundError as error:
            raise DownloadHTTPError(str(error), 404) from error


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    opened = Site(tmp_path)
    yield opened
    opened.database.close()


class Client:
    """A stock client that keeps what it saw."""

    def __init__(self, site: Site) -> None:
        self.site, self.folder = site, site.folder / "client"
        self.folder.mkdir()
        self.root = site.trust.newest_root()

    def finds(self, role: Role, sha256: str = SHA256) -> bool:
        updater = Updater(
            str(self.folder),
            "https://coordinator/v1/tuf/",
            fetcher=_Fetcher(self.site.trust),
            config=UpdaterConfig(prefix_targets_with_hash=False),
            bootstrap=self.root,
        )
        found = updater.get_targetinfo(artifact_target(role, sha256))
        return found is not None and found.hashes == {"sha256": sha256}


def test_a_released_file_is_found_by_a_stock_client_and_a_candidate_only_as_such(
    site: Site,
) -> None:
    client = Client(site)
    assert not client.finds("released")
    site.list("candidates")
    assert client.finds("candidates")
    assert not client.finds("released")
    site.list("released")
    assert client.finds("released")
    assert not client.finds("candidates")  # it is one thing at a time


def test_listing_again_changes_nothing(site: Site) -> None:
    site.list("released")
    before = site.versions()
    site.list("released")
    assert site.versions() == before


def test_a_change_that_is_rolled_back_is_not_published(site: Site) -> None:
    before, files = site.versions(), [ListedFile(artifact_target("released", SHA256), 1, SHA256)]
    with site.database.transaction() as session:
        site.trust.list_files(session, "released", "1" * 64, files)
        session.rollback()
    assert site.versions() == before
    assert not Client(site).finds("released")


def test_a_file_of_two_versions_stays_listed_until_both_are_withdrawn(site: Site) -> None:
    client, first, second = Client(site), "1" * 64, "2" * 64
    site.list("released", first)
    site.list("released", second)
    for kept, found in (([second], True), ([], False)):
        with site.database.transaction() as session:
            site.trust.withdraw_all_but(session, kept)
        assert client.finds("released") is found
    before = site.versions()
    with site.database.transaction() as session:
        site.trust.withdraw_all_but(session, [])
    assert site.versions() == before


def test_a_restored_database_still_counts_upwards(site: Site) -> None:
    client = Client(site)
    copy = (site.folder / "shoal.db").read_bytes()
    for number in range(5):
        site.list("released", f"{number}" * 64, f"{number}" * 64)
    assert client.finds("released", "4" * 64)
    site.database.close()
    for wal in site.folder.glob("shoal.db-*"):
        wal.unlink()
    (site.folder / "shoal.db").write_bytes(copy)
    site.now += timedelta(minutes=1)
    site.database.migrate()
    site.start()
    site.list("released")
    assert client.finds("released")


def test_renewing_signs_only_what_is_half_expired(site: Site) -> None:
    first = site.versions()
    site.trust.renew()
    assert site.versions() == first

    def renewed_after(days: int) -> set[str]:
        before = site.versions()
        site.now = NOW + days * DAY
        site.trust.renew()
        return {role for role, version in site.versions().items() if version != before[role]}

    assert renewed_after(4) == {"timestamp"}
    assert renewed_after(16) == {"timestamp", "snapshot", "candidates", "released"}
    assert renewed_after(400) == set(first)
    assert site.versions()["root"] == 2


def test_what_was_replaced_is_handed_out_for_a_day_and_roots_for_ever(site: Site) -> None:
    old = site.versions()
    site.now += 366 * DAY
    site.trust.renew()
    assert site.trust.metadata(f"{old['snapshot']}.snapshot.json")
    site.now += 2 * DAY
    site.list("released")
    with pytest.raises(NotFoundError, match="no metadata"):
        site.trust.metadata(f"{old['snapshot']}.snapshot.json")
    assert site.trust.metadata("1.root.json")
    assert site.trust.metadata("2.root.json") == site.trust.newest_root()


@pytest.mark.parametrize("name", ["", "root.json", "0.root.json", "1.root", "1.x.json", "../a"])
def test_no_other_name_is_metadata(site: Site, name: str) -> None:
    with pytest.raises(NotFoundError, match="no metadata"):
        site.trust.metadata(name)


@pytest.mark.parametrize("role", ["targets", "snapshot", "timestamp", "candidates", "released"])
def test_a_key_whose_file_is_gone_is_replaced_and_clients_follow(site: Site, role: str) -> None:
    client = Client(site)
    site.list("released")
    assert client.finds("released")
    stolen = site.folder / "trust" / f"{role}.pem"
    stolen.unlink()
    site.start()
    assert client.finds("released")
    site.list("released", "2" * 64, "2" * 64)
    assert client.finds("released", "2" * 64)


def test_a_root_key_that_is_kept_elsewhere_is_asked_for_where_it_is_needed(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    client, key = Client(site), site.folder / "trust" / "root.pem"
    elsewhere = key.rename(site.folder / "root.pem")
    site.start()
    site.list("released")
    assert client.finds("released")
    assert not key.exists()
    assert not site.trust.root_key_is_here

    (key.parent / "timestamp.pem").unlink()
    with pytest.raises(ConfigError, match=r"has to name timestamp; put it there for one start"):
        site.start()
    assert client.finds("released")  # the old key's metadata are still in force
    elsewhere.rename(key)
    site.start()
    key.rename(elsewhere)
    site.start()
    site.list("released", "2" * 64, "2" * 64)
    assert client.finds("released", "2" * 64)

    assert not caplog.records
    site.now += 400 * DAY
    site.trust.renew()
    assert "root.pem into the folder 'trust' for one start" in caplog.text
    assert site.trust.status()[0].version == 2


def test_without_a_root_key_no_first_root_is_signed(tmp_path: Path) -> None:
    (tmp_path / "trust").mkdir()
    SigningKey.load_or_create(tmp_path / "trust" / "released.pem")
    with pytest.raises(ConfigError, match="put it there for one start"):
        Site(tmp_path)


def test_another_root_key_is_refused_in_a_sentence(site: Site) -> None:
    (site.folder / "trust" / "root.pem").unlink()
    SigningKey.load_or_create(site.folder / "trust" / "root.pem")
    with pytest.raises(ConfigError, match="not the root key that devices pinned"):
        site.start()


def test_a_damaged_key_file_is_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "released.pem").write_text("not a key")
    with pytest.raises(ConfigError, match="put the backup copy back"):
        load_trust_keys(tmp_path)


def test_a_root_that_another_key_signed_is_not_followed(site: Site, tmp_path: Path) -> None:
    client = Client(site)
    (tmp_path / "other").mkdir()
    other = Site(tmp_path / "other")
    other.now = NOW + 400 * DAY
    other.trust.renew()
    assert Metadata[Root].from_bytes(other.trust.newest_root()).signed.version == 2
    client.site = other
    with pytest.raises(RepositoryError, match="root"):
        client.finds("released")
    other.database.close()


def test_keys_are_their_owners_alone(site: Site) -> None:
    folder = site.folder / "trust"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    assert len(list(folder.iterdir())) == 6
