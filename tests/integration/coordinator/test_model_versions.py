"""One real build by the pipeline child, and everything that follows from it."""

import asyncio
import hashlib
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import numpy as np
import onnx
import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from sqlalchemy import delete, select

from cloud_coordinator.blobs import BlobStore
from cloud_coordinator.database import Database
from cloud_coordinator.migrations.tables import METADATA
from cloud_coordinator.models.api import router
from cloud_coordinator.models.catalogue import Catalogue
from cloud_coordinator.models.lifecycle import VersionState
from cloud_coordinator.models.listing import Listing
from cloud_coordinator.models.pipeline_child import run_pipeline
from cloud_coordinator.models.pipeline_messages import BuildVersion
from cloud_coordinator.models.service import ModelService
from cloud_coordinator.models.tables import ModelVersionRow, VariantRow
from cloud_coordinator.runs.tables import RunRow
from cloud_coordinator.trust.keys import load_trust_keys
from cloud_coordinator.trust.repository import TrustRepository
from cloud_coordinator.trust.tables import TufTargetRow
from shared.errors import (
    NotFoundError,
    ShoalError,
    UnauthorizedError,
    UnavailableError,
    UnfitModelError,
    UntrustedModelError,
)
from shared.parameters import save_vectors
from shared.request_signing import signed_headers
from shared.run_plan import RunPlan
from shared.signed_manifest import open_manifest
from shared.signing import SigningKey, VerifyingKey
from shared.tasks.registry import load_task
from shared.tasks.spec import TaskSpec
from shared.tasks.task import seeded_model
from shared.tasks.vectors import to_vector

NOW = datetime(2026, 3, 1, tzinfo=UTC)
PLAN = RunPlan(
    name="nightly",
    task=TaskSpec(
        "fashion",
        "image-classification",
        {"height": 28, "width": 28, "labels": [f"class-{i}" for i in range(10)]},
    ),
)
ADMIN = {"authorization": "Bearer admin-token"}
DEVICE = "camera-1"
DEVICE_KEY = SigningKey.generate()


@dataclass(frozen=True)
class Registry:
    """A coordinator's models, with one version that the child built."""

    home: Path
    database: Database
    blobs: BlobStore
    model_key: SigningKey
    service: ModelService
    listing: Listing
    version: str
    said: tuple[str, ...]  # what the build said of itself


def add_run(database: Database, run_id: str) -> None:
    with database.transaction() as session:
        session.add(
            RunRow(
                run_id=run_id,
                name=PLAN.name,
                state="exporting",
                plan={},
                plan_digest=PLAN.digest,
                created_at=NOW,
            )
        )


def new_service(
    home: Path, model_key: SigningKey
) -> tuple[Database, BlobStore, ModelService, Listing]:
    database = Database(f"sqlite:///{home / 'shoal.db'}")
    with database.connection() as connection:
        METADATA.create_all(connection)
    blobs = BlobStore(home / "blobs")
    trust = TrustRepository(database, load_trust_keys(home / "trust"), clock=lambda: NOW)
    trust.renew()
    listing = Listing(database, trust)
    service = ModelService(database, blobs, model_key, listing, home, clock=lambda: NOW)
    return database, blobs, service, listing


def store_parameters(blobs: BlobStore, *, seed: int = 0, spoil: bool = False) -> str:
    parameters = to_vector(seeded_model(load_task(PLAN.task), seed))
    if spoil:
        parameters[7] = np.nan
    return blobs.put(save_vectors({"parameters": parameters}))


async def build_through_a_crash(
    service: ModelService, run_id: str, parameters: str
) -> tuple[str, list[str]]:
    """Cancel the first attempt when it is under way, then build."""
    said: list[str] = []

    def hear(doing: str) -> None:
        said.append(doing)
        first.cancel()

    async def attempt() -> str:
        return await service.build_version(
            run_id=run_id,
            plan=PLAN,
            parameters_sha256=parameters,
            rounds=10,
            say=hear,
        )

    first = asyncio.create_task(attempt())
    with pytest.raises(asyncio.CancelledError):
        await first
    assert [row.state for row in service.versions()] == [VersionState.CANDIDATE]
    said.clear()
    return await attempt(), said


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    home = tmp_path_factory.mktemp("coordinator")
    model_key = SigningKey.generate()
    database, blobs, service, listing = new_service(home, model_key)
    add_run(database, "run-1")
    parameters = store_parameters(blobs)
    version, said = asyncio.run(build_through_a_crash(service, "run-1", parameters))
    yield Registry(home, database, blobs, model_key, service, listing, version, tuple(said))
    database.close()


def test_a_build_that_was_interrupted_is_simply_run_again(registry: Registry) -> None:
    row = registry.service.version(registry.version)
    assert row.state == VersionState.SIGNED
    assert not (registry.home / "models" / "building").exists()
    assert registry.said[0] == "exporting to ONNX"


def test_the_manifest_is_signed_and_says_where_the_version_came_from(registry: Registry) -> None:
    signed = open_manifest(
        registry.service.manifest_bytes(registry.version),
        trusted={registry.model_key.public.key_id: registry.model_key.public},
        version=registry.version,
    )
    manifest = signed.manifest
    row = registry.service.version(registry.version)
    assert manifest.model == "fashion"
    assert manifest.task == PLAN.task
    assert manifest.lineage.run_id == "run-1"
    assert manifest.lineage.rounds == 10
    assert manifest.lineage.plan_digest == PLAN.digest
    assert manifest.lineage.parameters_sha256 == row.parameters_sha256
    assert manifest.labels == tuple(PLAN.task.options["labels"])
    assert len(registry.service.manifest_bytes(registry.version)) < 128 * 1024


def test_every_artifact_of_the_manifest_is_a_blob_of_its_digest(registry: Registry) -> None:
    row = registry.service.version(registry.version)
    passed = [variant for variant in row.variants if variant.passed]
    assert {"fp32", "fp16", "int8-weights"} <= {variant.variant for variant in passed}
    for variant in passed:
        assert variant.sha256 is not None
        content = registry.service.artifact_path(variant.sha256).read_bytes()
        assert hashlib.sha256(content).hexdigest() == variant.sha256
        assert len(content) == variant.size_bytes
        onnx.checker.check_model(onnx.load_from_string(content))
    sizes = {variant.variant: variant.size_bytes for variant in row.variants}
    assert sizes["int8-weights"] < sizes["fp32"] / 3.5
    assert [variant.variant for variant in row.variants if variant.shipped]


async def test_what_was_built_may_be_signed_later_and_keeps_its_files(tmp_path: Path) -> None:
    key = SigningKey.generate()
    database, blobs, service, _ = new_service(tmp_path, key)
    add_run(database, "run-1")
    with pytest.raises(NotFoundError, match="no model version was built of run 'run-1'"):
        await service.sign("run-1", PLAN)
    parameters = store_parameters(blobs)
    for _ in range(2):  # the second time nothing happens
        await service.build(run_id="run-1", plan=PLAN, parameters_sha256=parameters, rounds=3)
    (row,) = service.versions()
    assert (row.state, row.version) == (VersionState.COMPRESSED, None)
    built = {variant.sha256 for variant in row.variants if variant.passed}
    assert built <= service.blobs_to_keep(protect=(), active={"run-1"})
    assert not built & service.blobs_to_keep(protect=(), active=())  # its run was stopped
    database.close()

    database, _, service, _ = new_service(tmp_path, key)
    version = await service.sign("run-1", PLAN)
    assert await service.sign("run-1", PLAN) == version
    manifest = open_manifest(
        service.manifest_bytes(version),
        trusted={key.public.key_id: key.public},
        version=version,
    ).manifest
    assert {artifact.sha256 for artifact in manifest.artifacts} == built
    assert all(artifact.tolerance is not None for artifact in manifest.artifacts)
    assert manifest.shipped.tolerance == manifest.golden.tolerance
    database.close()


async def test_a_run_has_one_version_however_often_it_is_built(registry: Registry) -> None:
    row = registry.service.version(registry.version)
    again = await asyncio.wait_for(
        registry.service.build_version(
            run_id="run-1", plan=PLAN, parameters_sha256=row.parameters_sha256, rounds=10
        ),
        timeout=5,  # no child was started
    )
    assert again == registry.version
    assert len(registry.service.versions()) == 1


def test_the_coordinators_process_stays_free_of_torch_and_onnx(registry: Registry) -> None:
    program = (
        "import sys, cloud_coordinator.models.service, cloud_coordinator.models.api;"
        "print(sorted({'torch', 'onnx', 'onnxruntime', 'onnxscript'} & set(sys.modules)))"
    )
    assert asyncio.run(_output_of(program)) == "[]"
    assert registry.version


async def _output_of(program: str) -> str:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE
    )
    output, _ = await asyncio.wait_for(process.communicate(), timeout=30)
    return output.decode().strip()


async def test_parameters_that_diverged_reject_the_version_for_good(tmp_path: Path) -> None:
    database, blobs, service, _ = new_service(tmp_path, SigningKey.generate())
    add_run(database, "run-1")
    spoiled = store_parameters(blobs, spoil=True)
    for _ in range(2):  # the second time from the record, without a child
        with pytest.raises(UnfitModelError, match="NaN"):
            await service.build_version(
                run_id="run-1", plan=PLAN, parameters_sha256=spoiled, rounds=3
            )
    (row,) = service.versions()
    assert (row.state, row.version) == (VersionState.REJECTED, None)
    assert "NaN" in row.cause
    database.close()


async def test_parameters_that_changed_on_the_disk_are_not_built(tmp_path: Path) -> None:
    database, blobs, service, _ = new_service(tmp_path, SigningKey.generate())
    add_run(database, "run-1")
    parameters = store_parameters(blobs)
    with blobs.path_of(parameters).open("ab") as file:
        file.write(b"more")
    with pytest.raises(UntrustedModelError, match="does not hold what its name says"):
        await service.build_version(
            run_id="run-1", plan=PLAN, parameters_sha256=parameters, rounds=3
        )
    assert [row.state for row in service.versions()] == [VersionState.CANDIDATE]
    database.close()


def order(folder: Path) -> BuildVersion:
    return BuildVersion(
        task=PLAN.task, parameters_path=str(folder / "none"), folder=str(folder), seed=0
    )


async def test_a_pipeline_that_is_too_slow_is_ended(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="was not done after"):
        await run_pipeline(
            order(tmp_path),
            log_path=tmp_path / "log",
            say=lambda _: None,
            deadline=timedelta(seconds=0.2),
        )


async def test_a_pipeline_that_crashes_says_where_the_reason_is(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match=r"ended with status 1; .*log says why"):
        await run_pipeline(order(tmp_path), log_path=tmp_path / "log", say=lambda _: None)
    assert "FileNotFoundError" in (tmp_path / "log").read_text()


# --- which version is current, and which files are kept -------------------------------------------


def add_version(registry: Registry, run_id: str, *, age_days: int, model: str = "fashion") -> str:
    """Record a signed version of one fp32 artifact, as if it had been built."""
    artifact = registry.blobs.put(f"artifact of {run_id}".encode())
    digest = hashlib.sha256(run_id.encode()).hexdigest()
    add_run(registry.database, run_id)
    with registry.database.transaction() as session:
        session.add(
            ModelVersionRow(
                run_id=run_id,
                version=digest,
                model=model,
                state=VersionState.SIGNED.value,
                created_at=NOW - timedelta(days=age_days),
                rounds=1,
                parameters_sha256=registry.blobs.put(f"parameters of {run_id}".encode()),
                sealed=b"{}",
                variants=[
                    VariantRow(
                        variant="fp32",
                        position=0,
                        shipped=True,
                        passed=True,
                        sha256=artifact,
                        size_bytes=20,
                        session_config={},
                    )
                ],
            )
        )
    return digest


@pytest.fixture
def shelf(tmp_path: Path) -> Iterator[Registry]:
    """A registry without a version, for versions that are only recorded."""
    key = SigningKey.generate()
    database, blobs, service, listing = new_service(tmp_path, key)
    yield Registry(tmp_path, database, blobs, key, service, listing, "", ())
    database.close()


def make_current(registry: Registry, version: str) -> None:
    with registry.database.transaction() as session:
        registry.service.begin_rollout(session, version)
        session.expire_all()
        registry.service.make_current(session, version)


def states(registry: Registry) -> dict[str, str]:
    return {row.run_id: row.state for row in registry.service.versions()}


def test_a_new_current_version_supersedes_the_old_one_of_its_model_only(shelf: Registry) -> None:
    old = add_version(shelf, "old", age_days=2)
    new = add_version(shelf, "new", age_days=1)
    other = add_version(shelf, "other", age_days=3, model="health")
    for version in (old, other, new):
        make_current(shelf, version)
    assert states(shelf) == {"old": "superseded", "new": "current", "other": "current"}


def test_a_superseded_version_can_come_back(shelf: Registry) -> None:
    old = add_version(shelf, "old", age_days=2)
    new = add_version(shelf, "new", age_days=1)
    for version in (old, new, old):
        make_current(shelf, version)
    assert states(shelf) == {"old": "current", "new": "superseded"}


def test_a_version_whose_files_are_gone_cannot_become_current(shelf: Registry) -> None:
    old = add_version(shelf, "old", age_days=2)
    shelf.blobs.collect(set())
    with pytest.raises(NotFoundError):
        make_current(shelf, old)
    assert states(shelf) == {"old": "signed"}


def test_an_unknown_version_cannot_become_current(shelf: Registry) -> None:
    with pytest.raises(NotFoundError, match="shoal model list"):
        make_current(shelf, "0" * 64)


def test_disk_stays_bounded_by_the_last_versions_and_those_in_use(shelf: Registry) -> None:
    versions = [add_version(shelf, f"run-{n}", age_days=10 - n) for n in range(6)]
    make_current(shelf, versions[0])
    keep = shelf.service.blobs_to_keep(protect={versions[1]}, active=(), last=2)
    shelf.blobs.collect(keep)
    for number, version in enumerate(versions):
        (variant,) = shelf.service.version(version).variants
        assert variant.sha256 is not None
        if number in {0, 1, 4, 5}:
            assert shelf.service.artifact_path(variant.sha256).exists()
        else:
            with pytest.raises(NotFoundError):
                shelf.service.artifact_path(variant.sha256)


def test_each_model_has_its_own_last_versions(shelf: Registry) -> None:
    add_version(shelf, "rare", age_days=100, model="health")
    for n in range(3):
        add_version(shelf, f"run-{n}", age_days=n)
    kept = shelf.service.blobs_to_keep(protect=(), active=(), last=1)
    assert hashlib.sha256(b"artifact of rare").hexdigest() in kept
    assert hashlib.sha256(b"artifact of run-0").hexdigest() in kept
    assert hashlib.sha256(b"artifact of run-1").hexdigest() not in kept


def listed(registry: Registry) -> dict[str, set[str]]:
    """Under which roles the files of each run's version are listed."""
    found: dict[str, set[str]] = {}
    with registry.database.transaction() as session:
        for row in session.scalars(select(TufTargetRow)):
            found.setdefault(row.run_id, set()).add(row.path.partition("/")[0])
    return found


def test_what_is_built_is_a_candidate_with_every_file_that_passed(registry: Registry) -> None:
    row = registry.service.version(registry.version)
    with registry.database.transaction() as session:
        paths = {target.path for target in session.scalars(select(TufTargetRow))}
    assert paths == {f"candidates/{v.sha256}.onnx" for v in row.variants if v.sha256}


def test_a_rollout_releases_a_version_until_its_files_are_tidied_away(shelf: Registry) -> None:
    versions = [add_version(shelf, f"run-{n}", age_days=10 - n) for n in range(6)]
    for version in versions:
        make_current(shelf, version)
    with shelf.database.transaction() as session:
        paths = {target.path for target in session.scalars(select(TufTargetRow))}
    assert f"released/{versions[0]}.json" in paths
    shelf.listing.withdraw_all_but(protect={versions[1]}, active=())
    assert listed(shelf) == {f"run-{n}": {"released"} for n in (1, 3, 4, 5)}


def test_what_was_served_before_there_was_a_list_is_released(shelf: Registry) -> None:
    old, _ = add_version(shelf, "old", age_days=2), add_version(shelf, "new", age_days=1)
    make_current(shelf, old)
    with shelf.database.transaction() as session:
        session.execute(delete(TufTargetRow))
    shelf.listing.release_served(protect=())
    assert listed(shelf) == {"old": {"released"}}


# --- over HTTP ------------------------------------------------------------------------------------


class OneDevice:
    """All that authentication asks of the device registry."""

    async def identity_key(self, device_id: str) -> VerifyingKey:
        if device_id != DEVICE:
            raise NotFoundError(f"there is no device {device_id!r}")
        return DEVICE_KEY.public


STATUSES = {NotFoundError: 404, UnauthorizedError: 401, UntrustedModelError: 500}


@pytest.fixture
async def api(registry: Registry) -> AsyncIterator[httpx.AsyncClient]:
    app = FastAPI()
    app.include_router(router)
    app.state.models = registry.service
    app.state.catalogue = Catalogue(registry.database)
    app.state.devices = OneDevice()
    app.state.admin_token = "admin-token"
    app.state.clock = lambda: NOW

    @app.exception_handler(ShoalError)
    async def explain(_request: object, error: ShoalError) -> JSONResponse:
        return JSONResponse({"error": str(error)}, STATUSES[type(error)])

    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://coordinator") as client:
        yield client


def signed(path: str, **extra: str) -> dict[str, str]:
    headers = signed_headers(
        method="GET", path=path, body=b"", device=DEVICE, key=DEVICE_KEY, now=NOW
    )
    return headers | extra


def shipped_of(registry: Registry) -> tuple[str, bytes]:
    row = registry.service.version(registry.version)
    (digest,) = [variant.sha256 for variant in row.variants if variant.shipped]
    assert digest is not None
    return f"/v1/artifacts/{digest}", registry.blobs.read(digest)


async def test_the_listing_shows_every_variant_with_its_figures(
    api: httpx.AsyncClient, registry: Registry
) -> None:
    (listed,) = (await api.get("/v1/models", headers=ADMIN)).json()
    shown = (await api.get(f"/v1/models/{registry.version}", headers=ADMIN)).json()
    assert listed == shown
    assert shown["version"] == registry.version
    assert shown["state"] == "signed"
    names = [variant["variant"] for variant in shown["variants"]]
    assert names == ["fp32", "fp16", "int8-weights"]  # dynamic int8 is slow on convolutions
    assert shown["ship"] in names
    for variant in shown["variants"]:
        assert variant["latency_p50_us"] > 0
        assert variant["agreement"] >= 0.98
        assert variant["passed"] is (variant["cause"] == "")


async def test_an_unknown_version_is_not_found(api: httpx.AsyncClient) -> None:
    answer = await api.get(f"/v1/models/{'0' * 64}", headers=ADMIN)
    assert answer.status_code == 404
    assert "shoal model list" in answer.json()["error"]


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/{v}", "/v1/models/{v}/manifest"])
async def test_nobody_reads_without_credentials(
    api: httpx.AsyncClient, registry: Registry, path: str
) -> None:
    path = path.format(v=registry.version)
    assert (await api.get(path)).status_code == 401
    wrong = {"authorization": "Bearer guess"}
    assert (await api.get(path, headers=wrong)).status_code == 401
    stolen = signed("/v1/other")
    assert (await api.get(path, headers=stolen)).status_code == 401


async def test_devices_do_not_read_the_listing(api: httpx.AsyncClient) -> None:
    assert (await api.get("/v1/models", headers=signed("/v1/models"))).status_code == 401


async def test_a_device_and_the_operator_get_the_manifest_byte_for_byte(
    api: httpx.AsyncClient, registry: Registry
) -> None:
    path = f"/v1/models/{registry.version}/manifest"
    for headers in (signed(path), ADMIN):
        answer = await api.get(path, headers=headers)
        assert answer.content == registry.service.manifest_bytes(registry.version)
        assert answer.headers["content-type"] == "application/json"


async def test_an_artifact_is_its_own_entity_tag(
    api: httpx.AsyncClient, registry: Registry
) -> None:
    path, content = shipped_of(registry)
    answer = await api.get(path, headers=signed(path))
    assert answer.status_code == 200
    assert answer.content == content
    assert answer.headers["etag"] == f'"{path.rpartition("/")[2]}"'
    assert answer.headers["accept-ranges"] == "bytes"
    assert answer.headers["content-length"] == str(len(content))


async def test_a_broken_download_is_resumed_where_it_stopped(
    api: httpx.AsyncClient, registry: Registry
) -> None:
    path, content = shipped_of(registry)
    tag = f'"{path.rpartition("/")[2]}"'
    rest = {"range": "bytes=1000-", "if-range": tag}
    answer = await api.get(path, headers=signed(path, **rest))
    assert answer.status_code == 206
    assert answer.content == content[1000:]
    assert answer.headers["content-range"] == f"bytes 1000-{len(content) - 1}/{len(content)}"
    part = await api.get(path, headers=signed(path, range="bytes=10-19"))
    assert part.content == content[10:20]


async def test_a_resumed_download_of_another_file_starts_from_the_beginning(
    api: httpx.AsyncClient, registry: Registry
) -> None:
    path, content = shipped_of(registry)
    other = {"range": "bytes=1000-", "if-range": f'"{"0" * 64}"'}
    answer = await api.get(path, headers=signed(path, **other))
    assert answer.status_code == 200
    assert answer.content == content


async def test_a_range_beyond_the_end_is_refused_with_the_size(
    api: httpx.AsyncClient, registry: Registry
) -> None:
    path, content = shipped_of(registry)
    answer = await api.get(path, headers=signed(path, range=f"bytes={len(content)}-"))
    assert answer.status_code == 416
    assert answer.headers["content-range"] == f"bytes */{len(content)}"


async def test_blobs_that_are_no_artifacts_cannot_be_downloaded(
    api: httpx.AsyncClient, registry: Registry
) -> None:
    parameters = registry.service.version(registry.version).parameters_sha256
    path = f"/v1/artifacts/{parameters}"
    assert (await api.get(path, headers=signed(path))).status_code == 404


async def test_a_tampered_artifact_is_not_handed_out(
    api: httpx.AsyncClient, registry: Registry
) -> None:
    path, content = shipped_of(registry)
    file = registry.blobs.path_of(path.rpartition("/")[2])
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        answer = await api.get(path, headers=signed(path))
        assert answer.status_code == 500
        assert "does not hold what its name says" in answer.json()["error"]
    finally:
        file.write_bytes(content)
    assert (await api.get(path, headers=signed(path))).status_code == 200
