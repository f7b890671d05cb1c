"""The durable side of secure sums: one transaction for each step that must never half happen."""

from collections.abc import Callable, Collection
from datetime import datetime
from pathlib import Path

from edge_agent.privacy.ledger import Charge, book, check_affordable
from edge_agent.privacy.lifecycle import TERMINAL, SumEvent
from edge_agent.privacy.policy import OwnerPolicy
from edge_agent.privacy.session_log import (
    KnownSession,
    advance,
    check_round,
    check_unspent,
    end_orphans,
    forget_old_sessions,
    known_session,
    note_round,
    note_survivors,
    open_session,
    spend,
)
from edge_agent.privacy.sources import DataUse, source_of
from edge_agent.privacy.store import Holder, PrivacyStore, forget_dead_holders, is_alive
from shared.secure_sum.accounting import charge_of
from shared.secure_sum.config import SumConfig


class SumRecords:
    """What one process writes down. Every method raises UnavailableError where the disk refuses."""

    def __init__(self, home: Path, *, now: Callable[[], datetime]) -> None:
        """Open the home's database, end what dead processes left open, forget what is long over."""
        self._now = now
        self._store = PrivacyStore(home)
        try:
            with self._store.transaction() as connection:
                forget_dead_holders(home)
                self._holder = Holder(home)
                end_orphans(connection, lambda holder: is_alive(home, holder), now=now())
                forget_old_sessions(connection, now=now())
        except BaseException:
            self._store.close()
            raise

    def close(self) -> None:
        """Let go of the files."""
        self._holder.close()
        self._store.close()

    def identify(self, *, name: str, path: str, digest: str) -> str:
        """Return the stored id of a data source; see `source_of`."""
        with self._store.transaction(durable=False) as connection:
            return source_of(connection, name=name, path=path, digest=digest)

    def known(self, session: bytes) -> KnownSession | None:
        """Return what is known of a session, by whichever process."""
        with self._store.transaction(durable=False) as connection:
            return known_session(connection, session)

    def open(
        self, config: SumConfig, config_digest: bytes, data: DataUse, policy: OwnerPolicy
    ) -> None:
        """Note a session whose vector could be sent as things stand.

        Raises:
            PeerError: the session, its round or its question is over.
            PolicyError: the owner's budget does not bear it.
        """
        with self._store.transaction(durable=False) as connection:
            check_round(connection, config)
            check_unspent(connection, config, data)
            check_affordable(connection, policy, data, charge_for(config))
            open_session(
                connection,
                config,
                config_digest=config_digest,
                holder=self._holder.name,
                now=self._now(),
            )

    def advance(self, session: bytes, event: SumEvent) -> None:
        """Note the next step of a session, of which nothing has left that a power cut may undo."""
        with self._store.transaction(durable=False) as connection:
            advance(connection, session, event, now=self._now())

    def leave(self, config: SumConfig, data: DataUse, policy: OwnerPolicy) -> None:
        """Spend and pay for the vector that is about to leave: all of it, or nothing.

        Raises:
            PeerError: the round or the question is over by now.
            PolicyError: the owner's budget does not bear it any more.
        """
        charge = charge_for(config)
        with self._store.transaction() as connection:
            check_round(connection, config)
            check_unspent(connection, config, data)
            check_affordable(connection, policy, data, charge)
            book(connection, data, charge, self._now())
            spend(connection, config, data)
            note_round(connection, config)
            advance(connection, config.session, SumEvent.VECTOR_LEAVING, now=self._now())

    def sign_survivors(
        self, config: SumConfig, data: DataUse, survivors: Collection[str], *, min_difference: int
    ) -> None:
        """Note whose vectors are in the sum; raise PolicyError where that shows too much (R8)."""
        with self._store.transaction() as connection:
            note_survivors(connection, config, data, survivors, min_difference=min_difference)
            advance(connection, config.session, SumEvent.SURVIVORS_SIGNED, now=self._now())

    def reveal(self, session: bytes) -> None:
        """Note that our shares are about to leave."""
        with self._store.transaction() as connection:
            advance(connection, session, SumEvent.SHARES_REVEALED, now=self._now())

    def end(self, session: bytes, event: SumEvent, cause: str) -> None:
        """End a session unless it is over."""
        with self._store.transaction(durable=False) as connection:
            known = known_session(connection, session)
            if known is not None and known.state not in TERMINAL:
                advance(connection, session, event, now=self._now(), cause=cause)

    def book_plain(self, data: DataUse, policy: OwnerPolicy, charge: Charge) -> None:
        """Charge a contribution that leaves outside any sum."""
        with self._store.transaction() as connection:
            check_affordable(connection, policy, data, charge)
            book(connection, data, charge, self._now())


def charge_for(config: SumConfig) -> Charge:
    """Return what one participation in this sum costs."""
    return Charge(
        session=config.session,
        run_id=config.run_id,
        round_number=config.round_number,
        purpose=config.purpose,
        kind="exact" if config.noise is None else "noised",
        curve=None if config.noise is None else charge_of(config),
    )
