"""``shoal membership``: who may be in a sum. `new-key` and `sign` run without a coordinator."""

import json
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from cloud_coordinator.commands.client import DEFAULT_HOME, ApiClient, AsJson, Home
from cloud_coordinator.commands.output import digest, moment, print_facts, print_json, print_table
from cloud_coordinator.devices.membership_signing import Signing, read_unsigned, sign_unsigned
from cloud_coordinator.keys import FLEET_KEY_BESIDE
from shared.errors import ConfigError
from shared.files import write_private
from shared.messages import utc_now
from shared.signing import SigningKey, VerifyingKey

memberships = typer.Typer(
    help="The membership list: which devices may be in one sum.", no_args_is_help=True
)
_NAMED = 5  # waiting devices that are named

NewFile = Annotated[Path, typer.Argument(help="The file to write.")]
OldFile = Annotated[Path, typer.Argument(help="The file to read.")]
Device = Annotated[str, typer.Argument(help="The device's id.")]


@memberships.command("show")
def show_membership(home: Home = DEFAULT_HOME, *, as_json: AsJson = False) -> None:
    """Show the version in force, who waits for the next one, and where the fleet key is."""
    answer = ApiClient(home).get("/v1/membership/status")
    if as_json:
        print_json(answer)
        return
    print_facts(
        {
            "version": str(answer["version"] or "none was signed yet"),
            "signed (UTC)": moment(answer["issued_at"]),
            "members": str(answer["members"]),
            "revoked": str(answer["revoked"]),
            "waiting": _waiting(answer),
            "fleet key": answer["fleet_key_id"],
        }
    )
    typer.echo(
        FLEET_KEY_BESIDE
        if answer["fleet_key"] == "beside"
        else "the fleet key is offline: changes wait until somebody signs them"
    )


@memberships.command("export")
def export_list(file: NewFile, home: Home = DEFAULT_HOME, *, as_json: AsJson = False) -> None:
    """Write the next version of the list, unsigned, into FILE."""
    document = ApiClient(home).get("/v1/membership/next")
    write_private(file, json.dumps(document, indent=1).encode())
    version, members = document["next"]["version"], len(document["next"]["members"])
    if as_json:
        print_json({"path": str(file), "version": version, "devices": members})
    else:
        typer.echo(
            f"wrote list {version} with {members} devices; where the fleet key is: "
            f"shoal membership sign {file} --key PEM --out SIGNED"
        )


@memberships.command("new-key")
def new_key(
    pem: Annotated[Path, typer.Argument(help="Where the key goes; FILE.pub is beside it.")],
    *,
    as_json: AsJson = False,
) -> None:
    """Make a fleet key, best on a machine that the coordinator cannot reach."""
    if pem.exists():
        raise ConfigError(f"{pem} exists; choose another name, a lost fleet key cannot be replaced")
    key = SigningKey.load_or_create(pem)
    public = pem.with_suffix(".pub")
    write_private(public, f"{key.public}\n".encode())
    if as_json:
        print_json({"path": str(pem), "public": str(public), "fleet_key_id": key.public.key_id})
        return
    typer.echo(
        f"made {pem}: keep it, and a copy; put {public} into the coordinator's home as "
        "fleet-key.pub, before the first device enrols, and start it with SHOAL_FLEET_KEY=offline"
    )
    typer.echo(f"devices can pin it: shoal-agent enroll --fleet-key {key.public.key_id} …")


@memberships.command("sign")
def sign_list(
    file: OldFile,
    *,
    key: Annotated[Path, typer.Option(help="The fleet key, a PEM file.")],
    out: Annotated[
        Path, typer.Option(help="The signed list; an older one that is there must be followed.")
    ],
    as_json: AsJson = False,
) -> None:
    """Sign an exported list; shows which devices are new. Needs no coordinator."""
    before = out.read_bytes() if out.exists() else None
    unsigned = read_unsigned(_content_of(file))
    signing = sign_unsigned(unsigned, _fleet_key(key), signed_before=before, now=utc_now())
    write_private(out, signing.sealed)
    if as_json:
        print_json(_as_document(signing, out))
        return
    rows = [
        (entry.device_id, entry.owner or "-", _fingerprint(entry.identity_key), change)
        for change, entries in (("new", signing.added), ("revoked", signing.revoked))
        for entry in entries
    ]
    print_table(("device", "owner", "key", "change"), rows, empty="no devices yet")
    typer.echo(
        f"signed list {signing.content.version} of fleet {signing.content.fleet}; "
        f"bring it to the coordinator: shoal membership import {out}"
    )


@memberships.command("import")
def import_list(file: OldFile, home: Home = DEFAULT_HOME, *, as_json: AsJson = False) -> None:
    """Hand a signed list to the coordinator; it is in force at once."""
    try:
        sealed = json.loads(_content_of(file))
    except ValueError as error:
        raise ConfigError(
            f"{file} is no signed membership list; give what 'shoal membership sign' wrote"
        ) from error
    answer = ApiClient(home).post("/v1/membership", sealed)
    if as_json:
        print_json(answer)
    else:
        typer.echo(f"list {answer['version']} with {answer['members']} members is in force")


@memberships.command("revoke")
def revoke_member(device_id: Device, home: Home = DEFAULT_HOME, *, as_json: AsJson = False) -> None:
    """Keep a device out of all sums for ever, from the next version of the list on."""
    answer = ApiClient(home).post(f"/v1/membership/revoked/{device_id}")
    if as_json:
        print_json(answer)
    else:
        typer.echo(f"{device_id} is in no sum any more, once the next list is signed")


def _waiting(answer: dict[str, Any]) -> str:
    waiting = answer["waiting"]
    if not waiting:
        return "nobody"
    names = ", ".join(waiting[:_NAMED]) + (", …" if len(waiting) > _NAMED else "")
    until = (
        "until a sum needs the list"
        if answer["fleet_key"] == "beside"
        else "until the list is signed: 'shoal membership export', 'sign', 'import'"
    )
    return f"{len(waiting)} ({names}), {until}"


def _as_document(signing: Signing, out: Path) -> dict[str, Any]:
    return {
        "path": str(out),
        "fleet": signing.content.fleet,
        "version": signing.content.version,
        "new": msgspec.to_builtins(signing.added),
        "revoked": msgspec.to_builtins(signing.revoked),
    }


def _fingerprint(identity_key: str) -> str:
    return digest(VerifyingKey.from_text(identity_key).key_id)


def _fleet_key(path: Path) -> SigningKey:
    try:
        return SigningKey.load_or_create(path.resolve(strict=True))  # one that is missing stays so
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not a fleet key ({error}); give its PEM file") from error


def _content_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; give another file") from error
