"""Builds the coordinator: the only place that wires its parts together.

Everything long-lived is a job in one TaskGroup; a job that crashes ends the service loudly, and
what starts the service starts it again. At the end, runs are interrupted first, so that their
workers go before their SuperLink, and the broker goes last, so that a goodbye can be said.
"""

import asyncio
import contextlib
import logging
import random
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from cloud_coordinator import health
from cloud_coordinator.blobs import BlobStore
from cloud_coordinator.broker import start_broker
from cloud_coordinator.compression import api as compression_api
from cloud_coordinator.compression.records import StepRecords
from cloud_coordinator.compression.service import Compressions
from cloud_coordinator.control_link import ControlLink
from cloud_coordinator.database import Database
from cloud_coordinator.devices import api as devices_api
from cloud_coordinator.devices import membership_api
from cloud_coordinator.devices.enrolment import Enrolment
from cloud_coordinator.devices.membership import Membership
from cloud_coordinator.devices.service import DeviceService
from cloud_coordinator.flower.superlink import SuperLink
from cloud_coordinator.keys import FLEET_KEY_BESIDE, FLEET_KEY_FILE, Keys, load_keys
from cloud_coordinator.models import api as models_api
from cloud_coordinator.models.catalogue import Catalogue
from cloud_coordinator.models.listing import Listing
from cloud_coordinator.models.service import ModelService
from cloud_coordinator.rollouts import api as rollouts_api
from cloud_coordinator.rollouts.service import RolloutService
from cloud_coordinator.runs import api as runs_api
from cloud_coordinator.runs.driver import DriverParts
from cloud_coordinator.runs.records import RunRecords
from cloud_coordinator.runs.service import RUN_WORDS, RunService
from cloud_coordinator.runs.session import SessionParts, SessionSettings, SuperLinkHandle
from cloud_coordinator.settings import Settings
from cloud_coordinator.supervisor import Supervisor
from cloud_coordinator.trust import api as trust_api
from cloud_coordinator.trust.keys import ROOT_KEY_BESIDE, ROOT_KEY_FILE, load_trust_keys
from cloud_coordinator.trust.repository import TrustRepository
from shared.child import Child
from shared.enrolment import REPLY_PAYLOAD_TYPE, EnrolmentReply
from shared.errors import (
    ConfigError,
    ConflictError,
    DataError,
    IllegalTransitionError,
    NotFoundError,
    PeerError,
    ShoalError,
    UnauthorizedError,
    UnavailableError,
    UnfitModelError,
)
from shared.files import make_folder
from shared.messages import Envelope, Health, Hello, Reported, utc_now
from shared.secure_sum.config import CONFIG_PAYLOAD_TYPE
from shared.signing import seal

logger = logging.getLogger(__name__)

TRUST_FOLDER = "trust"
WORKER = (sys.executable, "-m", "cloud_coordinator.rounds.run_worker")
_RESTART_WINDOW_S = 5.0  # over which agents spread their return after a goodbye
_HOUSEKEEPING_EVERY_S = 300.0
_NAMED_WITHIN = timedelta(minutes=5)  # a blob that a run still means to name is younger
_STATUSES: dict[type[ShoalError], int] = {
    ConfigError: 400,
    PeerError: 400,
    UnauthorizedError: 401,
    NotFoundError: 404,
    ConflictError: 409,
    IllegalTransitionError: 409,
    DataError: 422,
    UnfitModelError: 422,
    UnavailableError: 503,
}

Models = Callable[[Database, BlobStore, Keys, Listing, Path], ModelService]


def _real_models(
    database: Database, blobs: BlobStore, keys: Keys, listing: Listing, home: Path
) -> ModelService:
    return ModelService(database, blobs, keys.model, listing, home)


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts that simulators may stand in for."""

    start_superlink: Callable[..., Awaitable[SuperLinkHandle]] = SuperLink.start
    worker: Sequence[str] = WORKER
    models: Models = _real_models


class Coordinator:
    """All parts, made but not running; `running` brings them to life."""

    def __init__(self, settings: Settings, parts: Parts) -> None:
        """Open keys and database and wire everything.

        Raises:
            ConfigError: a setting, a key file or the database URL is wrong.
            UnavailableError: the database cannot be reached.
        """
        self.settings, self._parts = settings, parts
        home = settings.home
        make_folder(home)
        rng = random.Random()  # noqa: S311  # jitter, no secret
        self.keys = load_keys(home, fleet_key=settings.fleet_key)
        self.database = Database(settings.database_url)
        self.database.migrate()
        self.trust = TrustRepository(
            self.database, load_trust_keys(home / TRUST_FOLDER), clock=utc_now
        )
        self.trust.renew()
        self.listing = Listing(self.database, self.trust)
        self.blobs = BlobStore(home / "blobs")
        self.broker_plan = settings.broker_plan
        self.broker: Supervisor[Child] = Supervisor(
            "broker", partial(start_broker, self.broker_plan, home=home), clock=utc_now, rng=rng
        )
        self.superlink: Supervisor[SuperLinkHandle] = Supervisor(
            "superlink",
            partial(parts.start_superlink, home, public_port=settings.fleet_port),
            clock=utc_now,
            rng=rng,
        )
        self.devices = DeviceService(self.database, clock=utc_now)
        self.enrolment = Enrolment(
            self.database, coordinator_key_id=self.keys.command.public.key_id, clock=utc_now
        )
        self.membership = Membership(
            self.database, fleet=settings.fleet, key=self.keys.fleet, clock=utc_now
        )
        self.models = parts.models(self.database, self.blobs, self.keys, self.listing, home)
        self.link = ControlLink(
            self.broker_plan.url,
            fleet=settings.fleet,
            key=self.keys.command,
            devices=self.devices,
            on_message=self._hear,
            on_connect=self._greet,
            clock=utc_now,
            rng=rng,
            ca_pem=self.broker_plan.ca_pem,
        )
        self.rollouts = RolloutService(self.database, self.models, self.link, clock=utc_now)
        self.records = RunRecords(self.database, clock=utc_now)
        self.steps = StepRecords(self.database, clock=utc_now)
        self.compressions = Compressions(self.steps, self.models)
        self.runs = RunService(
            self.database,
            self.records,
            self.devices,
            self._driver_parts(rng),
            tidy_up=self._tidy_up,
            clock=utc_now,
        )

    @property
    def supervisors(self) -> list[Supervisor[Any]]:
        """Our children; a broker that runs elsewhere is none."""
        ours = self.broker_plan.kind != "external"
        return [self.broker, self.superlink] if ours else [self.superlink]

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Start children and jobs; at the end stop them in the opposite order.

        Raises:
            UnavailableError: a child cannot be started: a port is in use, a program is missing.
        """
        if self.keys.fleet.place == "beside":
            logger.info("%s: %s", self.settings.home / FLEET_KEY_FILE, FLEET_KEY_BESIDE)
        if self.trust.root_key_is_here:
            where = self.settings.home / TRUST_FOLDER / ROOT_KEY_FILE
            logger.info("%s: %s", where, ROOT_KEY_BESIDE)
        await asyncio.to_thread(self.blobs.remove_temporaries)
        await asyncio.to_thread(self._release_served)
        await self.devices.forget_presence()
        try:
            async with asyncio.TaskGroup() as group, contextlib.AsyncExitStack() as jobs:
                for supervisor in self.supervisors:
                    await supervisor.start()
                    jobs.push_async_callback(supervisor.stop)
                    await jobs.enter_async_context(_job(group, supervisor.name, supervisor.run()))
                await jobs.enter_async_context(_job(group, "control-link", self.link.run()))
                jobs.push_async_callback(self.link.say_goodbye, _RESTART_WINDOW_S)
                await jobs.enter_async_context(_job(group, "housekeeping", self._keep_house()))
                await jobs.enter_async_context(_job(group, "rollouts", self.rollouts.run()))
                await jobs.enter_async_context(_job(group, "runs", self.runs.run()))
                yield
        finally:
            self.database.close()

    def api(self) -> FastAPI:
        """Build the REST API over the running parts."""
        app = FastAPI(title="Shoal coordinator", docs_url=None, redoc_url=None)
        state = app.state
        state.clock, state.admin_token = utc_now, self.keys.admin_token
        state.devices, state.enrolment = self.devices, self.enrolment
        state.membership, state.trust = self.membership, self.trust
        state.runs, state.rollouts, state.models = self.runs, self.rollouts, self.models
        state.compressions = self.compressions
        state.catalogue = Catalogue(self.database)
        state.link, state.supervisors = self.link, self.supervisors
        state.seal_reply = self._seal_reply
        for api in (
            health,
            devices_api,
            membership_api,
            runs_api,
            compression_api,
            rollouts_api,
            models_api,
            trust_api,
        ):
            app.include_router(api.router)
        app.include_router(compression_api.reports)
        app.add_exception_handler(ShoalError, _as_response)
        app.add_exception_handler(RequestValidationError, _as_response)
        app.add_exception_handler(HTTPException, _as_response)
        return app

    def _driver_parts(self, rng: random.Random) -> DriverParts:
        settings = self.settings
        return DriverParts(
            session=SessionParts(
                records=self.records,
                devices=self.devices,
                link=self.link,
                start_worker=self._start_worker,
                blobs=settings.home / "blobs",
                scratch=settings.home / "scratch",
                fleet=settings.fleet,
                membership=self.membership,
                sign_config=partial(seal, payload_type=CONFIG_PAYLOAD_TYPE, key=self.keys.command),
                settings=SessionSettings(
                    answer_time=timedelta(seconds=settings.answer_deadline_s),
                    join_time=timedelta(seconds=settings.join_deadline_s),
                    lease_s=settings.lease_s,
                ),
                clock=utc_now,
            ),
            superlink=self.superlink,
            models=self.models,
            compressions=self.compressions,
            rollouts=self.rollouts,
            most_crashes=settings.worker_crashes,
            rng=rng,
        )

    async def _start_worker(self, run_id: str) -> Child:
        return await Child.start(
            self._parts.worker,
            name=f"worker of run {run_id}",
            log_path=self.settings.home / "logs" / f"run-{run_id}.log",
        )

    async def _hear(self, envelope: Envelope) -> None:
        """Take in one message of a device."""
        if isinstance(envelope.body, RUN_WORDS):
            await self.runs.hear(envelope)
        if await self.devices.hear(envelope):
            device = await self.devices.device(envelope.device)
            if isinstance(envelope.body, Hello):
                await self.rollouts.converge(device.device_id)
            self.runs.see(device)
            self.rollouts.see()
        if isinstance(envelope.body, Reported | Health):
            self.rollouts.see()

    async def _greet(self) -> None:
        """After each connect: the broker may have forgotten what was retained."""
        await self.rollouts.say_all()
        self.runs.broker_is_back()

    async def _keep_house(self) -> None:
        """Bound what a long life leaves behind, also while runs go on for days."""
        while True:
            await self.devices.forget_handled()
            await asyncio.to_thread(self._tidy_up, _NAMED_WITHIN)
            await asyncio.to_thread(self.trust.renew)
            await asyncio.sleep(_HOUSEKEEPING_EVERY_S)

    def _tidy_up(self, spare: timedelta = timedelta()) -> None:
        """Remove blobs that nothing needs, but for those younger than ``spare``.

        Nothing need be spared while no run is active.
        """
        began = utc_now() - spare
        protect = self.rollouts.versions_in_use()
        active = {row.run_id for row in self.records.active()}
        self.listing.withdraw_all_but(protect=protect, active=active)
        keep = self.records.blobs_in_use() | self.steps.blobs_in_use()
        keep |= self.models.blobs_to_keep(protect=protect, active=active)
        if removed := self.blobs.collect(keep, before=began):
            logger.info("removed %d blobs that nothing needs any more", removed)

    def _release_served(self) -> None:
        self.listing.release_served(protect=self.rollouts.versions_in_use())

    def _seal_reply(self, device_id: str) -> bytes:
        """Return what a device that joined must know, sealed by the command key."""
        reply = EnrolmentReply(
            device_id=device_id,
            fleet=self.settings.fleet,
            command_key=str(self.keys.command.public),
            model_key=str(self.keys.model.public),
            fleet_key=str(self.keys.fleet.public),
            api_url=self.settings.api_url,
            mqtt_url=self.broker_plan.url,
            mqtt_ca_pem=self.broker_plan.ca_pem,
            superlink_ca_pem=self.superlink.current().ca_pem,
            root_metadata=self.trust.newest_root(),
        )
        content = msgspec.json.encode(reply)
        return seal(content, payload_type=REPLY_PAYLOAD_TYPE, key=self.keys.command)


@contextlib.asynccontextmanager
async def _job(
    group: asyncio.TaskGroup, name: str, work: Coroutine[Any, Any, None]
) -> AsyncIterator[None]:
    """Run ``work`` in ``group``; at the end cancel it and wait until it is gone."""
    task = group.create_task(work, name=name)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})


def _as_response(_request: Request, error: Exception) -> JSONResponse:
    """Turn an error into a status and one sentence."""
    match error:
        case HTTPException():
            return JSONResponse({"error": str(error.detail)}, error.status_code)
        case RequestValidationError():
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            return JSONResponse({"error": f"{where}: {first['msg']}; change it"}, 400)
        case _:
            status = next((s for kind, s in _STATUSES.items() if isinstance(error, kind)), 500)
            if status >= 500:
                logger.error("request failed: %s", error)
            return JSONResponse({"error": str(error)}, status)
