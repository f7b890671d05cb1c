"""Stand-ins for the heavy parts of a coordinator; everything else in these tests is real.

``python -m tests.integration.coordinator.fake_parts HOME REQUESTS`` serves with them.
"""

import hashlib
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from cloud_coordinator.app import Parts
from cloud_coordinator.blobs import BlobStore
from cloud_coordinator.database import Database
from cloud_coordinator.keys import Keys
from cloud_coordinator.models.listing import Listing
from cloud_coordinator.models.pipeline_messages import Calibration
from cloud_coordinator.models.service import ModelService
from cloud_coordinator.models.tables import ModelVersionRow, VariantRow
from cloud_coordinator.serve import run_service
from cloud_coordinator.settings import Settings, load_settings
from shared.child import Child
from shared.errors import ShoalError, UnfitModelError
from shared.logs import configure_logging
from shared.messages import utc_now
from shared.run_plan import RunPlan
from shared.statistics.probes import Probe, ProbeColumn
from tests.integration.coordinator.artifacts import artifact_of

PROBE = Probe(model_sha256="a" * 64, columns=(ProbeColumn("x", "high", 0.0),))
_WAIT_FOR_PARENT = "import sys; sys.stdin.read()"


class FakeSuperLink:
    """A process that does nothing but live, and a registry of node keys."""

    def __init__(self, child: Child) -> None:
        self._child = child
        self._numbers = itertools.count(1)
        self.nodes: dict[str, int] = {}
        self.ca_pem = "-----BEGIN CERTIFICATE-----\n"
        self.secrets_path = Path("/nonexistent")
        self.public_address = "127.0.0.1:1"
        self.private_address = "127.0.0.1:2"

    @classmethod
    async def start(cls, home: Path, *, public_port: int = 0) -> "FakeSuperLink":
        del public_port
        argv = [sys.executable, "-c", _WAIT_FOR_PARENT]
        return cls(await Child.start(argv, name="superlink", log_path=home / "logs" / "fake.log"))

    @property
    def pid(self) -> int:
        return self._child.pid

    async def register_node(self, public_key_pem: str, name: str) -> int:
        del public_key_pem
        return self.nodes.setdefault(name, next(self._numbers))

    async def wait(self) -> int:
        return await self._child.wait()

    async def stop(self) -> None:
        await self._child.stop()


class FakeModels(ModelService):
    """Signs versions without exporting anything."""

    async def make_probe(
        self,
        *,
        plan: RunPlan,
        parameters_sha256: str,
        say: Callable[[str], None],
        student: str = "",
    ) -> Probe:
        del plan, parameters_sha256, say, student
        return PROBE

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
        del student
        say("pretending")
        if plan.name == "unfit":
            raise UnfitModelError("the exported model computes something else")
        answers = calibration.answers if calibration else ()
        artifact = self._blobs.put(artifact_of(_version_of(run_id)))
        with self._database.transaction() as session:
            session.merge(
                ModelVersionRow(
                    run_id=run_id,
                    model=plan.task.name,
                    state="compressed",
                    created_at=utc_now(),
                    rounds=rounds,
                    parameters_sha256=parameters_sha256,
                    parent=parent,
                    built=msgspec.json.encode(answers),
                    variants=[
                        VariantRow(
                            variant="fp32",
                            position=0,
                            shipped=True,
                            passed=True,
                            sha256=artifact,
                            session_config={},
                        )
                    ],
                )
            )

    async def sign(self, run_id: str, plan: RunPlan) -> str:
        del plan
        version = _version_of(run_id)
        with self._database.transaction() as session:
            row = session.get(ModelVersionRow, run_id)
            assert row is not None
            row.version, row.state, row.sealed = version, "signed", b"sealed"
        return version


def _version_of(run_id: str) -> str:
    return hashlib.sha256(run_id.encode()).hexdigest()


def fake_models(
    database: Database, blobs: BlobStore, keys: Keys, listing: Listing, home: Path
) -> FakeModels:
    return FakeModels(database, blobs, keys.model, listing, home)


def fake_parts(requests: Path) -> Parts:
    return Parts(
        start_superlink=FakeSuperLink.start,
        worker=(
            sys.executable,
            "-m",
            "tests.integration.coordinator.fake_worker",
            str(requests),
        ),
        models=fake_models,
    )


def quick_settings(home: Path, **given: Any) -> Settings:
    """Settings with free ports and short patience."""
    patience = {"answer_deadline_s": 5.0, "join_deadline_s": 5.0, "worker_crashes": 3}
    return load_settings(None, home=home, port=0, mqtt_port=0, fleet_port=0, **patience, **given)


def main() -> None:
    home, requests = map(Path, sys.argv[1:3])
    configure_logging("INFO")
    try:
        run_service(quick_settings(home), fake_parts(requests))
    except ShoalError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(1)


if __name__ == "__main__":
    main()
