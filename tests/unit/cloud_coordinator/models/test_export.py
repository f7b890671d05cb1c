from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cloud_coordinator.models.export import OPSET, TrainedModel, without_traces
from cloud_coordinator.models.parity import open_session, run
from shared.errors import UnfitModelError
from shared.manifest import TensorSpec
from shared.tasks.contract import DataContract, ImageShape
from shared.tasks.registry import load_task
from shared.tasks.spec import TaskSpec
from shared.tasks.task import Task, seeded_model
from shared.tasks.vectors import to_vector

CLASSES = [f"class-{i}" for i in range(10)]
IMAGE = {"height": 28, "width": 28, "labels": CLASSES}
COLUMNS = [{"name": name, "minimum": 0.0, "maximum": 9.0} for name in ("age", "height", "weight")]
BUILT_IN: dict[str, tuple[str, dict[str, Any]]] = {
    "small-cnn": ("image-classification", IMAGE),
    "lenet-5": ("image-classification", IMAGE | {"model": "lenet-5"}),
    "colour": ("image-classification", IMAGE | {"channels": 3, "height": 16, "width": 20}),
    "tabular-classes": (
        "tabular",
        {
            "kind": "classification",
            "model": "mlp",
            "features": COLUMNS,
            "target": "sick",
            "labels": ["no", "yes"],
        },
    ),
    "tabular-number": (
        "tabular",
        {
            "kind": "regression",
            "model": "linear",
            "features": COLUMNS,
            "target": "days",
            "target_minimum": 0.0,
            "target_maximum": 90.0,
        },
    ),
}


class ConfidentialTrickLayer(nn.Module):
    """A layer whose name and source nobody outside should read."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, pixels: Tensor) -> Tensor:
        secret_recipe = self.norm(self.convolution(pixels / 255))
        return torch.relu(secret_recipe).mean(dim=(2, 3))


class DecidesByValue(nn.Module):
    """A network whose graph depends on the values in it, which no export can hold."""

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels[:, 0, 0, :4] if pixels.sum() > 0 else -pixels[:, 0, 0, :4]


class TrickTask(Task):
    """A task outside the built-in ones; options can make it break its promises."""

    primary_metric = "accuracy"

    def __init__(self, outputs: int, datatype: str) -> None:
        self._outputs, self._datatype = outputs, datatype

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        return cls(options.get("outputs", 4), options.get("datatype", "FP32"))

    @property
    def contract(self) -> DataContract:
        return DataContract(sources=("npz",), image=ImageShape(6, 6), labels=tuple("abcd"))

    @property
    def input(self) -> TensorSpec:
        return TensorSpec("pixels", self._datatype, (-1, 1, 6, 6))

    @property
    def output(self) -> TensorSpec:
        return TensorSpec("logits", "FP32", (-1, self._outputs))

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple("abcd")

    def build_model(self) -> nn.Module:
        return ConfidentialTrickLayer()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets)

    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        return {"examples": float(len(outputs)), "loss_sum": float(self.loss(outputs, targets))}

    def summarize(self, sums: Mapping[str, float]) -> dict[str, float]:
        return dict(sums)

    def example_inputs(self, rng: np.random.Generator, rows: int) -> NDArray[Any]:
        return rng.uniform(0, 255, (rows, 1, 6, 6))


def trained(task: Task) -> TrainedModel:
    return TrainedModel(task, to_vector(seeded_model(task, 0)))


def inputs_of(task: Task, rows: int) -> NDArray[np.float32]:
    return task.example_inputs(np.random.default_rng(1), rows).astype(np.float32)


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_task_exports_to_a_graph_that_computes_the_same_for_any_batch(name: str) -> None:
    uses, options = BUILT_IN[name]
    task = load_task(TaskSpec("built-in", uses, options))
    model = trained(task)
    session = open_session(model.to_onnx(np.random.default_rng(0)).SerializeToString(), {})
    for rows in (1, 2, 7):
        inputs = inputs_of(task, rows)
        truth = model.outputs(inputs)
        (outputs,) = session.run([task.output.name], {task.input.name: inputs})
        assert np.asarray(outputs).shape == truth.shape
        np.testing.assert_allclose(np.asarray(outputs), truth, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def trick_export() -> onnx.ModelProto:
    return trained(TrickTask(4, "FP32")).to_onnx(np.random.default_rng(0))


def test_nothing_of_the_source_code_is_in_the_file(trick_export: onnx.ModelProto) -> None:
    content = trick_export.SerializeToString()
    for leak in (
        b"ConfidentialTrickLayer",
        b"secret_recipe",
        b"test_export",
        b".py",
        b"site-packages",
        b"File ",
        b"stack_trace",
        b"torch",
        b"aten",
        b"BatchNorm2d",
    ):
        assert leak not in content


def test_the_exporter_would_have_leaked_it() -> None:
    node = onnx.helper.make_node("Relu", ["x"], ["y"], doc_string="File secret.py")
    node.metadata_props.add(key="pkg.torch.onnx.stack_trace", value="File secret.py")
    graph = onnx.helper.make_graph([node], "g", [], [], doc_string="secret.py")
    outer = onnx.helper.make_node("If", ["c"], ["z"], then_branch=graph, else_branch=graph)
    function = onnx.helper.make_function(
        "secret.py", "f", ["x"], ["y"], [node], [onnx.helper.make_opsetid("", 20)]
    )
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node, outer], "secret.py", [], []), functions=[function]
    )
    function_domain = without_traces(model)
    function_domain.functions[0].ClearField("domain")  # a name that calls depend on
    assert b"secret.py" in model.SerializeToString()
    assert b"secret.py" not in function_domain.SerializeToString()


def test_normalisation_is_exported_as_it_serves_and_not_as_it_trains(
    trick_export: onnx.ModelProto,
) -> None:
    model = trained(TrickTask(4, "FP32"))
    inputs = inputs_of(model.task, 7)
    outputs = run(open_session(trick_export.SerializeToString(), {}), inputs)
    np.testing.assert_allclose(outputs, model.outputs(inputs), rtol=1e-4, atol=1e-5)


def test_the_graph_is_valid_whole_and_of_the_opset_that_was_asked_for(
    trick_export: onnx.ModelProto,
) -> None:
    onnx.checker.check_model(trick_export, full_check=True)
    assert [(o.domain, o.version) for o in trick_export.opset_import] == [("", OPSET)]
    assert not any(tensor.external_data for tensor in trick_export.graph.initializer)
    batch = trick_export.graph.input[0].type.tensor_type.shape.dim[0]
    assert batch.dim_param == "batch"


def test_a_network_that_breaks_its_tasks_promise_is_unfit() -> None:
    with pytest.raises(UnfitModelError, match=r"output is logits of shape \(-1, 4\), but .* 5"):
        trained(TrickTask(5, "FP32")).to_onnx(np.random.default_rng(0))


def test_a_network_that_torch_cannot_export_is_unfit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrickTask, "build_model", lambda _task: DecidesByValue())
    with pytest.raises(UnfitModelError, match="torch cannot export this network"):
        trained(TrickTask(4, "FP32")).to_onnx(np.random.default_rng(0))


def test_an_input_that_cannot_be_shipped_is_refused() -> None:
    with pytest.raises(UnfitModelError, match="only FP32"):
        trained(TrickTask(4, "INT64"))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda vector: vector[:-1], "do not fit"),
        (lambda vector: np.full_like(vector, np.nan), "NaN"),
    ],
)
def test_parameters_of_another_network_or_of_none_are_unfit(spoil: Any, words: str) -> None:
    task = TrickTask(4, "FP32")
    with pytest.raises(UnfitModelError, match=words):
        TrainedModel(task, spoil(to_vector(seeded_model(task, 0))))
