from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from cloud_coordinator.flower.tls import ensure_tls

NOW = datetime(2026, 5, 1, tzinfo=UTC)


def read(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def verify(folder: Path, name: str, at: datetime) -> None:
    """Check the server's certificate as a client that pins the CA does."""
    store = Store([read(folder / "ca.pem")])
    subject = x509.DNSName(name)
    PolicyBuilder().store(store).time(at).build_server_verifier(subject).verify(
        read(folder / "server.pem"), []
    )


def test_the_certificate_stands_under_the_ca_for_this_machine_only(tmp_path: Path) -> None:
    ensure_tls(tmp_path, now=NOW)

    verify(tmp_path, "localhost", NOW)
    with pytest.raises(VerificationError):
        verify(tmp_path, "example.org", NOW)


def test_a_device_whose_clock_is_some_hours_behind_accepts_it(tmp_path: Path) -> None:
    ensure_tls(tmp_path, now=NOW)
    verify(tmp_path, "localhost", NOW - timedelta(hours=12))


def test_private_keys_are_the_owners_alone(tmp_path: Path) -> None:
    files = ensure_tls(tmp_path, now=NOW)
    assert files.key.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "ca.key").stat().st_mode & 0o777 == 0o600


def test_a_second_start_keeps_everything(tmp_path: Path) -> None:
    ensure_tls(tmp_path, now=NOW)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    ensure_tls(tmp_path, now=NOW + timedelta(days=100))
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_near_its_end_the_certificate_is_renewed_under_the_same_ca(tmp_path: Path) -> None:
    files = ensure_tls(tmp_path, now=NOW)
    pinned, old = files.ca.read_bytes(), files.certificate.read_bytes()
    later = NOW + timedelta(days=340)

    ensure_tls(tmp_path, now=later)

    assert files.ca.read_bytes() == pinned
    assert files.certificate.read_bytes() != old
    verify(tmp_path, "localhost", later + timedelta(days=300))


def test_a_lost_ca_key_gives_a_new_authority_and_certificate(tmp_path: Path) -> None:
    files = ensure_tls(tmp_path, now=NOW)
    (tmp_path / "ca.key").unlink()
    pinned = files.ca.read_bytes()

    ensure_tls(tmp_path, now=NOW)

    assert files.ca.read_bytes() != pinned
    verify(tmp_path, "localhost", NOW)


def test_keys_are_on_p256(tmp_path: Path) -> None:
    key = read(ensure_tls(tmp_path, now=NOW).certificate).public_key()
    assert isinstance(key, EllipticCurvePublicKey)
    assert key.curve.name == "secp256r1"
