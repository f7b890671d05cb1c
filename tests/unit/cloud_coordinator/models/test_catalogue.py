"""What the registry says of versions: found, described, compared, noted."""

import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cloud_coordinator.database import Database
from cloud_coordinator.devices.tables import DeviceRow, JoinTokenRow
from cloud_coordinator.migrations.tables import METADATA
from cloud_coordinator.models.card import model_card, privacy_sentence
from cloud_coordinator.models.catalogue import Catalogue, PrivacySpent
from cloud_coordinator.models.tables import ModelVersionRow, VariantRow
from cloud_coordinator.runs.tables import ParticipationRow, RoundRow, RunRow
from shared.errors import NotFoundError
from shared.run_plan import RunPlan, TrainingPlan
from shared.secure_sum.accounting import gaussian_rdp
from shared.tasks.spec import TaskSpec

NOW = datetime(2026, 3, 1, tzinfo=UTC)
OLD, NEW, OTHER = "a" * 64, "b" * 64, "c" * 64
NOISY = {"noise": "distributed", "noise_multiplier": 2.0, "delta": 1e-6}


def plan(**changed: Any) -> RunPlan:
    return RunPlan(name="nightly", task=TaskSpec("fashion", "image-classification"), **changed)


def add_version(
    database: Database,
    version: str,
    *,
    run_id: str,
    state: str = "signed",
    model: str = "fashion",
    age_days: int = 0,
    of: RunPlan | None = None,
    secrecy: dict[str, Any] | None = None,
    abandoned: bool = False,
) -> None:
    """Record a version of two rounds: ``a`` and ``b`` replied in each, ``c`` did not."""
    of = of or plan()
    with database.transaction() as session:
        if session.get(JoinTokenRow, "t") is None:
            when = {"created_at": NOW, "expires_at": NOW}
            session.add(JoinTokenRow(token_id="t", secret_hash="h", uses_left=0, **when))
            session.flush()
            for name in "abc":
                keys = {"identity_key": name, "node_key_pem": name}
                session.add(DeviceRow(device_id=name, token_id="t", enrolled_at=NOW, **keys))
        session.add(
            RunRow(
                run_id=run_id,
                name=of.name,
                state="finished",
                plan=msgspec.to_builtins(of),
                plan_digest=of.digest,
                created_at=NOW,
            )
        )
        session.flush()
        states = ["committed", "committed", "abandoned" if abandoned else "committed"]
        for number, state_of_round in enumerate(states):
            trained = number > 0 and state_of_round == "committed"
            session.add(
                RoundRow(
                    run_id=run_id,
                    round_number=number,
                    state=state_of_round,
                    started_at=NOW,
                    closed_at=NOW,
                    metrics={"accuracy": 0.1 + number / 10}
                    if state_of_round == "committed"
                    else {},
                    training_sums={"examples": 40.0 * number} if trained else {},
                    secrecy=secrecy if trained else None,
                )
            )
            session.flush()
            for device, outcome in (("a", "replied"), ("b", "replied"), ("c", "dropped")):
                if trained:
                    session.add(
                        ParticipationRow(
                            run_id=run_id, round_number=number, device_id=device, outcome=outcome
                        )
                    )
        session.add(
            ModelVersionRow(
                run_id=run_id,
                version=version,
                model=model,
                state=state,
                created_at=NOW - timedelta(days=age_days),
                rounds=2,
                parameters_sha256="0" * 64,
                sealed=b"{}",
                variants=[
                    VariantRow(
                        variant="fp32",
                        position=0,
                        shipped=True,
                        passed=True,
                        size_bytes=1234,
                        latency_p50_us=45.0,
                        session_config={},
                    )
                ],
            )
        )


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path / 'shoal.db'}")
    with database.connection() as connection:
        METADATA.create_all(connection)
    yield database
    database.close()


@pytest.fixture
def catalogue(database: Database) -> Catalogue:
    return Catalogue(database, clock=lambda: NOW)


def found(catalogue: Catalogue, **wanted: str) -> list[str | None]:
    return [row.version for row in catalogue.search(**wanted)]


def test_versions_are_found_by_model_state_digest_run_and_note(
    database: Database, catalogue: Catalogue
) -> None:
    add_version(database, OLD, run_id="winter-1", age_days=2, state="superseded")
    add_version(database, NEW, run_id="spring-1", age_days=1, state="current")
    add_version(database, OTHER, run_id="pumps-1", age_days=3, model="pumps")
    catalogue.add_note(OLD, author="ada", text="100% of the Clinic's cameras")

    assert found(catalogue) == [NEW, OLD, OTHER]
    assert found(catalogue, model="pumps") == [OTHER]
    assert found(catalogue, state="current", model="fashion") == [NEW]
    assert found(catalogue, text="aaaa") == [OLD]
    assert found(catalogue, text="SPRING") == [NEW]
    assert found(catalogue, text="clinic's") == [OLD]
    assert found(catalogue, text="100%") == [OLD]
    assert found(catalogue, text="%") == [OLD]  # a sign, no wildcard
    assert found(catalogue, text="aaaa", model="pumps") == []


def test_facts_are_those_of_committed_rounds(database: Database, catalogue: Catalogue) -> None:
    add_version(database, OLD, run_id="run-1", abandoned=True)
    facts = catalogue.facts(OLD)
    assert facts.examples == 40
    assert facts.metrics == {"accuracy": 0.2}
    assert facts.devices == 2
    assert facts.plan_digest == plan().digest
    assert facts.privacy.mode == "plain"


def test_privacy_is_added_up_over_the_sums_of_all_rounds(
    database: Database, catalogue: Catalogue
) -> None:
    add_version(database, NEW, run_id="run-1", secrecy=NOISY)
    spent = catalogue.facts(NEW).privacy
    assert (spent.mode, spent.noise, spent.rounds) == ("secure", "distributed", 2)
    assert spent.epsilon == gaussian_rdp(2.0).times(2).epsilon(1e-6)


def test_exact_sums_promise_no_bound(database: Database, catalogue: Catalogue) -> None:
    exact = {"noise": "none", "noise_multiplier": None, "delta": None}
    add_version(database, NEW, run_id="run-1", secrecy=exact)
    assert catalogue.facts(NEW).privacy == PrivacySpent(
        mode="secure", noise="none", epsilon=None, delta=None, rounds=2
    )


@pytest.mark.parametrize(
    ("privacy", "sentence"),
    [
        (PrivacySpent(mode="plain", noise="none", epsilon=None, delta=None, rounds=0), "saw the"),
        (PrivacySpent(mode="secure", noise="none", epsilon=None, delta=None, rounds=2), "no ε is"),
        (
            PrivacySpent(mode="secure", noise="distributed", epsilon=3.14159, delta=1e-6, rounds=2),
            "ε = 3.14 at δ = 1e-06 .* all 2 rounds, enforced by the devices",
        ),
        (
            PrivacySpent(mode="secure", noise="central", epsilon=1, delta=1e-6, rounds=2),
            "promised by the coordinator",
        ),
    ],
)
def test_the_card_says_what_privacy_it_cost(privacy: PrivacySpent, sentence: str) -> None:
    assert re.search(sentence, privacy_sentence(privacy))


def test_the_card_is_made_of_what_is_known(database: Database, catalogue: Catalogue) -> None:
    add_version(database, NEW, run_id="run-1", secrecy=NOISY)
    catalogue.add_note(NEW, author="ada", text="first line\nsecond | line")
    card = model_card(catalogue.facts(NEW))
    assert card.startswith(f"# fashion, version {NEW[:12]}\n")
    assert "| rows, last round | 80 |" in card
    assert "| accuracy | 0.3000 |" in card
    assert "| fp32 | 1,234 | 45 | – | shipped |" in card
    assert "- 2026-03-01 00:00, ada: first line second \\| line" in card
    assert "| epochs | 1 |" in card


def test_two_versions_are_compared_by_what_differs_in_their_plans(
    database: Database, catalogue: Catalogue
) -> None:
    add_version(database, OLD, run_id="run-1")
    changed = plan(seed=3, training=TrainingPlan(epochs=5))
    add_version(database, NEW, run_id="run-2", of=changed)
    comparison = catalogue.compare(OLD, NEW)
    assert comparison.plan == {"seed": (0, 3), "training.epochs": (1, 5)}
    assert (comparison.first.version, comparison.second.version) == (OLD, NEW)


def test_an_unknown_version_has_no_facts_and_takes_no_notes(catalogue: Catalogue) -> None:
    for ask in (
        lambda: catalogue.facts(OLD),
        lambda: catalogue.compare(OLD, OLD),
        lambda: catalogue.add_note(OLD, author="ada", text="lost"),
    ):
        with pytest.raises(NotFoundError, match="shoal model list"):
            ask()
