"""The SuperLink's own small authority: one CA, one server certificate, for loopback only.

Devices pin the CA (it travels in the signed enrolment reply), so the CA lives long and the server
certificate is renewed under it without anybody noticing.
"""

import ipaddress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP256R1,
    EllipticCurvePrivateKey,
    generate_private_key,
)
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from shared.files import write_atomic, write_private

_CA_LIFETIME = timedelta(days=20 * 365)
_SERVER_LIFETIME = timedelta(days=365)
_RENEW_BEFORE = timedelta(days=30)
_CLOCK_SKEW = timedelta(days=1)  # devices whose clock is behind must not refuse a fresh certificate
_HOSTS = (
    x509.IPAddress(ipaddress.IPv4Address("127.0.0.1")),
    x509.DNSName("localhost"),
)


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Where the PEM files lie; the key is readable by its owner alone."""

    ca: Path
    certificate: Path
    key: Path


def ensure_tls(folder: Path, *, now: datetime) -> TlsFiles:
    """Return valid TLS files in ``folder``, made or renewed where they are missing or near expiry.

    Args:
        folder: private to the coordinator.
        now: aware UTC.
    """
    files = TlsFiles(folder / "ca.pem", folder / "server.pem", folder / "server.key")
    ca_key_path = folder / "ca.key"
    if not _is_fresh(files.ca, now) or not ca_key_path.exists():
        ca_key = generate_private_key(SECP256R1())
        _write_key(ca_key_path, ca_key)
        _write_certificate(files.ca, _make_ca(ca_key, now))
        files.certificate.unlink(missing_ok=True)
    if not _is_fresh(files.certificate, now) or not files.key.exists():
        key = generate_private_key(SECP256R1())
        authority = x509.load_pem_x509_certificate(files.ca.read_bytes())
        _write_key(files.key, key)
        _write_certificate(
            files.certificate, _make_server(key, authority, _read_key(ca_key_path), now)
        )
    return files


def _is_fresh(path: Path, now: datetime) -> bool:
    if not path.exists():
        return False
    certificate = x509.load_pem_x509_certificate(path.read_bytes())
    return certificate.not_valid_after_utc - now > _RENEW_BEFORE


def _make_ca(key: EllipticCurvePrivateKey, now: datetime) -> x509.Certificate:
    name = _name("Shoal SuperLink CA")
    builder = _builder(name, name, key, now, _CA_LIFETIME)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(sign_certificates=True), critical=True)
    return builder.sign(key, SHA256())


def _make_server(
    key: EllipticCurvePrivateKey,
    authority: x509.Certificate,
    authority_key: EllipticCurvePrivateKey,
    now: datetime,
) -> x509.Certificate:
    builder = _builder(_name("Shoal SuperLink"), authority.subject, key, now, _SERVER_LIFETIME)
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key())
    for extension, critical in (
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (_usage(sign_certificates=False), True),
        (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False),
        (x509.SubjectAlternativeName(_HOSTS), False),
        (identifier, False),
    ):
        builder = builder.add_extension(extension, critical=critical)
    return builder.sign(authority_key, SHA256())


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: EllipticCurvePrivateKey,
    now: datetime,
    lifetime: timedelta,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + lifetime)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _usage(*, sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _write_key(path: Path, key: EllipticCurvePrivateKey) -> None:
    write_private(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def _read_key(path: Path) -> EllipticCurvePrivateKey:
    key = load_pem_private_key(path.read_bytes(), password=None)
    assert isinstance(key, EllipticCurvePrivateKey)
    return key


def _write_certificate(path: Path, certificate: x509.Certificate) -> None:
    write_atomic(path, certificate.public_bytes(Encoding.PEM))
