"""What a device does when it is asked for statistics, and what that withstands (R8)."""

import hashlib
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from datetime import datetime, timedelta
from pathlib import Path

import msgspec
import numpy as np
import pytest
from flwr.supercore.task_identity import TaskIdentity
from numpy.typing import NDArray
from onnx import TensorProto, helper

from cloud_coordinator.rounds.sum_plan import SumOccasion, make_config, statistics_spec
from edge_agent import training_app
from edge_agent.secure_sums import SecureSums
from edge_agent.training_app import load_from_home
from shared.errors import PeerError, PolicyError, UnfitModelError
from shared.messages import utc_now
from shared.privacy_plan import PrivacyPlan
from shared.run_plan import CohortPlan, RunPlan
from shared.secure_sum.config import SumConfig
from shared.secure_sum.encoding import decode_sum
from shared.secure_sum.messages import SignedAnswer, decode
from shared.secure_sum.messages import encode as encode_message
from shared.secure_sum.questions import statistics_question
from shared.statistics.probes import Probe, ProbeColumn, contract_of_probe
from shared.statistics.questions import Count, Histogram, Mean, StatisticsQuestion
from shared.statistics.vectors import StatisticsVector
from shared.tasks.contract import DataContract, Feature
from shared.tasks.examples import Examples
from tests.enrolled_homes import FLEET
from tests.unit.edge_agent.asked_device import NAMES, POLICY, PUMPS, AskedDevice
from tests.unit.edge_agent.sum_fleet import NOW, SERVER_KEY, Fleet, Session, open_at, refusal

CONTRACT = DataContract(
    sources=("csv",),
    features=(Feature(name="pressure", minimum=0, maximum=1),),
    labels=("ok", "failed"),
)
QUESTION = StatisticsQuestion(of=(Count(), Mean(feature="pressure")), max_rows=100)


def config_for(
    question: StatisticsQuestion,
    *,
    noise: str = "none",
    devices: int = 6,
    fleet: str = "main",
    expires_at: datetime = NOW + timedelta(hours=1),
    run_id: str = "run-1",
    round_number: int = 1,
    contract: DataContract = CONTRACT,
) -> SumConfig:
    """Make the configuration as a coordinator does."""
    plan = RunPlan(
        name="pumps",
        task=PUMPS,
        statistics=question,
        privacy=PrivacyPlan(noise=noise, at_least=3, drop_fraction=0.2),  # type: ignore[arg-type]
        cohort=CohortPlan(size=devices),
    )
    vector = StatisticsVector(question, contract)
    spec = statistics_spec(
        plan,
        length=vector.length,
        norm=vector.norm,
        max_rows=question.max_rows,
        question_digest=statistics_question(msgspec.json.encode(question)),
    )
    occasion = SumOccasion(
        run_id=run_id,
        fleet=fleet,
        round_number=round_number,
        group=0,
        groups=1,
        session=secrets.token_bytes(32),
        server_key=SERVER_KEY.public_key().public_bytes_raw(),
        membership_version=1,
        expires_at=expires_at,
        mask_algorithm="aes-128-ctr",
        rotation_seed=bytes(16),
    )
    return make_config(plan, spec, occasion, roster_max=devices)


# --- the ClientApp -------------------------------------------------------------------------------


class Device(AskedDevice):
    def refusal(self, config: SumConfig | None, text: str = "") -> str:
        return str(self.ask(config, text or text_of(QUESTION)).error.reason)


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    for name in ("_task_id", "_run_id", "_node_id"):  # what Flower's processes know of themselves
        monkeypatch.setattr(TaskIdentity, name, 1)
    device = Device(tmp_path)
    with closing(device.sums):
        yield device


def received_config(question: StatisticsQuestion = QUESTION) -> SumConfig:
    return config_for(question, fleet=FLEET, expires_at=utc_now() + timedelta(hours=1))


def text_of(question: StatisticsQuestion) -> str:
    return msgspec.json.encode(question).decode()


def test_the_reply_holds_a_signed_answer_and_nothing_about_the_rows(device: Device) -> None:
    reply = device.ask(received_config(), text_of(QUESTION))

    assert reply.has_content(), reply.error
    assert set(reply.content) == {"sum"}
    (name, answer) = next(iter(reply.content.config_records["sum"].items()))
    assert name == "answer"
    assert isinstance(answer, bytes)
    signed = decode(answer, SignedAnswer)
    assert (signed.device_id, signed.stage, signed.refusal) == ("edge-0", "advertise", "")


def test_what_enters_the_sum_is_about_the_training_rows_alone(device: Device) -> None:
    config = received_config()
    device.ask(config, text_of(QUESTION))

    kept = device.sums._sessions[config.session]
    data = load_from_home(device.context())
    assert len(data.held_out) > 0
    expected = StatisticsVector(QUESTION, CONTRACT).contribution(data.train)
    np.testing.assert_array_equal(kept.vector, expected)
    assert kept.opened.data.part == "train"


def test_an_owner_who_wants_no_statistics_is_in_none(device: Device) -> None:
    (device.home / "policy.toml").write_text(POLICY + "statistics = false\n")

    assert "statistics = false in policy.toml" in device.refusal(received_config())


def test_exact_statistics_need_the_owners_word(device: Device) -> None:
    (device.home / "policy.toml").write_text("min_cohort = 4\n")

    assert "exact_sums = false in policy.toml" in device.refusal(received_config())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{}", "asks for no statistics"),
        ("no JSON", "asks for no statistics"),
        ('{"of":[{"kind":"rows"}]}', "asks for no statistics"),
        (
            text_of(StatisticsQuestion(of=(Count(),), max_rows=1)),
            "the question that came with this sum is not the one it was signed for",
        ),
    ],
)
def test_another_question_than_was_signed_is_not_answered(
    device: Device, text: str, words: str
) -> None:
    assert words in device.refusal(received_config(), text)


def test_statistics_leave_in_a_sum_or_not_at_all(device: Device) -> None:
    assert "only in a secure sum" in device.refusal(None)


# --- differencing --------------------------------------------------------------------------------


class Asked(Session):
    """A session in which every device answers one question from rows of its own."""

    def __init__(
        self,
        fleet: Fleet,
        config: SumConfig,
        sums: Mapping[str, SecureSums],
        question: StatisticsQuestion,
    ) -> None:
        super().__init__(fleet, config, sums)
        self.vector = StatisticsVector(question, CONTRACT)

    def advertise(self) -> None:
        for name, sums in self.sums.items():
            opened = open_at(sums, self.fleet, self.config)
            answer = sums.advertise(opened, self.vector.contribution(rows_of(name)), {})
            self.server.take_advertised(decode(answer, SignedAnswer))

    def total(self) -> NDArray[np.float64]:
        result = self.run()
        assert result is not None
        return decode_sum(self.config, result.lanes, count=len(self.sums))[0]


def rows_of(name: str) -> Examples:
    rng = np.random.default_rng(list(name.encode()))
    pressures = rng.beta(2, 5, (80, 1)).astype(np.float32)
    return Examples(pressures, np.zeros(80, np.int64))


def binned(bins: int) -> StatisticsQuestion:
    return StatisticsQuestion(of=(Histogram(feature="pressure", bins=bins),), max_rows=100)


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path, *NAMES, policy=f"{POLICY}epsilon = 1000.0\n")


@pytest.fixture
def sums(fleet: Fleet) -> Iterator[dict[str, SecureSums]]:
    with ExitStack() as stack:
        yield {name: stack.enter_context(fleet.sums(name)) for name in NAMES}


def others(sums: Mapping[str, SecureSums]) -> dict[str, SecureSums]:
    """All but the victim, edge-5."""
    return {name: sums[name] for name in NAMES[:5]}


def test_exact_sums_with_and_without_one_device_are_not_both_revealed_whatever_the_bins(
    fleet: Fleet, sums: dict[str, SecureSums]
) -> None:
    Asked(fleet, config_for(binned(40)), sums, binned(40)).run()
    config = config_for(binned(41), devices=5, run_id="run-2")
    without = Asked(fleet, config, others(sums), binned(41))
    without.run(until="mask")

    question = encode_message(without.server.close_masking())

    for name in others(sums):
        assert "survivors differ by 1 devices" in refusal(without.ask(name, "consent", question))


def test_a_question_whose_sum_is_said_to_have_failed_is_not_answered_again(
    fleet: Fleet, sums: dict[str, SecureSums]
) -> None:
    Asked(fleet, config_for(binned(40)), sums, binned(40)).run(until="mask")
    again = config_for(binned(40), round_number=2)

    for one in sums.values():
        with pytest.raises(PeerError, match="is spent"):
            open_at(one, fleet, again)


def cosine(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize(
    ("noise", "tells"),
    [
        ("none", lambda found, _: found > 0.999),
        # Of two random directions in d dimensions the cosine's standard deviation is 1/√d.
        ("distributed", lambda found, d: abs(found) < 5 / np.sqrt(d)),
    ],
)
def test_with_noise_the_difference_of_two_sums_tells_nothing_of_the_device_it_is_of(
    fleet: Fleet,
    sums: dict[str, SecureSums],
    monkeypatch: pytest.MonkeyPatch,
    noise: str,
    tells: Callable[[float, int], bool],
) -> None:
    """Exactly, it would be that device's vector: shown by devices that let the attack pass."""
    monkeypatch.setattr("edge_agent.privacy.records.note_survivors", lambda *_, **__: None)
    question = binned(600)
    victim = StatisticsVector(question, CONTRACT).contribution(rows_of("edge-5"))

    all_of_them = Asked(fleet, config_for(question, noise=noise), sums, question).total()
    config = config_for(question, noise=noise, devices=5, run_id="run-2")
    without = Asked(fleet, config, others(sums), question).total()

    assert tells(cosine(all_of_them - without, victim), len(victim))


def test_each_noised_question_is_charged_and_the_budget_ends_them(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, *NAMES, policy="min_cohort = 4\nepsilon = 6.0\n")
    with ExitStack() as stack:
        sums = {name: stack.enter_context(fleet.sums(name)) for name in NAMES}
        Asked(fleet, config_for(binned(4), noise="distributed"), sums, binned(4)).run()
        config = config_for(binned(5), noise="distributed", run_id="run-2")
        with pytest.raises(PolicyError, match=r"with this sum .* would be spent"):
            open_at(sums["edge-0"], fleet, config)


# --- what rows do inside a model -----------------------------------------------------------------


def doubling() -> bytes:
    """Return a model of one feature that doubles it."""
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node("Add", ["x", "x"], ["y"])],
            "doubling",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 1])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", 1])],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    return bytes(model.SerializeToString())


def about(model: bytes, *, max_rows: int = 50) -> StatisticsQuestion:
    probe = Probe(
        model_sha256=hashlib.sha256(model).hexdigest(), columns=(ProbeColumn("y", "high", 0.0),)
    )
    return StatisticsQuestion(of=(Mean(feature="high y"),), max_rows=max_rows, probe=probe)


def probe_config(question: StatisticsQuestion) -> SumConfig:
    assert question.probe is not None
    return config_for(
        question,
        fleet=FLEET,
        expires_at=utc_now() + timedelta(hours=1),
        contract=contract_of_probe(question.probe),
    )


def test_a_probe_is_answered_by_octaves_of_what_the_model_makes_of_training_rows(
    device: Device,
) -> None:
    question = about(doubling())
    config = probe_config(question)
    reply = device.ask(config, text_of(question), model=doubling())
    assert reply.has_content(), reply.error

    kept = device.sums._sessions[config.session]
    assert kept.vector is not None
    weight, scaled = kept.vector
    # Pressures from 0 to 0.99, doubled, in octaves from -4 to 4 that are scaled to [-1, 1].
    train = device.train_inputs()
    chosen = train[np.unique(np.linspace(0, len(train) - 1, 50).astype(int))]
    with np.errstate(divide="ignore"):
        octaves = np.clip(np.log2(2 * chosen), -4, 4)
    assert weight == pytest.approx(1.0)
    assert scaled == pytest.approx(octaves.mean() / 4, abs=1e-6)


def test_a_model_that_fails_on_the_rows_gives_zeros_and_no_word(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise UnfitModelError("the model failed on row 7")

    monkeypatch.setattr(training_app, "measure_extremes", fails)
    question = about(doubling())
    config = probe_config(question)
    reply = device.ask(config, text_of(question), model=doubling())
    assert reply.has_content()
    np.testing.assert_array_equal(device.sums._sessions[config.session].vector, [0, 0])


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (None, "0 models came along, and 1 are asked about"),
        (b"another", "not the one that is asked about"),
    ],
)
def test_a_probe_without_its_very_model_is_refused(
    device: Device, model: bytes | None, words: str
) -> None:
    question = about(doubling())
    reply = device.ask(probe_config(question), text_of(question), model=model)
    assert words in str(reply.error.reason)


def test_a_model_that_does_not_load_is_declined(device: Device) -> None:
    question = about(b"no model")
    reply = device.ask(probe_config(question), text_of(question), model=b"no model")
    signed = decode(bytes(reply.content.config_records["sum"]["answer"]), SignedAnswer)  # type: ignore[arg-type]
    assert "the model does not load" in signed.refusal
