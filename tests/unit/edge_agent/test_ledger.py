"""What each data set gave away: accounts, arithmetic, and a disk that may fail."""

import contextlib
import itertools
import os
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.privacy.ledger import Charge, book, check_affordable, curve_spent, reset
from edge_agent.privacy.lifecycle import TERMINAL, TRANSITIONS, SumEvent, SumState, next_state
from edge_agent.privacy.policy import OwnerPolicy
from edge_agent.privacy.records import SumRecords, charge_for
from edge_agent.privacy.sources import DataUse, source_of
from edge_agent.privacy.store import Holder, PrivacyStore, forget_dead_holders, is_alive
from shared.errors import IllegalTransitionError, PolicyError, UnavailableError
from shared.secure_sum.accounting import RdpCurve, charge_of
from shared.secure_sum.config import Noise
from tests.unit.edge_agent.sum_fleet import config_of, noised_config_of

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)
TRAIN = DataUse("source-1", "train", "d" * 64)
HELD_OUT = DataUse("source-1", "held-out", "d" * 64)
ROOT = Path(__file__).parents[3]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[PrivacyStore]:
    with PrivacyStore(tmp_path) as opened:
        yield opened


def pay(store: PrivacyStore, policy: OwnerPolicy, charge: Charge, data: DataUse = TRAIN) -> None:
    with store.transaction() as connection:
        check_affordable(connection, policy, data, charge)
        book(connection, data, charge, NOW)


def noised() -> Charge:
    return charge_for(noised_config_of())


def exact() -> Charge:
    return charge_for(config_of())


def spent(store: PrivacyStore, data: DataUse = TRAIN) -> RdpCurve:
    with store.transaction() as connection:
        return curve_spent(connection, data.data_id, data.part)


# --- arithmetic ----------------------------------------------------------------------------------


def test_charges_add_up_as_the_accounting_says(store: PrivacyStore) -> None:
    policy = OwnerPolicy(epsilon=1000)
    other = noised_config_of(noise=Noise(multiplier=3.0, survivors=2))
    for _ in range(3):
        pay(store, policy, noised())
    pay(store, policy, charge_for(other))
    total = charge_of(noised_config_of()).times(3) + charge_of(other)
    assert spent(store).epsilon(1e-6) == pytest.approx(total.epsilon(1e-6))


@pytest.mark.parametrize("count", [1, 3, 7])
def test_a_budget_is_spent_to_its_end_and_not_beyond(store: PrivacyStore, count: int) -> None:
    budget = charge_of(noised_config_of()).times(count).epsilon(1e-5)
    policy = OwnerPolicy(epsilon=budget, delta=1e-5)
    for _ in range(count):
        pay(store, policy, noised())
    with pytest.raises(
        PolicyError, match=r"epsilon = .* with this sum .* would be spent"
    ) as caught:
        pay(store, policy, noised())
    assert "\n" not in str(caught.value)
    assert spent(store).epsilon(1e-5) == pytest.approx(budget)


def test_a_budget_of_nothing_allows_no_noised_sum(store: PrivacyStore) -> None:
    with pytest.raises(PolicyError, match="epsilon = 0"):
        pay(store, OwnerPolicy(epsilon=0), noised())


def test_exact_sums_are_counted_for_each_version_of_the_data(store: PrivacyStore) -> None:
    policy = OwnerPolicy(exact_sums=True, max_exact_sums=2)
    later = DataUse(TRAIN.data_id, TRAIN.part, "e" * 64)
    for data in (TRAIN, TRAIN, later, later, HELD_OUT):
        pay(store, policy, exact(), data)
    for data in (TRAIN, later):
        with pytest.raises(PolicyError, match="max_exact_sums = 2"):
            pay(store, policy, exact(), data)


def test_exact_sums_spend_none_of_the_budget_for_noised_ones(store: PrivacyStore) -> None:
    policy = OwnerPolicy(exact_sums=True, epsilon=charge_of(noised_config_of()).epsilon(1e-6))
    pay(store, policy, exact())
    pay(store, policy, noised())


def test_training_rows_and_held_out_rows_have_an_account_each(store: PrivacyStore) -> None:
    pay(store, OwnerPolicy(epsilon=1000), noised())
    assert spent(store, TRAIN).epsilon(1e-6) > 0
    assert spent(store, HELD_OUT) == RdpCurve.nothing()


def test_only_a_reset_begins_an_account_anew(store: PrivacyStore) -> None:
    policy = OwnerPolicy(exact_sums=True, max_exact_sums=1, epsilon=1000)
    pay(store, policy, exact())
    pay(store, policy, noised())
    with store.transaction() as connection:
        assert reset(connection, TRAIN.data_id, NOW) == 2
    assert spent(store) == RdpCurve.nothing()
    pay(store, policy, exact())


@settings(max_examples=20)
@given(paid=st.lists(st.tuples(st.sampled_from([1.0, 2.0, 5.0]), st.integers(1, 4)), max_size=4))
def test_the_order_of_charges_does_not_matter(
    tmp_path_factory: pytest.TempPathFactory, paid: list[tuple[float, int]]
) -> None:
    totals = []
    for order in (paid, paid[::-1]):
        with PrivacyStore(tmp_path_factory.mktemp("home")) as store:
            for multiplier, count in order:
                noise = Noise(multiplier=multiplier, survivors=2)
                for _ in range(count):
                    config = noised_config_of(noise=noise)
                    pay(store, OwnerPolicy(epsilon=1_000_000), charge_for(config))
            totals.append(spent(store).epsilon(1e-6))
    assert totals[0] == pytest.approx(totals[1])


# --- accounts ------------------------------------------------------------------------------------


def account(store: PrivacyStore, name: str, path: str, digest: str) -> str:
    with store.transaction() as connection:
        return source_of(connection, name=name, path=path, digest=digest)


def test_an_account_survives_renaming_removing_copying_and_growing(store: PrivacyStore) -> None:
    first = account(store, "pumps", "/data/a.csv", "1" * 64)
    assert account(store, "pumps-of-2026", "/data/a.csv", "1" * 64) == first
    assert account(store, "pumps", "/data/a.csv", "2" * 64) == first  # rows were added
    assert account(store, "pumps", "/data/copy.csv", "2" * 64) == first
    assert account(store, "pumps", "/data/copy.csv", "3" * 64) == first
    assert account(store, "pumps", "/data/other.csv", "4" * 64) != first  # only the name is old


def test_data_in_no_file_are_known_by_their_rows_alone(store: PrivacyStore) -> None:
    assert account(store, "a", "", "1" * 64) != account(store, "b", "", "2" * 64)


def test_two_accounts_that_turn_out_to_be_one_source_become_one(store: PrivacyStore) -> None:
    policy = OwnerPolicy(epsilon=1000)
    first = account(store, "a", "/data/a.csv", "1" * 64)
    second = account(store, "b", "/data/b.csv", "2" * 64)
    for data_id in (first, second):
        pay(store, policy, noised(), DataUse(data_id, "train", "1" * 64))
    one = account(store, "b", "/data/b.csv", "1" * 64)  # b is now a copy of a
    assert account(store, "a", "/data/a.csv", "3" * 64) == one
    assert spent(store, DataUse(one, "train", "")) == charge_of(noised_config_of()).times(2)


# --- the file ------------------------------------------------------------------------------------


def test_the_file_is_the_owners_alone_and_durable_at_each_commit(
    tmp_path: Path, store: PrivacyStore
) -> None:
    pay(store, OwnerPolicy(epsilon=1000), noised())
    for path in tmp_path.glob("privacy.db*"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    with store.transaction() as connection:
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_full_disk_books_nothing_and_says_what_to_do(store: PrivacyStore) -> None:
    with store.transaction() as connection:
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
    store._connection.execute(f"PRAGMA max_page_count = {pages}")

    def pay_often() -> None:
        for _ in range(200):
            pay(store, OwnerPolicy(epsilon=1_000_000), noised())

    with pytest.raises(UnavailableError, match="disk is full; free some disk space"):
        pay_often()
    store._connection.execute("PRAGMA max_page_count = 1000000")
    before = spent(store)
    pay(store, OwnerPolicy(epsilon=1_000_000), noised())  # as if nothing had been
    assert spent(store).epsilon(1e-6) > before.epsilon(1e-6)


def test_a_damaged_ledger_is_not_silently_begun_anew(tmp_path: Path) -> None:
    (tmp_path / "privacy.db").write_bytes(b"not a database, whatever its name" * 100)
    with pytest.raises(UnavailableError, match=r"damaged.* restore it from a backup"):
        PrivacyStore(tmp_path)


def test_a_ledger_of_a_newer_agent_is_left_alone(tmp_path: Path, store: PrivacyStore) -> None:
    with store.transaction() as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(UnavailableError, match="written by a newer shoal-agent"):
        PrivacyStore(tmp_path)


def test_what_raises_inside_a_transaction_leaves_no_trace(store: PrivacyStore) -> None:

    def fail_after_booking() -> None:
        with store.transaction() as connection:
            book(connection, TRAIN, noised(), NOW)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_after_booking()
    assert spent(store) == RdpCurve.nothing()


_PAYS_WHILE_IT_CAN = """
import sys
from pathlib import Path
from edge_agent.privacy.policy import OwnerPolicy
from edge_agent.privacy.store import PrivacyStore
from shared.errors import PolicyError
from tests.unit.edge_agent.test_ledger import exact, pay
paid = 0
with PrivacyStore(Path(sys.argv[1])) as store:
    try:
        while True:
            pay(store, OwnerPolicy(exact_sums=True, max_exact_sums=60), exact())
            paid += 1
    except PolicyError:
        print(paid)
"""


def test_processes_that_pay_at_once_never_spend_more_than_there_is(tmp_path: Path) -> None:
    children = [
        subprocess.Popen(
            [sys.executable, "-c", _PAYS_WHILE_IT_CAN, str(tmp_path)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    paid = [int(child.communicate(timeout=60)[0]) for child in children]
    assert sum(paid) == 60
    with PrivacyStore(tmp_path) as store, store.transaction() as connection:
        assert connection.execute("SELECT COUNT(*) FROM charges").fetchone() == (60,)


def test_threads_that_pay_at_once_never_spend_more_than_there_is(store: PrivacyStore) -> None:
    policy = OwnerPolicy(exact_sums=True, max_exact_sums=20)
    paid = itertools.count()

    def work() -> None:
        try:
            while True:
                pay(store, policy, exact())
                next(paid)
        except PolicyError:
            pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert next(paid) == 20


def test_a_holder_is_alive_until_its_process_is_not(tmp_path: Path) -> None:
    holder = Holder(tmp_path)
    assert is_alive(tmp_path, holder.name)
    os.close(holder._descriptor)  # what the kernel does when a process ends
    assert not is_alive(tmp_path, holder.name)
    living = Holder(tmp_path)
    forget_dead_holders(tmp_path)
    assert [path.name for path in (tmp_path / "privacy-holders").iterdir()] == [living.name]
    living.close()
    assert not is_alive(tmp_path, living.name)


# --- the lifecycle -------------------------------------------------------------------------------


@pytest.mark.parametrize("state", SumState)
@pytest.mark.parametrize("event", SumEvent)
def test_every_pair_of_state_and_event_is_decided(state: SumState, event: SumEvent) -> None:
    if event in TRANSITIONS[state]:
        assert next_state(state, event) is TRANSITIONS[state][event]
    else:
        with pytest.raises(IllegalTransitionError, match=f"a sum that is {state}"):
            next_state(state, event)


def test_a_session_ends_in_one_of_four_ways() -> None:
    assert {SumState.REVEALED, SumState.REFUSED, SumState.LOST, SumState.EXPIRED} == TERMINAL


def rows(store: PrivacyStore, query: str) -> list[Any]:
    with store.transaction() as connection:
        return connection.execute(query).fetchall()


def test_a_session_is_charged_once(store: PrivacyStore) -> None:
    charge = noised()
    pay(store, OwnerPolicy(epsilon=1000), charge)
    with pytest.raises(sqlite3.IntegrityError):  # our own bug, and no damaged file
        pay(store, OwnerPolicy(epsilon=1000), charge)
    assert rows(store, "SELECT COUNT(*) FROM charges") == [(1,)]


def test_sessions_that_are_long_over_are_forgotten_and_open_ones_are_not(tmp_path: Path) -> None:
    ended, running = config_of(session=b"e" * 32), config_of(session=b"r" * 32)
    with contextlib.closing(SumRecords(tmp_path, now=lambda: NOW)) as records:
        for each in (ended, running):
            records.open(each, bytes(32), TRAIN, OwnerPolicy(exact_sums=True))
        records.end(ended.session, SumEvent.REFUSAL, "for a test")
        later = NOW + timedelta(days=31)
        with contextlib.closing(SumRecords(tmp_path, now=lambda: later)) as again:
            assert again.known(ended.session) is None
            assert again.known(running.session) is not None
