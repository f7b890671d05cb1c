"""The agent daemon: its parts, wired, and every long-lived job side by side."""

import asyncio
import contextlib
import importlib.metadata
import logging
import os
import random
import signal
import uuid
from functools import partial

import msgspec

from edge_agent.choice import Choices, read_profile
from edge_agent.control_link import ControlLink
from edge_agent.data_registry import DataRegistry
from edge_agent.deployment import Deployment
from edge_agent.enrolment import Enrolment
from edge_agent.fetcher import CoordinatorFetcher
from edge_agent.inbox import Inbox
from edge_agent.inference.supervisor import InferenceServer
from edge_agent.outbox import Outbox
from edge_agent.participation import Participation
from edge_agent.reconcile import Reconciler
from edge_agent.settings import AgentSettings
from edge_agent.state import AgentState
from edge_agent.status import Snapshot, save_snapshot
from edge_agent.telemetry import (
    count_cpus,
    cpu_percent,
    free_disk_bytes,
    read_accelerator,
    read_cpu_times,
    read_memory,
)
from edge_agent.trusted_models import TrustedModels
from shared.errors import DataError, ShoalError, UnavailableError
from shared.messages import (
    OLDEST_PROTOCOL_VERSION,
    PROTOCOL_VERSION,
    DeploymentState,
    Desired,
    DismissFromRun,
    Envelope,
    Failure,
    Health,
    Hello,
    Invitation,
    Notice,
    Nudge,
    Reported,
    ServedFigures,
    SumQuestion,
    Telemetry,
    as_text,
    utc_now,
)

logger = logging.getLogger(__name__)

_WATCH_EVERY_S = 1.0  # the owner's data registry, what is served, the status snapshot
_MAX_TASKS = 200  # named in a hello, which has to fit into one message
_FAREWELL_S = 12.0  # for the trainer to leave its run and for the goodbye


class Agent:
    """One life of the daemon."""

    def __init__(
        self,
        settings: AgentSettings,
        enrolment: Enrolment,
        state: AgentState,
        *,
        rng: random.Random,
    ) -> None:
        """Wire the parts; nothing runs before `run`.

        Args:
            settings: of this life.
            enrolment: who we are and whom we trust.
            state: the open database of the agent's home.
            rng: draws all jitter.

        Raises:
            UnavailableError: the inference port is in use.
        """
        self._settings, self._enrolment, self._state = settings, enrolment, state
        self._boot = uuid.uuid4().hex
        self._cause = ""  # why the last deployment failed
        self._failure: Failure = ""
        self._health_due = 0.0  # by the loop's clock
        self._trouble: dict[str, str] = {}  # what was complained about last, so as not to repeat it
        self._told: Reported | None = None
        self._data = DataRegistry(settings.home)
        self._outbox = Outbox(state)
        self._server = InferenceServer(
            settings.home,
            settings.inference_host,
            settings.inference_port,
            rng=rng,
            grpc_port=settings.grpc_port,
            on_loss=self._note_loss,
        )
        self._link = ControlLink(
            enrolment,
            boot=self._boot,
            outbox=self._outbox,
            inbox=Inbox(state),
            hello=self._hello,
            reported=self._reported,
            receive=self._receive,
            now=utc_now,
            rng=rng,
        )
        self._participation = Participation(
            home=settings.home,
            node_key_path=enrolment.node_key_path,
            superlink_ca_pem=enrolment.superlink_ca_pem,
            data=self._data,
            send=self._link.send,
        )
        self._deployment = Deployment(
            settings.home,
            enrolment.model_keys,
            self._server,
            TrustedModels(
                settings.home,
                enrolment.api_url,
                enrolment.root,
                partial(
                    CoordinatorFetcher,
                    enrolment.api_url,
                    device=enrolment.device_id,
                    key=enrolment.key,
                    rng=rng,
                ),
            ),
            self._note_deployment,
            choices=Choices(settings.home, read_profile(largest_bytes=settings.model_slot_bytes)),
        )
        self._reconciler = Reconciler(state, converge=self._deployment.converge, rng=rng)

    async def run(self, stop: asyncio.Event) -> None:
        """Run all jobs until ``stop`` is set; if one fails, cancel the others and raise."""
        jobs = {
            "control-link": self._link.run,
            "participation": self._participation.run,
            "inference-server": self._server.run,
            "deployment": self._deploy,
            "telemetry": self._report_telemetry,
            "watch": self._watch,
        }
        logger.info("agent %s starts, boot %s", self._enrolment.device_id, self._boot[:8])
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(job(), name=name) for name, job in jobs.items()]
            await stop.wait()
            await self._take_leave()
            for task in tasks:
                task.cancel()
        logger.info("agent %s stopped", self._enrolment.device_id)

    async def _take_leave(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FAREWELL_S):
                await self._participation.stop_training("the agent was stopped").wait()
                await self._link.say_goodbye()

    async def _receive(self, envelope: Envelope) -> None:
        match envelope.body:
            case Invitation() as invitation:
                self._participation.invite(invitation, message_id=envelope.id)
            case Nudge() as nudge:
                self._participation.nudge(nudge)
            case SumQuestion() as question:
                self._participation.ask(question, message_id=envelope.id)
            case DismissFromRun() as dismissal:
                self._participation.dismiss(dismissal)
            case Notice(kind="stop-training"):
                self._participation.stop_training("the coordinator asked all to stop training")
            case Desired() as desired:
                if self._reconciler.accept(desired):
                    await self._tell_what_changed()

    async def _deploy(self) -> None:
        await self._deployment.restore()
        await self._reconciler.run()

    async def _note_deployment(self, state: DeploymentState, cause: str, failure: Failure) -> None:
        logger.debug("deployment: %s", state)
        self._cause, self._failure = cause, failure
        self._health_due = 0.0  # whoever watches shall not wait for it
        await self._tell_what_changed()

    def _note_loss(self) -> None:
        """The inference server has lost its model for good; fetch what is wanted once more."""
        self._reconciler.check_again()

    async def _tell_what_changed(self) -> None:
        reported = self._reported()
        if reported != self._told:
            self._told = reported
            await self._link.send(reported)

    async def _watch(self) -> None:
        """Notice what no event tells: data added by a command, a server that came or went."""
        tasks = self._task_names()
        snapshot: Snapshot | None = None
        while True:
            if (now_tasks := self._task_names()) != tasks:
                tasks = now_tasks
                await self._link.say_hello()
            await self._tell_what_changed()
            await self._tell_health()
            if (now_snapshot := self._snapshot()) != snapshot:
                snapshot = now_snapshot
                self._save(snapshot)
            await asyncio.sleep(_WATCH_EVERY_S)

    async def _tell_health(self) -> None:
        """Say how the model is served, as often as the coordinator wants to know."""
        watch_s, now = self._reconciler.wanted.watch_s, asyncio.get_running_loop().time()
        if watch_s <= 0 or now < self._health_due:
            return
        self._health_due = now + watch_s
        serving = self._server.serving
        before = serving.figures_before
        await self._link.send(
            Health(
                boot=self._boot,
                served=self._timed(serving.figures) if serving.version else None,
                before=self._timed(before),
            )
        )

    def _timed(self, figures: ServedFigures | None) -> ServedFigures | None:
        if figures is None:
            return None
        self_test_ms = self._deployment.self_test_ms.get(figures.version)
        return msgspec.structs.replace(figures, self_test_ms=self_test_ms)

    async def _report_telemetry(self) -> None:
        seq, before = 0, read_cpu_times()
        while True:
            await asyncio.sleep(self._settings.telemetry_interval_s)
            seq, after, serving = seq + 1, read_cpu_times(), self._server.serving
            await self._link.send(
                Telemetry(
                    boot=self._boot,
                    seq=seq,
                    cpu_percent=cpu_percent(before, after),
                    memory_bytes=read_memory().used,
                    disk_free_bytes=free_disk_bytes(self._settings.home),
                    requests=serving.requests,
                    request_errors=serving.errors,
                    latency_p50_ms=serving.p50_ms,
                )
            )
            before = after

    def _hello(self) -> Hello:
        return Hello(
            boot=self._boot,
            agent_version=importlib.metadata.version("shoal"),
            protocol_min=OLDEST_PROTOCOL_VERSION,
            protocol_max=PROTOCOL_VERSION,
            cpu_count=count_cpus(),
            memory_bytes=read_memory().total,
            accelerator=read_accelerator(),
            tasks=self._task_names(),
            outbox_depth=len(self._outbox),
        )

    def _reported(self) -> Reported:
        serving = self._server.serving
        return Reported(
            boot=self._boot,
            desired_version=self._reconciler.wanted.version,
            deployment=self._deployment.state,
            serving_version=serving.version,
            serving_artifact=serving.artifact,
            variant=serving.variant,
            cause=as_text(self._cause),
            failure=self._failure,
        )

    def _snapshot(self) -> Snapshot:
        reported = self._reported()
        return Snapshot(
            pid=os.getpid(),
            online=self._link.online,
            doing=self._participation.doing,
            desired_version=reported.desired_version,
            deployment=reported.deployment,
            serving_version=reported.serving_version,
            serving_artifact=reported.serving_artifact,
            variant=reported.variant,
            inference_address=self._server.serving.address,
            grpc_address=self._server.serving.grpc_address,
            labelled=self._server.serving.labelled,
            correct=self._server.serving.correct,
            cause=reported.cause,
            outbox_depth=len(self._outbox),
            refused_messages=self._link.refused,
        )

    def _save(self, snapshot: Snapshot) -> None:
        """Keep the snapshot; a full disk must not end a daemon that serves."""
        try:
            save_snapshot(self._state, snapshot)
        except UnavailableError as error:
            self._complain("snapshot", error)

    def _task_names(self) -> tuple[str, ...]:
        """Return the tasks that the owner gave data to; none while the registry is damaged."""
        try:
            entries = self._data.entries()
        except DataError as error:
            self._complain("data", error)
            return ()
        return tuple(sorted({entry.task.name for entry in entries}))[:_MAX_TASKS]

    def _complain(self, about: str, error: ShoalError) -> None:
        if self._trouble.get(about) != str(error):
            self._trouble[about] = str(error)
            logger.error("%s", error)


async def run_agent(settings: AgentSettings, enrolment: Enrolment, state: AgentState) -> None:
    """Run the daemon until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    rng = random.Random()  # noqa: S311 - jitter, not a secret
    await Agent(settings, enrolment, state, rng=rng).run(stop)
