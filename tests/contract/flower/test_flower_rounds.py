"""What a run's worker and a device can rely on, between our two doors and a real SuperLink."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode, SubStatus
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
from flwr.proto.runtime_pb2 import PushTaskOutputRequest

from cloud_coordinator.flower.grid import RunGrid, open_run
from edge_agent.flower_node import FlowerNode
from shared.errors import UnavailableError
from shared.listening import free_port
from shared.tasks.spec import TaskSpec
from tests.contract.flower.conftest import DEADLINE_S, LiveSuperLink, PollingNode
from tests.contract.flower.flower_probe import federate

Join = Callable[..., FlowerNode]


@pytest.fixture
def grid(superlink: LiveSuperLink) -> Iterator[RunGrid]:
    with open_run(**superlink.run_options()) as opened:
        yield opened


def question(node_id: int, kind: str = "query.count", *, ttl: float = 60.0) -> Message:
    return Message(RecordDict({"q": ConfigRecord({"a": 1})}), node_id, kind, ttl=ttl, group_id="1")


def eventually(ask: Callable[[], list[Message]]) -> list[Message]:
    deadline = time.monotonic() + DEADLINE_S
    while not (found := ask()):
        assert time.monotonic() < deadline, "nothing came"
        threading.Event().wait(0.05)
    return found


def test_a_reply_is_pulled_once_the_node_has_worked(grid: RunGrid, join: Join) -> None:
    node = join()
    (message_id,) = grid.push_messages([question(node.node_id)])

    assert grid.pull_messages([message_id]) == []
    assert list(node.work()) == [message_id]
    (reply,) = grid.iter_replies([message_id])

    assert reply.metadata.reply_to_message_id == message_id
    assert reply.metadata.src_node_id == node.node_id
    assert reply.content.config_records["n"]["n"] == 1


def test_a_reply_that_is_still_uploading_delays_nobody(
    grid: RunGrid, join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = join()
    uploading, may_go_on = threading.Event(), threading.Event()
    push_object = node._client.PushObject

    def push_slowly(*request: Any) -> Any:
        uploading.set()
        assert may_go_on.wait(DEADLINE_S)
        return push_object(*request)

    monkeypatch.setattr(node._client, "PushObject", push_slowly)
    monkeypatch.setattr(node._client._batches, "_known", False)  # which would not be slow
    (message_id,) = grid.push_messages([question(node.node_id)])
    with ThreadPoolExecutor(1) as device:
        work = device.submit(lambda: list(node.work()))
        assert uploading.wait(DEADLINE_S)
        before = [grid.pull_messages([message_id]) for _ in range(2)]
        may_go_on.set()
        assert work.result(DEADLINE_S) == [message_id]

    assert before == [[], []]
    (reply,) = grid.pull_messages([message_id])
    assert reply.content.config_records["n"]["n"] == 1


def test_a_node_cannot_dispose_of_a_message_to_another(grid: RunGrid, join: Join) -> None:
    thief, victim = join(), join(1)
    (message_id,) = grid.push_messages([question(victim.node_id)])
    request = ConfirmMessageReceivedRequest(
        node=thief._node, run_id=grid.run.run_id, message_object_id=message_id
    )
    thief._client.ConfirmMessageReceived(request)

    list(victim.work())
    (reply,) = grid.iter_replies([message_id])
    assert reply.content.config_records["n"]["n"] == 1


def test_a_node_answers_all_that_waits_and_keeps_its_context(grid: RunGrid, join: Join) -> None:
    node = join()
    first, second = (
        grid.push_messages([question(node.node_id)])[0],
        grid.push_messages([question(node.node_id)])[0],
    )

    assert list(node.work()) == [first, second]
    counts = [reply.content.config_records["n"]["n"] for reply in grid.iter_replies([first])]
    counts += [reply.content.config_records["n"]["n"] for reply in grid.iter_replies([second])]

    assert counts == [1, 2]


def test_replies_of_many_nodes_are_told_apart_by_the_message_they_answer(
    grid: RunGrid, join: Join
) -> None:
    nodes = [join(partition) for partition in range(3)]
    vector = ArrayRecord([np.zeros(1000, dtype=np.float32)])
    ids = grid.push_messages(
        [Message(RecordDict({"parameters": vector}), n.node_id, "train", ttl=60.0) for n in nodes]
    )
    for node in nodes:
        assert len(list(node.work())) == 1

    found = {
        reply.metadata.reply_to_message_id: float(
            reply.content.array_records["parameters"].to_numpy_ndarrays()[0][0]
        )
        for reply in grid.iter_replies(ids)
    }

    assert found == dict(zip(ids, [0.5, 1.0, 1.5], strict=True))


def test_federated_averaging_over_polling_nodes_gives_what_was_computed_by_hand(
    grid: RunGrid, join: Join
) -> None:
    nodes = [PollingNode(join(partition)) for partition in range(2)]
    try:
        result = federate(grid, [n.node.node_id for n in nodes], rounds=3)
    finally:
        for node in nodes:
            node.close()

    assert result == pytest.approx([5 / 3 * (1 - 0.5**3)] * 3, rel=1e-6)


def test_an_error_in_the_app_names_its_kind_and_quotes_no_data(grid: RunGrid, join: Join) -> None:
    node = join()
    (message_id,) = grid.push_messages([question(node.node_id, "query.fail")])
    list(node.work())

    (reply,) = grid.iter_replies([message_id])

    assert reply.metadata.reply_to_message_id == message_id
    assert reply.error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    assert "ValueError" in str(reply.error.reason)
    assert "row 17" not in str(reply.error.reason)


def test_an_expired_message_comes_back_as_an_error_mapped_by_the_message_it_answers(
    grid: RunGrid, join: Join
) -> None:
    (message_id,) = grid.push_messages([question(join().node_id, ttl=0.2)])

    (reply,) = eventually(lambda: grid.pull_messages([message_id]))

    assert reply.error.code == ErrorCode.MESSAGE_UNAVAILABLE
    assert reply.metadata.src_node_id == SUPERLINK_NODE_ID
    assert reply.metadata.reply_to_message_id == message_id


def test_a_message_for_an_unknown_node_gets_no_id(grid: RunGrid, join: Join) -> None:
    known = join().node_id

    accepted, refused = grid.push_messages([question(known), question(12345)])

    assert accepted
    assert refused == ""


def test_a_discarded_message_is_void_for_its_node(grid: RunGrid, join: Join) -> None:
    node = join()
    grid.discard(grid.push_messages([question(node.node_id)]))

    assert list(node.work()) == []


def test_a_reply_that_comes_after_the_discard_is_dropped(grid: RunGrid, join: Join) -> None:
    node = join()
    (message_id,) = grid.push_messages([question(node.node_id)])
    assert list(node.work()) == [message_id]

    grid.discard([message_id])
    (reply,) = grid.pull_messages([message_id])

    assert reply.error.code == ErrorCode.MESSAGE_UNAVAILABLE


def test_a_run_about_another_task_is_refused_by_the_node(
    superlink: LiveSuperLink, join: Join
) -> None:
    node = join(task=TaskSpec("another", "x:y"))
    with open_run(**superlink.run_options()) as grid:
        (message_id,) = grid.push_messages([question(node.node_id)])
        list(node.work())
        (reply,) = grid.iter_replies([message_id])

    assert reply.error.code == ErrorCode.INVALID_FAB
    assert "agreed to 'another'" in str(reply.error.reason)


def test_a_run_that_names_foreign_code_is_refused_by_the_node(
    superlink: LiveSuperLink, join: Join
) -> None:
    node = join()
    with open_run(**superlink.run_options(client_app="os:system")) as grid:
        (message_id,) = grid.push_messages([question(node.node_id)])
        list(node.work())
        (reply,) = grid.iter_replies([message_id])

    assert reply.error.code == ErrorCode.INVALID_FAB
    assert "os:system" in str(reply.error.reason)


def test_runs_that_start_side_by_side_never_take_each_others_task(
    superlink: LiveSuperLink, join: Join
) -> None:
    node = join()
    with (
        open_run(**superlink.run_options()) as first,
        open_run(**superlink.run_options()) as second,
    ):
        assert first.run.run_id != second.run.run_id
        (message_id,) = second.push_messages([question(node.node_id)])
        assert list(node.work()) == [message_id]
        assert len(second.pull_messages([message_id])) == 1


def test_a_node_may_begin_a_new_life_while_its_last_one_still_counts(
    superlink: LiveSuperLink, key: EllipticCurvePrivateKey
) -> None:
    superlink.register(key)
    with superlink.node(key) as killed, superlink.node(key) as restarted:
        killed.join()
        restarted.join()

        assert restarted.node_id == killed.node_id


def test_a_run_that_was_ended_from_elsewhere_is_unavailable_and_interrupts_nobody(
    grid: RunGrid,
) -> None:
    grid._runtime.PushTaskOutput(PushTaskOutputRequest(sub_status=SubStatus.STOPPED))

    with pytest.raises(UnavailableError, match="start a new session"):
        grid.get_node_ids()


def test_after_a_crash_the_grid_gives_up_and_the_node_finds_the_next_superlink(
    tmp_path: Path, key: EllipticCurvePrivateKey
) -> None:
    port = free_port()
    first = LiveSuperLink(tmp_path, public_port=port)
    first.register(key)
    node = first.node(key)
    node.join()
    with open_run(**first.run_options(patience_s=0.5)) as grid:
        assert list(grid.get_node_ids()) == [node.node_id]
        os.kill(first.parent.pid, signal.SIGKILL)
        assert first.wait() == -signal.SIGKILL
        with pytest.raises(UnavailableError, match="the SuperLink does not answer"):
            grid.get_node_ids()
    with pytest.raises(UnavailableError):
        first.register(key)
    first.close()

    second = LiveSuperLink(tmp_path, public_port=port)
    second.register(key)
    with node, open_run(**second.run_options()) as grid:
        assert list(node.work()) == []  # it finds itself forgotten, and activates
        (message_id,) = grid.push_messages([question(node.node_id)])
        assert list(node.work()) == [message_id]
    second.close()
