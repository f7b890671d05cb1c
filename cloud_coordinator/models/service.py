"""From a run's last parameters to a signed version, and everything that is asked about versions.

The heavy work is done by the pipeline child; this module imports neither torch nor onnx. A version
is built in one transaction and signed in another, perhaps much later. A crash before the first
leaves its row a candidate and perhaps some orphaned blobs: building again is all there is to do.
What is built is not built again, and what is signed keeps its name.
"""

import asyncio
import contextlib
import logging
import shutil
from collections.abc import AsyncIterator, Callable, Collection
from datetime import datetime
from pathlib import Path

import msgspec
from sqlalchemy import Select, select, update
from sqlalchemy.orm import Session

from cloud_coordinator.blobs import BlobStore
from cloud_coordinator.database import Database, change_one
from cloud_coordinator.models.descriptions import (
    judged_build,
    manifest_of,
    variant_rows,
    why_none,
)
from cloud_coordinator.models.judgement import Judgement
from cloud_coordinator.models.lifecycle import VersionEvent, VersionState, next_state
from cloud_coordinator.models.listing import KEPT_VERSIONS, Listing, needed, newest_first
from cloud_coordinator.models.pipeline_child import run_pipeline
from cloud_coordinator.models.pipeline_messages import (
    BuildFailed,
    BuildVersion,
    Built,
    Calibration,
    MakeProbe,
    ProbeMade,
    Result,
    ToPipeline,
)
from cloud_coordinator.models.tables import ModelVersionRow, VariantRow
from shared.errors import (
    NotFoundError,
    ShoalError,
    UnavailableError,
    UnfitModelError,
    UntrustedModelError,
)
from shared.files import sha256_of
from shared.messages import utc_now
from shared.parameters import load_parameters
from shared.run_plan import RunPlan
from shared.secure_sum.questions import base_digest_of
from shared.signed_manifest import SignedManifest, sign_manifest
from shared.signing import SigningKey
from shared.statistics.probes import Probe

logger = logging.getLogger(__name__)


class ModelService:
    """The registry of model versions. Its methods block on the database unless they are async."""

    def __init__(
        self,
        database: Database,
        blobs: BlobStore,
        model_key: SigningKey,
        listing: Listing,
        home: Path,
        *,
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        self._database = database
        self._blobs = blobs
        self._key = model_key
        self._listing = listing
        self._folder = home / "models" / "building"
        self._log_path = home / "logs" / "model-pipeline.log"
        self._clock = clock
        self._one_at_a_time = asyncio.Lock()
        self._verified: dict[Path, tuple[int, int]] = {}

    async def build_version(
        self,
        *,
        run_id: str,
        plan: RunPlan,
        parameters_sha256: str,
        rounds: int,
        parent: str | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> str:
        """Build and sign the version of a finished run: `build`, then `sign`; returns its name."""
        await self.build(
            run_id=run_id,
            plan=plan,
            parameters_sha256=parameters_sha256,
            rounds=rounds,
            parent=parent,
            say=say,
        )
        return await self.sign(run_id, plan)

    async def build(
        self,
        *,
        run_id: str,
        plan: RunPlan,
        parameters_sha256: str,
        rounds: int,
        parent: str | None = None,
        student: str = "",
        calibration: Calibration | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Make and measure the variants of a finished run; safe to call again after any crash.

        Args:
            run_id: the run; it has one version at most.
            plan: its plan.
            parameters_sha256: blob of its last committed parameters.
            rounds: how many rounds it committed.
            parent: the version that it started from.
            student: whose parameters they are, of the task's networks; empty: its own.
            calibration: ranges that devices measured; None: no static int8.
            say: told what happens now, for people.

        Raises:
            UnfitModelError: these parameters can become no version; it is rejected for good.
            UntrustedModelError: a file was changed on the disk.
            NotFoundError: there are no such parameters.
            UnavailableError: the pipeline died, took too long, or lacked something; try again.
        """
        async with self._one_at_a_time:  # one torch in memory is enough
            row = await asyncio.to_thread(
                self._candidate,
                ModelVersionRow(
                    run_id=run_id,
                    model=plan.task.name,
                    state=VersionState.CANDIDATE.value,
                    created_at=self._clock(),
                    rounds=rounds,
                    parameters_sha256=parameters_sha256,
                    parent=parent,
                ),
            )
            if row.state == VersionState.REJECTED:
                raise UnfitModelError(row.cause)
            if row.state == VersionState.CANDIDATE:
                await self._build(row, plan, student, calibration, say)

    async def sign(self, run_id: str, plan: RunPlan) -> str:
        """Sign what was built of a run; called again it returns the same name.

        Returns:
            The version: the digest of its manifest.

        Raises:
            NotFoundError: nothing was built of this run.
            IllegalTransitionError: what was built may not be signed.
            ConflictError: somebody else moved it meanwhile.
        """
        return await asyncio.to_thread(self._sign, run_id, plan)

    def versions(self) -> list[ModelVersionRow]:
        """Return all versions, the newest first, with their variants."""
        with self._database.transaction() as session:
            return newest_first(session)

    def version(self, version: str) -> ModelVersionRow:
        """Return one version with its variants; raise NotFoundError for an unknown one."""
        with self._database.transaction() as session:
            return _by_digest(session, version)

    def built_of(self, run_id: str) -> ModelVersionRow:
        """Return what was built of a run, with its variants; raise NotFoundError for nothing."""
        with self._database.transaction() as session:
            return _of_run(session, run_id)

    def current_of(self, model: str) -> ModelVersionRow | None:
        """Return the version of a model that devices should serve, with its variants."""
        with self._database.transaction() as session:
            return next(iter(session.scalars(_current(model))), None)

    def judge(self, run_id: str, judgement: Judgement) -> None:
        """Keep what devices found; variants that failed a gate are never signed.

        Called again after that it changes nothing.

        Raises:
            NotFoundError: nothing was built of this run.
            UnfitModelError: no variant passed; the version is rejected for good.
            IllegalTransitionError: it is not there to be judged.
        """
        with self._database.transaction() as session:
            row = _of_run(session, run_id)
            if row.judgement is None:
                self._judge(session, row, judgement)
            cause = row.cause
        if not judgement.ship:
            raise UnfitModelError(cause)

    def refuse(self, run_id: str, cause: str) -> None:
        """Reject what was built of a run; raises as `judge`."""
        with self._database.transaction() as session:
            row = _of_run(session, run_id)
            if row.state != VersionState.REJECTED:
                _move(session, row, VersionEvent.GATES_FAILED, cause=cause)

    def manifest_bytes(self, version: str) -> bytes:
        """Return the sealed manifest; raise NotFoundError for an unknown version."""
        sealed = self.version(version).sealed
        assert sealed is not None  # a version has its name from the manifest
        return sealed

    def artifact_path(self, sha256: str) -> Path:
        """Return the file of an artifact, checked against its name.

        Raises:
            NotFoundError: no version has this artifact, or it was tidied away with old versions.
            UntrustedModelError: the file was changed, or the disk failed.
        """
        with self._database.transaction() as session:
            known = session.scalar(select(VariantRow).where(VariantRow.sha256 == sha256).limit(1))
        if known is None:  # other blobs are nobody's business
            raise NotFoundError(f"no model version has an artifact {sha256[:12]}")
        path = self._blobs.path_of(sha256)
        self._verify(path, sha256)
        return path

    # What rollouts do to versions, each inside the caller's transaction.

    def begin_rollout(self, session: Session, version: str) -> None:
        """Release a version: its first devices get it.

        Raises:
            NotFoundError: there is no such version, or its files were tidied away.
            IllegalTransitionError: it is not fit to be rolled out.
        """
        row = _by_digest(session, version)
        for variant in row.variants:
            if variant.shipped and variant.sha256 is not None:
                self._blobs.path_of(variant.sha256)
        self._listing.add(session, "released", row)
        _move(session, row, VersionEvent.ROLLOUT_BEGAN)

    def widen_rollout(self, session: Session, version: str) -> None:
        """Note that a version goes beyond its first wave."""
        _move(session, _by_digest(session, version), VersionEvent.ROLLOUT_WIDENED)

    def turn_back(self, session: Session, version: str, cause: str) -> None:
        """Note that a version did not do well, and why."""
        _move(session, _by_digest(session, version), VersionEvent.TURNED_BACK, cause=cause)

    def make_current(self, session: Session, version: str) -> None:
        """Note that devices of a model should serve ``version``; the one before is superseded."""
        row = _by_digest(session, version)
        for other in session.scalars(_current(row.model)).all():
            _move(session, other, VersionEvent.REPLACED)
        _move(session, row, VersionEvent.MADE_CURRENT)

    def blobs_to_keep(
        self, *, protect: Collection[str], active: Collection[str], last: int = KEPT_VERSIONS
    ) -> set[str]:
        """Return the blobs that versions still need; all other artifacts may be collected.

        Args:
            active: runs that have not ended: what is built of them may still be signed.
            protect: versions that some device serves or should serve.
            last: so many of the newest versions of each model are kept besides.
        """
        blobs: set[str] = set()
        for row in needed(self.versions(), protect, active, last):
            blobs.add(row.parameters_sha256)
            blobs.update(v.sha256 for v in row.variants if v.sha256 is not None)
        return blobs

    async def make_probe(
        self,
        *,
        plan: RunPlan,
        parameters_sha256: str,
        say: Callable[[str], None],
        student: str = "",
    ) -> Probe:
        """Return what devices are asked for static int8; the file that it names becomes a blob.

        Arguments and errors are those of `build`; no version changes.
        """
        async with self._one_at_a_time:
            parameters = await self._verified_blob(parameters_sha256)
            order = MakeProbe(
                task=plan.task,
                parameters_path=str(parameters),
                folder=str(self._folder),
                seed=plan.seed,
                student=student,
            )
            async with self._child(order, say) as result:
                if isinstance(result, ProbeMade):
                    await asyncio.to_thread(
                        self._store_file, result.file, result.probe.model_sha256
                    )
                    return result.probe
        assert isinstance(result, BuildFailed)
        raise _error_of(result)

    async def base_digest(self, parameters_sha256: str) -> str:
        """Return by which digest devices know parameters; raises as `build`."""
        path = await self._verified_blob(parameters_sha256)
        return base_digest_of(await asyncio.to_thread(load_parameters, path))

    async def _build(
        self,
        row: ModelVersionRow,
        plan: RunPlan,
        student: str,
        calibration: Calibration | None,
        say: Callable[[str], None],
    ) -> None:
        parameters = await self._verified_blob(row.parameters_sha256)
        order = BuildVersion(
            task=plan.task,
            parameters_path=str(parameters),
            folder=str(self._folder),
            seed=plan.seed,
            student=student,
            calibration=calibration,
        )
        async with self._child(order, say) as result:
            if isinstance(result, Built):
                await asyncio.to_thread(self._store, row, result)
                return
        assert isinstance(result, BuildFailed)
        if result.rejected:
            await asyncio.to_thread(self._reject, row, result)
        raise _error_of(result)

    async def _verified_blob(self, sha256: str) -> Path:
        path = self._blobs.path_of(sha256)
        await asyncio.to_thread(self._verify, path, sha256)
        return path

    @contextlib.asynccontextmanager
    async def _child(self, order: ToPipeline, say: Callable[[str], None]) -> AsyncIterator[Result]:
        """Have a child work in an empty folder, which is there as long as the context."""
        try:
            await asyncio.to_thread(_make_empty, self._folder)
            yield await run_pipeline(order, log_path=self._log_path, say=say)
        finally:
            await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)

    def _candidate(self, fresh: ModelVersionRow) -> ModelVersionRow:
        """Return the run's version row, which is ``fresh`` where there was none."""
        with self._database.transaction() as session:
            row = session.get(ModelVersionRow, fresh.run_id)
            if row is None:
                session.add(fresh)
            return row or fresh

    def _store(self, row: ModelVersionRow, built: Built) -> None:
        """Store the files, then record all that was built in one transaction."""
        for report in built.variants:
            if report.passed:
                self._store_file(report.file, report.sha256)
        with self._database.transaction() as session:
            content = msgspec.json.encode(built)
            _move(session, row, VersionEvent.VARIANTS_BUILT, built=content)
            session.add_all(variant_rows(row.run_id, built.variants, ship=built.ship))
            session.flush()
            built_row = session.get_one(ModelVersionRow, row.run_id)
            self._listing.add(session, "candidates", built_row)

    def _judge(self, session: Session, row: ModelVersionRow, judgement: Judgement) -> None:
        built = judged_build(msgspec.json.decode(row.built or b"", type=Built), judgement)
        reports = {report.variant: report for report in built.variants}
        for variant in row.variants:
            report = reports[variant.variant]
            variant.shipped = variant.variant == built.ship
            variant.passed, variant.cause = report.passed, report.cause
            if not report.passed:
                variant.sha256 = None  # nobody may download it
        session.flush()
        _move(
            session,
            row,
            VersionEvent.JUDGED_FIT if judgement.ship else VersionEvent.GATES_FAILED,
            cause="" if judgement.ship else why_none(judgement),
            built=msgspec.json.encode(built),
            judgement=msgspec.json.encode(judgement),
        )
        session.refresh(row)
        self._listing.add(session, "candidates", row)

    def _sign(self, run_id: str, plan: RunPlan) -> str:
        with self._database.transaction() as session:
            row = _of_run(session, run_id)
            if row.version is not None:
                return row.version
            built = msgspec.json.decode(row.built or b"", type=Built)
            signed = sign_manifest(manifest_of(row, plan, built, now=self._clock()), self._key)
            _move(
                session,
                row,
                VersionEvent.MANIFEST_SIGNED,
                version=signed.version,
                sealed=signed.sealed,
                signed_at=signed.manifest.created_at,
            )
        _log_signed(signed, built)
        return signed.version

    def _reject(self, row: ModelVersionRow, failed: BuildFailed) -> None:
        with self._database.transaction() as session:
            _move(session, row, VersionEvent.BUILD_REFUSED, cause=failed.cause)
            session.add_all(variant_rows(row.run_id, failed.variants, ship=None))
        logger.warning("model version of run %s rejected: %s", row.run_id, failed.cause)

    def _store_file(self, name: str, sha256: str) -> None:
        if self._blobs.put_file(self._folder / name) != sha256:
            raise UntrustedModelError(
                f"{name} is not the file that was checked; look who else writes to "
                f"{self._folder}, then try again"
            )

    def _verify(self, path: Path, sha256: str) -> None:
        """Raise UntrustedModelError unless the blob holds what its name says.

        A file is read once; afterwards its time and size tell whether it is still the same.
        """
        status = path.stat()
        mark = (status.st_mtime_ns, status.st_size)
        if self._verified.get(path) == mark:
            return
        if sha256_of(path) != sha256:
            raise UntrustedModelError(
                f"blob {sha256[:12]} does not hold what its name says; restore {path} from a backup"
            )
        self._verified[path] = mark


def _by_digest(session: Session, version: str) -> ModelVersionRow:
    row = session.scalar(select(ModelVersionRow).where(ModelVersionRow.version == version))
    if row is None:
        raise NotFoundError(
            f"there is no model version {version[:80]!r}; 'shoal model list' shows all of them"
        )
    return row


def _current(model: str) -> Select[ModelVersionRow]:
    return select(ModelVersionRow).where(
        ModelVersionRow.model == model, ModelVersionRow.state == VersionState.CURRENT.value
    )


def _of_run(session: Session, run_id: str) -> ModelVersionRow:
    row = session.get(ModelVersionRow, run_id)
    if row is None or row.built is None:
        raise NotFoundError(f"no model version was built of run {run_id!r}")
    return row


def _move(session: Session, row: ModelVersionRow, event: VersionEvent, **values: object) -> None:
    """Take a version through ``event`` by one compare-and-set, with new ``values`` besides."""
    state = next_state(VersionState(row.state), event)
    change = (
        update(ModelVersionRow)
        .where(ModelVersionRow.run_id == row.run_id, ModelVersionRow.state == row.state)
        .values(state=state.value, **values)
    )
    change_one(session, change, what=f"the model version of run {row.run_id}")


def _error_of(failed: BuildFailed) -> ShoalError:
    """Return what to raise: what these parameters cannot be, or what may be mended."""
    return (UnfitModelError if failed.rejected else UnavailableError)(failed.cause)


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _log_signed(signed: SignedManifest, built: Built) -> None:
    shipped = signed.manifest.shipped
    logger.info(
        "model version %s signed: ships %s of %d bytes, %d of %d variants passed",
        signed.version[:12],
        shipped.variant,
        shipped.size_bytes,
        len(signed.manifest.artifacts),
        len(built.variants),
        extra={"model_version": signed.version},
    )
