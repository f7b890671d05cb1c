"""The trainer child around the probe app, for tests: ``python -m tests.contract.flower.…``."""

from edge_agent.trainer_loop import serve
from shared.errors import PeerError
from tests.contract.flower.flower_probe import app


class Mirror:
    """Answers every stage by its question, read backwards."""

    def answer(self, session: bytes, _stage: str, question: bytes) -> bytes:
        if session == bytes(32):
            raise PeerError("nobody opened this session")
        return question[::-1]


if __name__ == "__main__":
    serve(app, sums_in=lambda _: Mirror())
