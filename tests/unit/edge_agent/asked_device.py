"""One enrolled device with rows of its own, and the coordinator that asks it; used by tests."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from numpy.typing import NDArray

from edge_agent.data_registry import DataRegistry
from edge_agent.local_data import check_data
from edge_agent.secure_sums import SecureSums
from edge_agent.training_app import build_client_app, load_from_home
from shared.secure_sum.config import CONFIG_PAYLOAD_TYPE, SumConfig, encode_config
from shared.signing import seal
from shared.tasks.spec import TaskSpec
from tests.enrolled_homes import EnrolledHomes, enrol_homes

PUMPS = TaskSpec(
    "pumps",
    "tabular",
    {
        "kind": "classification",
        "features": [{"name": "pressure", "minimum": 0, "maximum": 1}],
        "target": "state",
        "labels": ["ok", "failed"],
    },
)
POLICY = "min_cohort = 4\nexact_sums = true\n"
NAMES = tuple(f"edge-{number}" for number in range(6))


class AskedDevice:
    """It has a hundred rows."""

    def __init__(self, home: Path) -> None:
        rows = "\n".join(f"{number / 100},ok" for number in range(100))
        (home / "pumps.csv").write_text(f"pressure,state\n{rows}\n")
        now = datetime(2026, 11, 1, tzinfo=UTC)
        DataRegistry(home).add(check_data("mine", home / "pumps.csv", PUMPS, now=now))
        self.home = home
        others: Mapping[str, Path] = {name: home / name for name in NAMES[1:]}
        self.enrolled: EnrolledHomes = enrol_homes({NAMES[0]: home, **others}, policy=POLICY)
        self.sums = SecureSums(home)
        self.app = build_client_app(load_from_home, sums_of=lambda _: self.sums)

    def ask(self, config: SumConfig | None, text: str, *, model: bytes | None = None) -> Message:
        """Ask for statistics."""
        files = [] if model is None else [model]
        return self._ask("statistics", config, text, ("statistics", "model"), files)

    def ask_to_judge(self, config: SumConfig | None, text: str, files: Sequence[bytes]) -> Message:
        """Ask how good files are."""
        return self._ask("judge", config, text, ("question", "files"), files)

    def _ask(
        self,
        kind: str,
        config: SumConfig | None,
        text: str,
        records: tuple[str, str],
        files: Sequence[bytes],
    ) -> Message:
        content = RecordDict({records[0]: ConfigRecord({"json": text})})
        if files:
            content[records[1]] = ArrayRecord([np.frombuffer(f, np.uint8) for f in files])
        if config is not None:
            key, payload = self.enrolled.command_key, encode_config(config)
            sealed = seal(payload, payload_type=CONFIG_PAYLOAD_TYPE, key=key)
            content["sum"] = ConfigRecord({"config": sealed})
        return self.app(Message(content, 2, f"query.{kind}"), self.context())

    def context(self) -> Context:
        """Return what Flower tells its ClientApp."""
        return Context(
            run_id=1,
            node_id=2,
            node_config={"home": str(self.home), "data": "mine"},
            state=RecordDict(),
            run_config={"task": msgspec.json.encode(PUMPS).decode()},
        )

    def train_inputs(self) -> NDArray[np.float32]:
        """Return the inputs it trains on, shape (n, 1)."""
        inputs: NDArray[np.float32] = load_from_home(self.context()).train.inputs
        return inputs
