import itertools
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import pytest
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.supercore.task_identity import TaskIdentity
from msgspec import structs
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from edge_agent import training_app
from edge_agent.data_registry import DataRegistry
from edge_agent.local_data import LocalData, check_data
from edge_agent.secure_sums import SecureSums
from edge_agent.sum_access import NoOwner
from edge_agent.training import evaluate, train
from edge_agent.training_app import app, build_client_app, device_seed, load_from_home
from shared.errors import DataError, StoppedError, UnavailableError
from shared.messages import utc_now
from shared.parameters import Vector
from shared.run_plan import TrainingPlan
from shared.secure_sum.config import CONFIG_PAYLOAD_TYPE, Purpose, encode_config
from shared.secure_sum.messages import Advertised, SignedAnswer, decode
from shared.secure_sum.questions import (
    base_digest_of,
    evaluation_question,
    statistics_question,
    training_question,
)
from shared.signing import seal
from shared.tasks.examples import Examples, held_out_rows
from shared.tasks.registry import load_task
from shared.tasks.spec import TaskSpec
from shared.tasks.task import seeded_model
from shared.tasks.vectors import to_vector
from tests.enrolled_homes import ALL_MAY_LEAVE, FLEET, enrol_homes
from tests.unit.edge_agent.sum_fleet import ENCODING, config_of

LINE = TaskSpec(
    "line",
    "tabular",
    {
        "kind": "regression",
        "features": [{"name": "x", "minimum": -1, "maximum": 1}],
        "target": "y",
        "target_minimum": -5,
        "target_maximum": 5,
    },
)
START = np.array([0.0, 0.0], np.float32)
PLAN = TrainingPlan(epochs=2, batch_size=8)


@pytest.fixture(autouse=True)
def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_task_id", "_run_id", "_node_id"):  # what Flower's processes know of themselves
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    x = np.linspace(-1, 1, 100)
    rows = "\n".join(f"{value},{3 * value + 1}" for value in x)
    (tmp_path / "line.csv").write_text(f"x,y\n{rows}\n")
    entry = check_data("mine", tmp_path / "line.csv", LINE, now=datetime(2026, 11, 1, tzinfo=UTC))
    DataRegistry(tmp_path).add(entry)
    enrol_homes({"edge-1": tmp_path}, policy=ALL_MAY_LEAVE)
    return tmp_path


def context_of(home: Path, *, task: TaskSpec = LINE, data: str = "mine") -> Context:
    return Context(
        run_id=1,
        node_id=2,
        node_config={"home": str(home), "data": data},
        state=RecordDict(),
        run_config={"task": msgspec.json.encode(task).decode()},
    )


def train_message(
    parameters: Vector = START, *, min_examples: int = 1, round_: int = 1, seed: int = 7
) -> Message:
    plan = ConfigRecord(
        {
            "json": msgspec.json.encode(PLAN).decode(),
            "round": round_,
            "seed": seed,
            "min_examples": min_examples,
        }
    )
    content = RecordDict({"parameters": ArrayRecord([parameters]), "plan": plan})
    return Message(content, 2, "train")


def no_owner(_: Context) -> NoOwner:
    return NoOwner()


def parameters_in(reply: Message) -> Vector:
    assert reply.has_content(), reply.error
    (vector,) = reply.content.array_records["parameters"].to_numpy_ndarrays()
    return vector


def test_a_train_message_is_answered_with_what_local_training_gives(home: Path) -> None:
    reply = app(train_message(), context_of(home))

    data = load_from_home(context_of(home))
    update = train(data.task, START, data.train, PLAN, seed=device_seed(7, 1, data.digest))
    np.testing.assert_array_equal(parameters_in(reply), update.parameters)
    assert dict(reply.content.metric_records["metrics"]) == {
        "examples": len(data.train),
        **update.sums,
    }


def test_no_run_ever_trains_on_a_held_out_row(home: Path) -> None:
    seen: set[float] = set()

    def watch(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if module.training and isinstance(module, nn.Sequential):  # the whole network of the task
            seen.update(inputs[0][:, 0].tolist())

    watching = register_module_forward_pre_hook(watch)
    try:
        for run_seed, round_number in itertools.product(range(3), range(1, 4)):
            app(train_message(seed=run_seed, round_=round_number), context_of(home))
    finally:
        watching.remove()

    rows = np.linspace(-1, 1, 100).astype(np.float32)
    held_out = held_out_rows(rows[:, np.newaxis])
    assert 3 < held_out.sum() < 20
    assert seen == set(rows[~held_out].tolist())


def test_an_evaluate_message_is_answered_with_sums_over_the_held_out_rows(home: Path) -> None:
    content = RecordDict({"parameters": ArrayRecord([START])})

    reply = app(Message(content, 2, "evaluate"), context_of(home))

    data = load_from_home(context_of(home))
    metrics: MetricRecord = reply.content.metric_records["metrics"]
    assert dict(metrics) == evaluate(data.task, START, data.held_out)
    assert metrics["examples"] == len(data.held_out) > 0


def test_the_reply_does_not_depend_on_where_the_data_lie(home: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "copy.csv").write_bytes((home / "line.csv").read_bytes())
    entry = check_data("copy", elsewhere / "copy.csv", LINE, now=datetime(2026, 11, 1, tzinfo=UTC))
    DataRegistry(elsewhere).add(entry)
    enrol_homes({"edge-2": elsewhere}, policy=ALL_MAY_LEAVE)

    here = app(train_message(), context_of(home))
    there = app(train_message(), context_of(elsewhere, data="copy"))

    np.testing.assert_array_equal(parameters_in(here), parameters_in(there))


def test_each_round_device_and_run_draws_its_own_numbers() -> None:
    seeds = {
        device_seed(seed, round_number, digest)
        for seed in range(3)
        for round_number in range(3)
        for digest in ("a", "b")
    }

    assert len(seeds) == 18
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_data_are_read_once_for_all_messages_of_a_run(home: Path) -> None:
    first = load_from_home(context_of(home))
    (home / "line.csv").unlink()

    assert load_from_home(context_of(home)) is first


def failure_of(reply: Message) -> str:
    assert reply.has_error()
    reason = reply.error.reason
    assert reason is not None
    assert "\n" not in reason
    return reason


def test_a_device_with_too_few_examples_says_so_but_not_how_many_it_has(home: Path) -> None:
    reply = app(train_message(min_examples=1000), context_of(home))

    assert failure_of(reply).startswith("fewer than 1024 training examples here")


def test_nothing_leaves_in_plain_rounds_unless_the_owner_allows_it(home: Path) -> None:
    (home / "policy.toml").unlink()
    evaluation = Message(RecordDict({"parameters": ArrayRecord([START])}), 2, "evaluate")

    for message in (train_message(), evaluation):
        reason = failure_of(app(message, context_of(home)))
        assert "individual_updates = false in policy.toml" in reason


def test_an_error_in_the_task_s_own_code_is_not_told_in_its_words() -> None:
    def load(_: Context) -> LocalData:
        raise ValueError("row 17 says 'secret'")

    reply = build_client_app(load, sums_of=no_owner)(train_message(), context_of(Path("nowhere")))

    assert failure_of(reply) == "ValueError in the client app; see the log on the device"


def test_a_run_about_another_task_is_refused(home: Path) -> None:
    other = TaskSpec("line", "tabular", {**LINE.options, "model": "mlp"})
    unknown = TaskSpec("pumps", "os:system")

    assert "were added for another form of it" in failure_of(
        app(train_message(), context_of(home, task=other))
    )
    assert failure_of(app(train_message(), context_of(home, task=unknown))) == (
        "no data for task 'pumps'"
    )
    assert "data 'yours' do not serve task 'line'" in failure_of(
        app(train_message(), context_of(home, data="yours"))
    )


def test_data_that_broke_since_are_reported_without_telling_what_they_hold(home: Path) -> None:
    (home / "line.csv").write_text("x,y\n1,secret\n")

    reason = failure_of(app(train_message(), context_of(home)))

    assert reason == (
        "the data for this task no longer fit it; the owner sees why with `shoal-agent data check`"
    )


def without_plan(message: Message) -> None:
    del message.content["plan"]


def with_another_plan(message: Message) -> None:
    message.content.config_records["plan"]["json"] = '{"epoch": 3}'


def without_parameters(message: Message) -> None:
    del message.content["parameters"]


def with_two_vectors(message: Message) -> None:
    message.content["parameters"] = ArrayRecord([START, START])


def with_doubles(message: Message) -> None:
    message.content["parameters"] = ArrayRecord([START.astype(np.float64)])


def with_another_network(message: Message) -> None:
    message.content["parameters"] = ArrayRecord([np.zeros(3, np.float32)])


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (without_plan, "training plan in the message does not fit: Object missing required field"),
        (with_another_plan, "does not fit: Object contains unknown field `epoch`"),
        (without_parameters, "holds no single vector of parameters"),
        (with_two_vectors, "holds no single vector of parameters"),
        (with_doubles, "in place of a float32 vector"),
        (with_another_network, "do not fit a model of 2 parameters"),
    ],
)
def test_a_message_that_breaks_the_schema_is_answered_with_the_reason(
    home: Path, spoil: Callable[[Message], None], sentence: str
) -> None:
    message = train_message()
    spoil(message)

    assert sentence in failure_of(app(message, context_of(home)))


def test_a_node_without_a_home_is_told_what_to_write(home: Path) -> None:
    context = context_of(home)
    context.node_config = {}

    assert "names no home; give --node-config 'home=" in failure_of(app(train_message(), context))


def test_training_that_is_told_to_stop_is_answered_with_that(home: Path) -> None:
    stopping = build_client_app(load_from_home, sums_of=no_owner, should_stop=lambda: True)

    assert failure_of(stopping(train_message(), context_of(home))) == "training was stopped"


def test_a_simulation_may_bring_its_own_data() -> None:
    task = load_task(LINE)
    x = np.linspace(-1, 1, 50, dtype=np.float32)
    examples = Examples(x[:, np.newaxis], 3 * x + 1)
    client = build_client_app(
        lambda _: LocalData(task, examples, examples, examples.digest()), sums_of=no_owner
    )

    reply = client(train_message(to_vector(seeded_model(task, 0))), context_of(Path("nowhere")))

    assert parameters_in(reply).shape == (2,)


def test_a_loader_that_finds_nothing_is_an_answer_too() -> None:
    def load(_: Context) -> LocalData:
        raise DataError("no data for task 'line'")

    reply = build_client_app(load, sums_of=no_owner)(train_message(), context_of(Path("nowhere")))

    assert failure_of(reply) == "no data for task 'line'"


def test_in_a_secure_round_the_reply_holds_a_signed_answer_and_nothing_else(
    tmp_path: Path, home: Path
) -> None:
    replies = secure_replies(home, tmp_path, "min_cohort = 3\nexact_sums = true\n")

    for reply in replies:
        assert reply.has_content(), reply.error
        assert list(reply.content) == ["sum"]
        assert list(reply.content.config_records["sum"]) == ["answer"]
        answer = decode(cast("bytes", reply.content["sum"]["answer"]), SignedAnswer)
        assert answer.refusal == ""
        decode(answer.body, Advertised)


def test_a_sum_that_the_owner_does_not_allow_is_refused_before_anything_is_trained(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_on_rows(monkeypatch, AssertionError("the owner said no"))
    for reply in secure_replies(home, tmp_path, "exact_sums = true\n"):
        assert "min_cohort = 18 in policy.toml" in failure_of(reply)


def test_parameters_other_than_those_signed_for_are_refused(tmp_path: Path, home: Path) -> None:
    policy = "min_cohort = 3\nexact_sums = true\n"
    for reply in secure_replies(home, tmp_path, policy, parameters=START + 1):
        assert "the parameters that came with this sum" in failure_of(reply)


def test_training_that_is_stopped_is_a_signed_refusal_with_its_reason(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_on_rows(monkeypatch, StoppedError("training was stopped"))
    trained, *_ = secure_replies(home, tmp_path, "min_cohort = 3\nexact_sums = true\n")

    answer = decode(cast("bytes", trained.content["sum"]["answer"]), SignedAnswer)
    assert (answer.body, answer.refusal) == (b"", "training was stopped")


def test_what_a_task_says_about_its_rows_goes_no_further(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fail_on_rows(monkeypatch, DataError("row 3 is of Mrs Jones"))
    trained, *others = secure_replies(home, tmp_path, "min_cohort = 3\nexact_sums = true\n")

    answer = decode(cast("bytes", trained.content["sum"]["answer"]), SignedAnswer)
    assert answer.body
    assert answer.refusal == ""
    assert "zeros go into the sum" in caplog.text
    assert not any("Mrs Jones" in str(reply) for reply in (trained, *others))


def test_training_that_diverges_goes_into_the_sum_as_zeros(
    tmp_path: Path, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # The coordinator chooses the parameters: a refusal would answer whatever it wants to know of
    # this one device's rows, at no charge.
    policy = "min_cohort = 3\nexact_sums = true\n"
    huge = np.array([3e38, 3e38], np.float32)

    trained, evaluated, *_ = secure_replies(home, tmp_path, policy, parameters=huge, signed=huge)

    assert "training diverged" in caplog.text
    for reply in (trained, evaluated):
        answer = decode(cast("bytes", reply.content["sum"]["answer"]), SignedAnswer)
        assert answer.refusal == ""
        decode(answer.body, Advertised)


def test_a_task_that_fails_on_its_rows_goes_into_the_sum_as_nothing(
    tmp_path: Path, home: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_on_rows(monkeypatch, RuntimeError("all elements of input should be between 0 and 1"))

    trained, evaluated, *_ = secure_replies(home, tmp_path, "min_cohort = 3\nexact_sums = true\n")

    assert "zeros go into the sum" in caplog.text
    for reply in (trained, evaluated):
        answer = decode(cast("bytes", reply.content["sum"]["answer"]), SignedAnswer)
        assert answer.refusal == ""
        decode(answer.body, Advertised)


def test_what_a_device_lacks_is_told_without_its_paths(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lack(*_: object, **__: object) -> None:
        raise UnavailableError(f"cannot use {home}/privacy.db: disk full")

    monkeypatch.setattr(training_app, "_parameters_in", lack)

    reason = failure_of(app(train_message(), context_of(home)))

    assert reason == "something this device needs is not there now; see the log on the device"


def test_a_sum_for_another_purpose_than_the_message_is_declined(tmp_path: Path, home: Path) -> None:
    policy = "min_cohort = 3\nexact_sums = true\n"
    trained, *_ = secure_replies(home, tmp_path, policy, purpose="evaluate")

    answer = decode(cast("bytes", trained.content["sum"]["answer"]), SignedAnswer)
    assert answer.refusal == "a sum to evaluate came with a message to train"


def test_stages_without_their_record_are_refused(home: Path) -> None:
    for stage in ("share", "mask", "consent", "reveal"):
        reply = app(Message(RecordDict({}), 2, f"query.{stage}"), context_of(home))
        assert failure_of(reply) == "the message's record 'sum' holds no session"


def test_statistics_leave_in_no_other_way_than_a_sum(home: Path) -> None:
    question = ConfigRecord({"json": '{"of": [{"kind": "count"}]}'})
    message = Message(RecordDict({"statistics": question}), 2, "query.statistics")

    assert failure_of(app(message, context_of(home))) == (
        "statistics leave a device only in a secure sum"
    )


def fail_on_rows(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Let whatever the task is asked to do with rows end in ``error``."""

    def fail(*_: object, **__: object) -> None:
        raise error

    for name in ("train", "evaluate"):
        monkeypatch.setattr(training_app, name, fail)


def secure_replies(
    home: Path,
    folder: Path,
    policy: str,
    *,
    parameters: Vector = START,
    signed: Vector = START,
    purpose: Purpose | None = None,
) -> list[Message]:
    """Return what a device replies to a train, an evaluate and a statistics message.

    Args:
        home: its home.
        folder: holds it; for its peers' homes.
        policy: of its owner.
        parameters: what is sent.
        signed: what the configurations name.
        purpose: what the first configuration is for, instead of training.
    """
    peers = {f"edge-{number}": folder / f"home-{number}" for number in (2, 3)}
    enrolled = enrol_homes({"edge-1": home, **peers}, policy=policy)
    sums = SecureSums(home)
    client = build_client_app(load_from_home, sums_of=lambda _: sums)

    def sealed(**fields: Any) -> ConfigRecord:
        config = config_of(
            fleet=FLEET,
            task_digest=LINE.digest,
            expires_at=utc_now() + timedelta(hours=1),
            **fields,
        )
        content = seal(
            encode_config(config), payload_type=CONFIG_PAYLOAD_TYPE, key=enrolled.command_key
        )
        return ConfigRecord({"config": content})

    train_ = train_message(parameters)
    plan = str(train_.content.config_records["plan"]["json"]).encode()
    train_.content["sum"] = sealed(
        purpose=purpose or "train",
        question_digest=training_question(plan),
        base_digest=base_digest_of(signed),
        encoding=structs.replace(ENCODING, length=2),
    )
    evaluate_ = Message(RecordDict({"parameters": ArrayRecord([parameters])}), 2, "evaluate")
    evaluate_.content["sum"] = sealed(
        purpose="evaluate",
        question_digest=evaluation_question(),
        base_digest=base_digest_of(signed),
        encoding=structs.replace(ENCODING, length=0),
    )
    question = b'{"of": [{"kind": "count"}]}'
    statistics = ConfigRecord({"json": question.decode()})
    ask = Message(RecordDict({"statistics": statistics}), 2, "query.statistics")
    ask.content["sum"] = sealed(
        purpose="statistics",
        question_digest=statistics_question(question),
        base_digest=None,
        encoding=structs.replace(ENCODING, length=2),
        exact_lanes=(),
    )
    messages = [train_, evaluate_]
    if parameters is START and purpose is None:
        messages.append(ask)
    with sums:
        return [client(message, context_of(home)) for message in messages]
