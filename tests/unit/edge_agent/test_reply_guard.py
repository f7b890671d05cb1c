"""What nobody declared does not leave a device, whoever put it into a reply."""

import logging

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from edge_agent import training_app
from edge_agent.reply_guard import UndeclaredFieldError, check_reply
from edge_agent.sum_access import NoOwner
from edge_agent.training_app import build_client_app

SUM = ConfigRecord({"answer": b"signed"})
LANES = ArrayRecord([np.zeros(3, np.uint16)])
EXACT = ArrayRecord([np.zeros(2, np.uint64)])
FLOATS = ArrayRecord([np.zeros(3, np.float32)])
METRICS = MetricRecord({"loss_sum": 1.5})


@pytest.mark.parametrize(
    "content",
    [
        RecordDict({"sum": SUM}),
        RecordDict({"sum": SUM, "lanes": LANES, "exact": EXACT}),
        RecordDict({"sum": SUM, "lanes": ArrayRecord([np.zeros(3, np.uint32)]), "exact": EXACT}),
    ],
)
def test_a_signed_answer_and_masked_lanes_may_leave(content: RecordDict) -> None:
    check_reply(content, is_summed=True)
    with pytest.raises(UndeclaredFieldError):
        check_reply(content, is_summed=False)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (RecordDict({"sum": SUM, "metrics": METRICS}), "'metrics.loss_sum'"),
        (RecordDict({"sum": SUM, "parameters": FLOATS}), "'parameters."),
        (RecordDict({"sum": SUM, "metrics": MetricRecord({})}), "'metrics'"),
        (RecordDict({"sum": ConfigRecord({"answer": b"", "examples": 17})}), "'sum.examples'"),
        (RecordDict({"sum": SUM, "lanes": FLOATS}), "'lanes' of a reply is no masked vector"),
        (RecordDict({"sum": SUM, "exact": METRICS}), "'exact' of a reply is no masked vector"),
    ],
)
def test_everything_else_stays_in_a_round_of_secure_sums(content: RecordDict, named: str) -> None:
    with pytest.raises(UndeclaredFieldError, match=named.replace(".", r"\.")):
        check_reply(content, is_summed=True)


def test_parameters_and_metrics_may_leave_in_a_plain_round_and_nothing_else() -> None:
    check_reply(RecordDict({"parameters": FLOATS, "metrics": METRICS}), is_summed=False)
    with pytest.raises(UndeclaredFieldError, match=r"'labels\.counts'"):
        check_reply(RecordDict({"labels": ConfigRecord({"counts": [1, 2]})}), is_summed=False)


def test_an_undeclared_field_is_answered_by_an_error_and_a_line_in_the_log_names_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("_task_id", "_run_id", "_node_id"):  # what Flower's processes know of themselves
        monkeypatch.setattr(TaskIdentity, name, 1)

    def chatty(*_: object) -> RecordDict:
        return RecordDict({"sum": SUM, "debug": ConfigRecord({"label_counts": [17, 4]})})

    class Sums(NoOwner):
        def answer(self, *_: object) -> bytes:
            return b"signed"

    monkeypatch.setattr(training_app, "reply_with", chatty)
    app = build_client_app(lambda _: pytest.fail("no data are needed"), sums_of=lambda _: Sums())
    question = ConfigRecord({"session": bytes(32), "question": b"who takes part"})
    context = Context(1, 2, {}, RecordDict(), {})
    with caplog.at_level(logging.ERROR):
        reply = app(Message(RecordDict({"sum": question}), 2, "query.share"), context)

    assert reply.has_error()
    assert reply.error.reason == "this device held its reply back; see the log on the device"
    assert "'debug.label_counts' of a reply is not declared" in caplog.text
    assert "17" not in caplog.text.split("reply held back")[1]
