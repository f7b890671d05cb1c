"""The REST API: who may do what, and how a refusal reads."""

import hashlib
import re
from collections.abc import AsyncIterator, Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated

import httpx
import msgspec
import pytest
from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse

from cloud_coordinator.devices.authentication import MAX_BODY_BYTES, authenticated_device
from shared.enrolment import JoinToken
from shared.errors import NotFoundError, UnauthorizedError
from shared.messages import utc_now
from shared.request_signing import DEVICE_HEADER, SIGNATURE_HEADER, TIME_HEADER, signed_headers
from shared.signing import SigningKey, VerifyingKey
from tests.integration.coordinator.fake_device import DeviceKeys, open_reply
from tests.integration.coordinator.live import Live, live, plan

ADMIN_ROUTES = [
    ("POST", "/v1/tokens"),
    ("GET", "/v1/tokens"),
    ("GET", "/v1/devices"),
    ("GET", "/v1/devices/a"),
    ("POST", "/v1/membership"),
    ("GET", "/v1/membership/status"),
    ("GET", "/v1/membership/next"),
    ("POST", "/v1/membership/revoked/a"),
    ("POST", "/v1/runs"),
    ("GET", "/v1/runs"),
    ("GET", "/v1/runs/x"),
    ("POST", "/v1/runs/x/stop"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/x"),
    ("GET", "/v1/models/x/card"),
    ("GET", "/v1/models/x/report"),
    ("GET", "/v1/models/x/compare/y"),
    ("GET", "/v1/models/x/notes"),
    ("POST", "/v1/models/x/notes"),
    ("GET", "/v1/compressions"),
    ("GET", "/v1/compressions/x"),
    ("POST", "/v1/compressions/x/stop"),
    ("POST", "/v1/rollouts"),
    ("GET", "/v1/rollouts"),
    ("GET", "/v1/rollouts/x"),
    ("POST", "/v1/rollouts/x/pause"),
    ("POST", "/v1/rollouts/x/resume"),
    ("POST", "/v1/rollouts/x/abort"),
    ("GET", "/v1/trust"),
]
OTHER_ROUTES = {
    ("GET", "/v1/health"),
    ("POST", "/v1/enroll"),
    # of devices too
    ("GET", "/v1/membership"),
    ("GET", "/v1/tuf/{name}"),
    ("GET", "/v1/models/{version}/manifest"),
    ("GET", "/v1/artifacts/{sha256}"),
}


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Live]:
    async with live(tmp_path) as running:
        yield running


async def test_every_route_but_health_and_enrolment_needs_the_admin_token(tmp_path: Path) -> None:
    async with live(tmp_path) as service:
        routes = {
            (method.upper(), path)
            for path, item in service.coordinator.api().openapi()["paths"].items()
            for method in item
        }
        assert routes >= OTHER_ROUTES
        assert len(routes) == len(ADMIN_ROUTES) + len(OTHER_ROUTES)
        for credential in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic eDp5"}):
            for method, path in ADMIN_ROUTES:
                answer = await service.client.request(
                    method, path, headers={"Authorization": "", **credential}
                )
                assert (answer.status_code, path) == (401, path)
                assert "admin-token" in answer.json()["error"]


async def test_health_needs_no_token_and_tells_how_the_children_are(tmp_path: Path) -> None:
    async with live(tmp_path) as service:
        answer = await service.client.get("/v1/health", headers={"Authorization": ""})
        health = answer.json()
    assert health["status"] == "ok"
    assert health["broker_connected"]
    assert {name: child["state"] for name, child in health["children"].items()} == {
        "broker": "running",
        "superlink": "running",
    }


async def test_an_enrolment_reply_holds_all_that_a_device_must_know(tmp_path: Path) -> None:
    async with live(tmp_path) as service:
        token = (await service.client.post("/v1/tokens", json={"uses": 1})).json()["token"]
        request = DeviceKeys().request(JoinToken.parse(token), "camera-1")
        answer = await service.client.post("/v1/enroll", content=msgspec.json.encode(request))
        reply = open_reply(answer.content)
        settings, keys = service.coordinator.settings, service.coordinator.keys
        assert reply.device_id == "camera-1"
        assert reply.api_url == settings.api_url
        assert reply.mqtt_url == f"mqtt://127.0.0.1:{settings.mqtt_port}"
        assert reply.command_key == str(keys.command.public)
        assert reply.model_key == str(keys.model.public)
        assert reply.fleet_key == str(keys.fleet.public)
        assert reply.superlink_ca_pem.startswith("-----BEGIN CERTIFICATE")
        assert JoinToken.parse(token).coordinator_key_id == keys.command.public.key_id


@pytest.mark.parametrize(
    ("path", "content", "status", "sentence"),
    [
        ("/v1/enroll", b"{}", 400, "not an enrolment request: .*missing required field"),
        ("/v1/enroll", b"x" * (MAX_BODY_BYTES + 1), 400, "request body is over"),
        ("/v1/tokens", b'{"uses": 0}', 400, "body.uses: .* change it"),
        ("/v1/tokens", b'{"use": 1}', 400, "body.use: Extra inputs"),
        ("/v1/runs", b"not json", 400, "not valid JSON"),
        ("/v1/runs", b'{"name": "x", "task": 1}', 400, "the plan: task: expected `object`"),
        (
            "/v1/runs",
            b'{"name": "x", "task": {"name": "t", "uses": "u"}, "ruonds": 3}',
            400,
            "unknown key 'ruonds' at the top; did you mean 'rounds'",
        ),
        ("/v1/runs/nothing/stop", b"", 404, "there is no run 'nothing'; 'shoal run list'"),
        (
            "/v1/models/nothing/notes",
            b'{"author": "a", "text": "b"}',
            404,
            "there is no model version 'nothing'; 'shoal model list'",
        ),
        ("/v1/models/nothing/notes", b'{"author": "a", "text": ""}', 400, "body.text: .*change it"),
        ("/v1/rollouts", b'{"version": "x"}', 404, "no run made a model version 'x'"),
        ("/v1/rollouts/x/pause", b"", 404, "there is no rollout 'x'; 'shoal rollout list'"),
        ("/v1/elsewhere", b"", 404, "Not Found"),
    ],
)
async def test_a_refusal_is_one_sentence(
    service: Live, path: str, content: bytes, status: int, sentence: str
) -> None:
    as_json = {"content-type": "application/json"}
    answer = await service.client.post(path, content=content, headers=as_json)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert "\n" not in error
    assert re.search(sentence, error), error


async def test_a_deployed_version_can_be_chosen_by_hand(service: Live) -> None:
    device = await service.enrol("a")
    async with device.online():
        by_hand = msgspec.structs.replace(plan(rounds=1), deploy=False)
        run = await service.ended(await service.start(by_hand))
        assert (await service.get("/v1/devices/a"))["desired"] is None
        answer = await service.client.post("/v1/rollouts", json={"version": run["model_version"]})
        assert answer.json()["state"] == "completed"
        assert [device["device_id"] for device in answer.json()["devices"]] == ["a"]
        desired = (await service.get("/v1/devices/a"))["desired"]
        assert desired["model_version"] == run["model_version"]


class OneDevice:
    """A registry with one device."""

    def __init__(self) -> None:
        self.key = SigningKey.generate()

    async def identity_key(self, device_id: str) -> VerifyingKey:
        if device_id != "a":
            raise NotFoundError(device_id)
        return self.key.public


@pytest.fixture
async def guarded() -> AsyncIterator[tuple[httpx.AsyncClient, OneDevice]]:
    """An API whose only route answers with the device that signed the request."""
    app, registry = FastAPI(), OneDevice()
    app.state.devices, app.state.clock = registry, utc_now

    @app.post("/whoami")
    async def whoami(device: Annotated[str, Depends(authenticated_device)]) -> str:
        return device

    @app.exception_handler(UnauthorizedError)
    async def refuse(_request: Request, error: UnauthorizedError) -> JSONResponse:
        return JSONResponse({"error": str(error)}, 401)

    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        yield client, registry


def signature(
    key: SigningKey,
    *,
    path: str = "/whoami?x=%20y",
    body: bytes = b"hi",
    device: str = "a",
    now: datetime | None = None,
) -> dict[str, str]:
    return signed_headers(
        method="POST", path=path, body=body, device=device, key=key, now=now or utc_now()
    )


async def test_a_device_that_signed_this_very_request_is_known(
    guarded: tuple[httpx.AsyncClient, OneDevice],
) -> None:
    client, registry = guarded
    answer = await client.post("/whoami?x=%20y", content=b"hi", headers=signature(registry.key))
    assert (answer.status_code, answer.json()) == (200, "a")


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda _: {}, "not signed by an enrolled device"),
        (lambda key: signature(key, device="b"), "not signed by an enrolled device"),
        (lambda _: signature(SigningKey.generate()), "bad signature"),
        (lambda key: signature(key, path="/whoami"), "bad signature"),
        (lambda key: signature(key, body=b"ho"), "bad signature"),
        (lambda key: {**signature(key), TIME_HEADER: utc_now().isoformat()}, "bad signature"),
        (lambda key: {**signature(key), SIGNATURE_HEADER: "!"}, "no complete device signature"),
        (lambda _: {DEVICE_HEADER: "a"}, "no complete device signature"),
        (
            lambda key: signature(key, now=utc_now() - timedelta(minutes=6)),
            "set the device's clock",
        ),
    ],
)
async def test_any_other_request_is_refused(
    guarded: tuple[httpx.AsyncClient, OneDevice],
    spoil: Callable[[SigningKey], dict[str, str]],
    sentence: str,
) -> None:
    client, registry = guarded
    answer = await client.post("/whoami?x=%20y", content=b"hi", headers=spoil(registry.key))
    assert answer.status_code == 401
    assert sentence in answer.json()["error"]


async def test_the_root_that_a_new_device_gets_is_the_one_that_trust_status_names(
    service: Live,
) -> None:
    device = await service.enrol("a")
    root = device.reply.root_metadata
    status = await service.get("/v1/trust")
    assert status["root_fingerprint"] == hashlib.sha256(root).hexdigest()
    assert [role["role"] for role in status["roles"]][:2] == ["root", "targets"]
    answer = await service.client.get("/v1/tuf/1.root.json")
    assert answer.content == root
    assert (await service.client.get("/v1/tuf/2.root.json")).status_code == 404
    nobody = {"Authorization": ""}
    assert (await service.client.get("/v1/tuf/1.root.json", headers=nobody)).status_code == 401
