"""Two attacks that flwr 1.41's own client falls to; the same against ours stand beside it.

Findings 6 and 7 of our review of `flwr.client.mod.secure_aggregation.secaggplus_mod`. Should a
later flwr withstand them, these tests fail, and what we say about it has to be said anew.
"""

from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord
from flwr.client.mod.secure_aggregation.secaggplus_mod import (
    SecAggPlusState,
    _collect_masked_vectors,
    _setup,
    _share_keys,
    _unmask,
    check_configs,
)
from flwr.common import bytes_to_ndarray, ndarrays_to_parameters
from flwr.common.secure_aggregation.crypto.shamir import combine_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import (
    decrypt,
    encrypt,
    generate_shared_key,
)
from flwr.common.secure_aggregation.ndarrays_arithmetic import (
    factor_extract,
    parameters_addition,
    parameters_mod,
    parameters_subtraction,
)
from flwr.common.secure_aggregation.quantization import dequantize
from flwr.common.secure_aggregation.secaggplus_constants import Key, Stage
from flwr.common.secure_aggregation.secaggplus_utils import (
    pseudo_rand_gen,
    share_keys_plaintext_concat,
    share_keys_plaintext_separate,
)
from flwr.supercore.primitives.asymmetric import (
    bytes_to_public_key,
    generate_key_pairs,
    public_key_to_bytes,
)

from shared.errors import PeerError
from shared.secure_sum.lifecycle import ClientState
from shared.secure_sum.messages import Roster, Survivors, Unmask
from tests.unit.shared.secure_sum.whole_sum import WholeSum

VICTIM, NEIGHBOURS = 1, (2, 3)
CLIP, LEVELS, RING, WEIGHT = 8.0, 2**22, 2**32, 1000
SETTINGS = {
    Key.SAMPLE_NUMBER: 3,
    Key.SHARE_NUMBER: 3,
    Key.THRESHOLD: 2,
    Key.CLIPPING_RANGE: CLIP,
    Key.TARGET_RANGE: LEVELS,
    Key.MOD_RANGE: RING,
    Key.MAX_WEIGHT: float(WEIGHT),
}


def ask(stage: str, question: dict[str, Any]) -> ConfigRecord:
    """What the coordinator sends, past the client's own check of it."""
    record = ConfigRecord(question)
    check_configs(stage, record)
    return record


class InventedNeighbours:
    """A coordinator that plays all of its victim's neighbours itself."""

    def __init__(self) -> None:
        self.state = SecAggPlusState()
        self.state.nid = VICTIM
        self.own = _setup(self.state, ask(Stage.SETUP, SETTINGS))
        self.mask_keys = {node: generate_key_pairs() for node in NEIGHBOURS}
        self.box_keys = {node: generate_key_pairs() for node in NEIGHBOURS}
        keys = {str(VICTIM): [self.own[Key.PUBLIC_KEY_1], self.own[Key.PUBLIC_KEY_2]]} | {
            str(node): [
                public_key_to_bytes(self.mask_keys[node][1]),
                public_key_to_bytes(self.box_keys[node][1]),
            ]
            for node in NEIGHBOURS
        }
        self.shared = _share_keys(self.state, ask(Stage.SHARE_KEYS, keys))

    def secret_with_victim(self, keys: Any, key: str) -> bytes:
        public: Any = self.own[key]
        return generate_shared_key(keys[0], bytes_to_public_key(public))

    def mask(self, update: list[Any]) -> list[Any]:
        boxes = [
            encrypt(
                self.secret_with_victim(self.box_keys[node], Key.PUBLIC_KEY_2),
                share_keys_plaintext_concat(node, VICTIM, b"b" * 52, b"s" * 324),
            )
            for node in NEIGHBOURS
        ]
        question = {Key.CIPHERTEXT_LIST: boxes, Key.SOURCE_LIST: list(NEIGHBOURS)}
        answer: Any = _collect_masked_vectors(
            self.state,
            ask(Stage.COLLECT_MASKED_VECTORS, question),
            WEIGHT,
            ndarrays_to_parameters(update),
        )
        return [bytes_to_ndarray(array) for array in answer[Key.MASKED_PARAMETERS]]

    def victims_own_seed(self) -> bytes:
        destinations: Any = self.shared[Key.DESTINATION_LIST]
        boxes: Any = self.shared[Key.CIPHERTEXT_LIST]
        shares = []
        for node, box in zip(destinations, boxes, strict=True):
            secret = self.secret_with_victim(self.box_keys[node], Key.PUBLIC_KEY_2)
            shares.append(share_keys_plaintext_separate(decrypt(secret, box))[2])
        return combine_shares(shares)


def test_flwrs_client_sends_its_update_to_a_coordinator_that_invents_its_neighbours() -> None:
    coordinator, update = InventedNeighbours(), np.linspace(-1, 1, 500)
    vector = coordinator.mask([update])
    shapes = [array.shape for array in vector]
    own = pseudo_rand_gen(coordinator.victims_own_seed(), RING, shapes)
    vector = parameters_subtraction(vector, own)
    for node in NEIGHBOURS:
        secret = coordinator.secret_with_victim(coordinator.mask_keys[node], Key.PUBLIC_KEY_1)
        pair = pseudo_rand_gen(secret, RING, shapes)
        vector = parameters_addition(vector, pair)  # the victim, of the lower id, subtracted it
    _, plain = factor_extract(parameters_mod(vector, RING))
    assert np.abs(dequantize(plain, CLIP, LEVELS)[0] - update).max() < 2 * CLIP / LEVELS


def test_our_client_refuses_invented_neighbours_before_it_deals_a_share() -> None:
    whole = WholeSum(5)
    roster = whole.advertise()
    forged = [
        type(entry)(entry.device_id, bytes([number]) * 32, bytes([99 - number]) * 32, b"x" * 64)
        for number, entry in enumerate(roster.entries[1:])
    ]
    with pytest.raises(PeerError, match="did not sign its keys"):
        whole.clients["device-000"].share(Roster((roster.entries[0], *forged)))
    assert whole.clients["device-000"].state is ClientState.REFUSED


def test_flwrs_client_reveals_both_secrets_of_every_neighbour() -> None:
    coordinator = InventedNeighbours()
    coordinator.mask([np.zeros(4)])
    everybody = [VICTIM, *NEIGHBOURS]
    question = {Key.ACTIVE_NODE_ID_LIST: everybody, Key.DEAD_NODE_ID_LIST: everybody}
    answer: Any = _unmask(coordinator.state, ask(Stage.UNMASK, question))
    assert answer[Key.NODE_ID_LIST] == everybody * 2
    assert answer[Key.SHARE_LIST][1:3] == [b"b" * 52] * 2
    assert answer[Key.SHARE_LIST][4:6] == [b"s" * 324] * 2


def test_our_client_is_never_asked_for_a_kind_of_share_and_reveals_for_one_set_only() -> None:
    whole = WholeSum(5)
    unmask = whole.run_until("reveal")
    client = whole.clients["device-000"]
    client.reveal(unmask)
    with pytest.raises(PeerError, match="another question"):
        client.reveal(Unmask(Survivors(b"\x0f"), unmask.consents))
    assert client._received == {}
