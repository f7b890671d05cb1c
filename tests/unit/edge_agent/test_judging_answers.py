"""What a device does when it is asked to judge files, and what that withstands."""

import hashlib
import secrets
from collections.abc import Iterator, Sequence
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import msgspec
import numpy as np
import pytest
from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity
from onnx import TensorProto, helper, numpy_helper

from cloud_coordinator.rounds.sum_plan import SumOccasion, judge_spec, make_config
from edge_agent.training_app import load_from_home
from shared.judge_plan import JudgePlan
from shared.judging import (
    Candidate,
    CandidateFacts,
    JudgeQuestion,
    Scorecard,
    base_of_files,
    judge_question,
)
from shared.messages import utc_now
from shared.privacy_plan import PrivacyPlan
from shared.run_plan import CohortPlan, RunPlan
from shared.secure_sum.config import SumConfig
from tests.enrolled_homes import FLEET
from tests.unit.edge_agent.asked_device import POLICY, PUMPS, AskedDevice
from tests.unit.edge_agent.sum_fleet import SERVER_KEY


def classifier(*weights: float) -> bytes:
    """Return a model of one feature and two classes, whose rows of the test are all of class 0."""
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node("MatMul", ["x", "w"], ["y"])],
            "classifier",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 1])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", 2])],
            [numpy_helper.from_array(np.array([weights], np.float32), "w")],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    return bytes(model.SerializeToString())


GOOD, BAD = classifier(1.0, 0.0), classifier(-1.0, 0.0)
FILES = (GOOD, BAD)


def question_about(files: Sequence[bytes] = FILES) -> JudgeQuestion:
    candidates = tuple(
        Candidate(name=f"file-{n}", sha256=hashlib.sha256(f).hexdigest())
        for n, f in enumerate(files)
    )
    return JudgeQuestion(candidates=candidates, reference="file-0", max_rows=100, labels=2)


def config_for(question: JudgeQuestion) -> SumConfig:
    """Make the configuration as a coordinator does."""
    parent = RunPlan(
        name="pumps",
        task=PUMPS,
        privacy=PrivacyPlan(at_least=3, drop_fraction=0.2),
        cohort=CohortPlan(size=6),
        judge=JudgePlan(noise="none"),
    )
    plan, card = parent.judging(question), Scorecard(question)
    spec = judge_spec(
        plan,
        length=card.length,
        norm=card.norm,
        question_digest=judge_question(msgspec.json.encode(question)),
        base_digest=base_of_files(question.candidates),
    )
    occasion = SumOccasion(
        run_id="run-1-judge",
        fleet=FLEET,
        round_number=1,
        group=0,
        groups=1,
        session=secrets.token_bytes(32),
        server_key=SERVER_KEY.public_key().public_bytes_raw(),
        membership_version=1,
        expires_at=utc_now() + timedelta(hours=1),
        mask_algorithm="aes-128-ctr",
        rotation_seed=bytes(16),
    )
    return make_config(plan, spec, occasion, roster_max=6)


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[AskedDevice]:
    for name in ("_task_id", "_run_id", "_node_id"):  # what Flower's processes know of themselves
        monkeypatch.setattr(TaskIdentity, name, 1)
    device = AskedDevice(tmp_path)
    with closing(device.sums):
        yield device


def text_of(question: JudgeQuestion) -> str:
    return msgspec.json.encode(question).decode()


def facts_in(reply: Message) -> tuple[CandidateFacts, ...]:
    facts = reply.content.config_records["facts"]["json"]
    assert isinstance(facts, bytes)
    return msgspec.json.decode(facts, type=tuple[CandidateFacts, ...])


def test_scores_of_held_out_rows_go_into_the_sum_and_costs_into_the_reply(
    device: AskedDevice,
) -> None:
    question = question_about()
    config = config_for(question)
    reply = device.ask_to_judge(config, text_of(question), FILES)

    assert reply.has_content(), reply.error
    assert set(reply.content) == {"sum", "facts"}
    assert [facts.name for facts in facts_in(reply)] == ["file-0", "file-1"]
    assert all(not facts.failure and facts.p95_ms > 0 for facts in facts_in(reply))
    kept = device.sums._sessions[config.session]
    held_out = load_from_home(device.context()).held_out
    assert kept.vector is not None
    assert kept.vector[0] == pytest.approx(len(held_out) / 100)
    assert kept.opened.data.part == "held-out"
    good, bad = Scorecard(question).read(np.asarray(kept.vector, float), sigma=0.0)
    # At a pressure of 0 both say the first class, which is right.
    assert good.values["mean"] == pytest.approx(1.0)
    assert bad.values["gain"] <= -0.5


def test_costs_are_told_of_a_file_that_does_not_run_and_nothing_of_the_rows(
    device: AskedDevice,
) -> None:
    files = (GOOD, b"not a model")
    question = question_about(files)
    reply = device.ask_to_judge(config_for(question), text_of(question), files)
    good, bad = facts_in(reply)
    assert good.failure == ""
    assert bad.failure.startswith("the model does not load")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ((), "0 models came along, and 2 are asked about"),
        ((GOOD,), "1 models came along, and 2 are asked about"),
        ((GOOD, GOOD), "a model that came along is not the one that is asked about"),
        ((BAD, GOOD), "a model that came along is not the one that is asked about"),
    ],
)
def test_other_files_than_were_asked_about_are_not_judged(
    device: AskedDevice, files: Sequence[bytes], words: str
) -> None:
    question = question_about()
    reply = device.ask_to_judge(config_for(question), text_of(question), files)
    assert words in str(reply.error.reason)


def test_another_question_than_was_signed_is_not_answered(device: AskedDevice) -> None:
    signed, asked = question_about(), msgspec.structs.replace(question_about(), max_rows=1)
    reply = device.ask_to_judge(config_for(signed), text_of(asked), FILES)
    assert "not the one it was signed for" in str(reply.error.reason)


@pytest.mark.parametrize("text", ["{}", "no JSON", '{"candidates":[]}'])
def test_what_asks_for_no_judgement_is_refused(device: AskedDevice, text: str) -> None:
    reply = device.ask_to_judge(config_for(question_about()), text, FILES)
    assert "asks for no judgement" in str(reply.error.reason)


def test_scores_leave_in_a_sum_or_not_at_all(device: AskedDevice) -> None:
    reply = device.ask_to_judge(None, text_of(question_about()), FILES)
    assert "only in a secure sum" in str(reply.error.reason)


def test_exact_scores_need_the_owners_word(device: AskedDevice) -> None:
    (device.home / "policy.toml").write_text(POLICY.replace("exact_sums = true\n", ""))
    question = question_about()
    reply = device.ask_to_judge(config_for(question), text_of(question), FILES)
    assert "exact_sums = false in policy.toml" in str(reply.error.reason)
