"""Flower's own SecAgg+ without its network: the reference of ``shoal-sim bench secure-sum``.

The stages are those of flwr 1.41, client and server, called as its mod and its workflow call them;
only the Grid between them is a stand-in that hands a message to the client at once.
"""

import logging
import time
from collections.abc import Iterable, Sequence
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.client.mod.secure_aggregation.secaggplus_mod import (
    SecAggPlusState,
    _collect_masked_vectors,
    _setup,
    _share_keys,
    _unmask,
)
from flwr.common import ndarrays_to_parameters
from flwr.common.secure_aggregation.ndarrays_arithmetic import parameters_addition, parameters_mod
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key
from flwr.server.workflow.secure_aggregation.secaggplus_workflow import (
    SecAggPlusWorkflow,
    WorkflowState,
)
from flwr.supercore.task_identity import TaskIdentity
from numpy.typing import NDArray

_CLIP, _MAX_WEIGHT = 8.0, 1000.0
_TARGET_RANGE, _MODULUS = 2**22, 2**32


class FlowerSecAgg:
    """One session of ``devices`` clients, each with ``neighbours`` others."""

    def __init__(self, devices: int, neighbours: int, threshold: int) -> None:
        """Advertise keys; ``neighbours`` is even, as Flower's ring needs it."""
        logging.getLogger("flwr").setLevel(logging.ERROR)
        TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1  # Message wants them
        half = neighbours // 2
        self._ids = list(range(1, devices + 1))
        self._threshold = threshold
        self._neighbours = {
            nid: {self._ids[(place + offset) % devices] for offset in range(-half, half + 1)}
            for place, nid in enumerate(self._ids)
        }
        self._clients: dict[int, SecAggPlusState] = {}
        self._public: dict[int, tuple[bytes, bytes]] = {}
        for nid in self._ids:
            self._advertise(nid, devices, neighbours + 1)
        self._forwarded: dict[int, list[tuple[int, bytes]]] = {nid: [] for nid in self._ids}

    def _advertise(self, nid: int, devices: int, shares: int) -> None:
        client = SecAggPlusState()
        client.nid = nid
        settings: dict[str, Any] = {
            Key.SAMPLE_NUMBER: devices,
            Key.SHARE_NUMBER: shares,
            Key.THRESHOLD: self._threshold,
            Key.CLIPPING_RANGE: _CLIP,
            Key.TARGET_RANGE: _TARGET_RANGE,
            Key.MOD_RANGE: _MODULUS,
            Key.MAX_WEIGHT: _MAX_WEIGHT,
        }
        keys: Any = _setup(client, ConfigRecord(settings))
        self._clients[nid] = client
        self._public[nid] = (keys[Key.PUBLIC_KEY_1], keys[Key.PUBLIC_KEY_2])

    def share(self, nid: int) -> tuple[float, Any]:
        """Have one client deal its shares; return its seconds and what it says."""
        client = deepcopy(self._clients[nid])
        keys: Any = {str(peer): list(self._public[peer]) for peer in self._neighbours[nid]}
        begun = time.perf_counter()
        dealt: Any = _share_keys(client, ConfigRecord(keys))
        return time.perf_counter() - begun, dealt

    def share_bytes(self, nid: int) -> int:
        """Return the size of what one client says when it deals its shares."""
        content = RecordDict({RECORD_KEY_CONFIGS: ConfigRecord(self.share(nid)[1])})
        return len(content.deflate()) + sum(
            len(record.deflate()) for record in content.config_records.values()
        )

    def share_all(self) -> None:
        """Have all clients deal their shares, which they keep."""
        for nid in self._ids:
            keys: Any = {str(peer): list(self._public[peer]) for peer in self._neighbours[nid]}
            dealt: Any = _share_keys(self._clients[nid], ConfigRecord(keys))
            forwards = zip(dealt[Key.DESTINATION_LIST], dealt[Key.CIPHERTEXT_LIST], strict=True)
            for to, box in forwards:
                self._forwarded[to].append((nid, box))

    def mask(self, nid: int, vector: NDArray[np.float32]) -> tuple[float, list[bytes]]:
        """Have one client mask its vector; return seconds and what it uploads."""
        client = deepcopy(self._clients[nid])  # the stage works once
        parameters = ndarrays_to_parameters([vector])
        boxes: Any = {
            Key.CIPHERTEXT_LIST: [box for _, box in self._forwarded[nid]],
            Key.SOURCE_LIST: [dealer for dealer, _ in self._forwarded[nid]],
        }
        begun = time.perf_counter()
        masked: Any = _collect_masked_vectors(
            client, ConfigRecord(boxes), int(_MAX_WEIGHT), parameters
        )
        seconds = time.perf_counter() - begun
        self._clients[nid].rd_seed_share_dict = client.rd_seed_share_dict
        self._clients[nid].sk1_share_dict = client.sk1_share_dict
        return seconds, masked[Key.MASKED_PARAMETERS]

    def unmask(self, length: int, dropped: Sequence[int]) -> float:
        """Have the server remove the masks from a sum; return its own seconds.

        The clients' shares must lie with their receivers (`open_boxes`). What the lanes hold does
        not matter to the time, so they are zeros.
        """
        state = WorkflowState(
            sampled_node_ids=set(self._ids),
            active_node_ids=set(self._ids) - set(dropped),
            threshold=self._threshold,
            clipping_range=_CLIP,
            quantization_range=_TARGET_RANGE,
            mod_range=_MODULUS,
            nid_to_neighbours=deepcopy(self._neighbours),
            nid_to_publickeys={nid: list(keys) for nid, keys in self._public.items()},
            aggregate_ndarrays=_zero_sum(length),
        )
        grid = _Grid(self._clients)
        context: Any = SimpleNamespace(
            state=SimpleNamespace(config_records={"config": {"current_round": 1}}),
            strategy=SimpleNamespace(aggregate_fit=lambda *_: (None, {})),
        )
        workflow = SecAggPlusWorkflow(len(self._neighbours[1]), self._threshold)
        begun = time.perf_counter()
        if not workflow.unmask_stage(grid, context, state):  # type: ignore[arg-type]  # a stand-in
            raise RuntimeError("Flower's unmask stage gave no result")
        return time.perf_counter() - begun - grid.seconds

    def open_boxes(self) -> None:
        """Let every client take the shares dealt to it, as masking does, without the masking."""
        empty = np.zeros(1, np.float32)
        for nid in self._ids:
            self.mask(nid, empty)


class _Grid:
    """Hands each message to its client at once, and keeps the time that this takes."""

    def __init__(self, clients: dict[int, SecAggPlusState]) -> None:
        self._clients = clients
        self.seconds = 0.0

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        del timeout
        begun = time.perf_counter()
        replies = []
        for message in messages:
            node_id = message.metadata.dst_node_id
            configs = message.content.config_records[RECORD_KEY_CONFIGS]
            answer: Any = _unmask(self._clients[node_id], configs)
            reply = Message(
                RecordDict({RECORD_KEY_CONFIGS: ConfigRecord(answer, keep_input=False)}),
                reply_to=message,
            )
            replies.append(reply)
        self.seconds += time.perf_counter() - begun
        return replies


def _zero_sum(length: int) -> list[NDArray[Any]]:
    """Return a masked sum's arrays: the weight first, as Flower's `factor_combine` lays it out."""
    vector = [np.ones(1, np.int64), np.zeros(length, np.int64)]
    return list(parameters_mod(parameters_addition(vector, vector), _MODULUS))
