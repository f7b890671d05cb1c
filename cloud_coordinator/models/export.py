"""From a parameter vector to one clean ONNX file: the pipeline's door to torch.

The traps of torch's dynamo exporter that are handled here were measured with torch 2.13: weights
go into a second file by default, every node carries the source lines it came from, an example
batch of one makes the batch a constant, and a requested opset is not always the one that comes out.
"""

import copy
import warnings
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import nn
from torch.export import Dim

from shared.errors import PeerError, UnfitModelError
from shared.manifest import TensorSpec
from shared.parameters import Vector
from shared.tasks.task import Task
from shared.tasks.vectors import load_vector

OPSET = 20
_EXAMPLE_ROWS = 3  # at least two, or the exporter takes the batch for a constant
_PRODUCER = "shoal"
_ONNX_TYPES = {"FP32": onnx.TensorProto.FLOAT}


class TrainedModel:
    """A task's network with trained parameters, ready to be asked and to be exported."""

    def __init__(self, task: Task, parameters: Vector) -> None:
        """Build the network and load ``parameters``, shape (d,).

        Raises:
            UnfitModelError: the parameters are of another network or not finite, or the task's
                input is of a kind that cannot be shipped.
        """
        if task.input.datatype not in _ONNX_TYPES or task.output.datatype not in _ONNX_TYPES:
            raise UnfitModelError(
                f"the task maps {task.input.datatype} to {task.output.datatype}; "
                "only FP32 inputs and outputs can be exported"
            )
        self.task = task
        self._model: nn.Module = task.build_model()
        try:
            load_vector(self._model, parameters)
        except PeerError as error:
            raise UnfitModelError(f"these parameters cannot be exported: {error}") from error
        self._model.eval()

    def outputs(self, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return what torch computes for ``inputs``, shape (b, …): the truth for every variant."""
        with torch.inference_mode():
            # A copy, because torch refuses to borrow arrays that cannot be written.
            result: NDArray[np.float32] = self._model(torch.tensor(inputs)).numpy()
        return result

    def to_onnx(self, rng: np.random.Generator) -> onnx.ModelProto:
        """Export the network as one self-contained graph with a free batch dimension.

        Args:
            rng: draws the example batch that the exporter traces with.

        Raises:
            UnfitModelError: the network cannot be exported, or the graph that comes out is not
                what the task's contract promises.
        """
        example = self.task.example_inputs(rng, _EXAMPLE_ROWS).astype(np.float32)
        try:
            with warnings.catch_warnings():
                # torch 2.13 warns about its own use of its own deprecated tree specs.
                warnings.simplefilter("ignore", FutureWarning)
                program = torch.onnx.export(
                    self._model,
                    (torch.tensor(example),),
                    dynamo=True,
                    external_data=False,
                    opset_version=OPSET,
                    input_names=[self.task.input.name],
                    output_names=[self.task.output.name],
                    dynamic_shapes=({0: Dim("batch", min=1)},),
                    verbose=False,
                )
        except torch.onnx.OnnxExporterError as error:
            reason = str(error).strip().splitlines()[0]
            raise UnfitModelError(f"torch cannot export this network: {reason}") from error
        assert program is not None  # only the old exporter returns None
        model = without_traces(program.model_proto)
        _check(model, self.task)
        return model


def without_traces(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy without anything that tells of the source code: traces, notes, hints.

    Computing does not change; a small model loses up to half its bytes.
    """
    clean = copy.deepcopy(model)
    for field in ("metadata_props", "doc_string", "producer_version", "domain"):
        clean.ClearField(field)
    clean.producer_name = _PRODUCER
    clean.graph.name = "model"
    _clear_graph(clean.graph)
    for function in clean.functions:
        for field in ("metadata_props", "doc_string", "value_info"):
            function.ClearField(field)
        _clear_nodes(function.node)
    return clean


def _clear_graph(graph: Any) -> None:
    for field in ("metadata_props", "doc_string", "value_info"):
        graph.ClearField(field)
    for value in (*graph.input, *graph.output, *graph.initializer):
        value.ClearField("metadata_props")
        value.ClearField("doc_string")
    _clear_nodes(graph.node)


def _clear_nodes(nodes: Any) -> None:
    for node in nodes:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
        for attribute in node.attribute:
            attribute.ClearField("doc_string")
            for graph in (attribute.g, *attribute.graphs):
                if graph.ByteSize():
                    _clear_graph(graph)


def _check(model: onnx.ModelProto, task: Task) -> None:
    """Raise UnfitModelError unless the graph is valid and keeps the task's promises."""
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise UnfitModelError(f"torch exported an invalid graph: {error}") from error
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    if opsets.get("") != OPSET:
        raise UnfitModelError(f"torch exported opset {opsets.get('')} where {OPSET} was asked for")
    _check_signature("input", model.graph.input, task.input)
    _check_signature("output", model.graph.output, task.output)


def _check_signature(role: str, values: Any, promised: TensorSpec) -> None:
    found = [(value.name, value.type.tensor_type.elem_type, _shape_of(value)) for value in values]
    wanted = (promised.name, _ONNX_TYPES[promised.datatype], promised.shape)
    if found != [wanted]:
        shapes = ", ".join(f"{name} of shape {shape}" for name, _, shape in found)
        raise UnfitModelError(
            f"the network's {role} is {shapes or 'missing'}, but the task promises "
            f"{promised.name} of shape {promised.shape}; mend the task's {role}"
        )


def _shape_of(value: Any) -> tuple[int, ...]:
    """Return the sizes of a graph's value, -1 where a size is free."""
    dimensions = value.type.tensor_type.shape.dim
    return tuple(d.dim_value if d.HasField("dim_value") else -1 for d in dimensions)
