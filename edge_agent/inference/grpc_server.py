"""The Open Inference Protocol v2 over gRPC: another way in to the same answers.

Loaded only where the owner gives it a port, and the only module that imports grpc. A call costs
about three times the CPU of one over HTTP; it is here for programs that speak nothing else.
"""

import time
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from importlib.metadata import version as version_of
from typing import Any

import grpc
import numpy as np

from edge_agent.inference import protocol
from edge_agent.inference.answering import Answer, Answering
from edge_agent.inference.engine import DTYPES, Array
from edge_agent.inference.live import Served
from edge_agent.inference.metrics import Metrics
from edge_agent.inference.oip_messages import SERVICE, message
from edge_agent.inference.protocol import InferRequest, RequestError
from shared.errors import UnfitModelError
from shared.manifest import TensorSpec

# Together they bound what requests in flight may hold; larger ones go over HTTP.
MAX_MESSAGE_BYTES = 4 * 1024 * 1024
_MOST_AT_ONCE = 64
_CODES = {
    HTTPStatus.BAD_REQUEST: grpc.StatusCode.INVALID_ARGUMENT,
    HTTPStatus.FORBIDDEN: grpc.StatusCode.PERMISSION_DENIED,
    HTTPStatus.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
}
_CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
}
_Handler = Callable[[Any], Awaitable[Any]]


async def start_grpc(answering: Answering, metrics: Metrics, address: str) -> Any:
    """Return a started ``grpc.aio.Server`` on ``address``, host:port, which others may have bound.

    The daemon keeps the port bound, without listening, so that it stays ours over restarts.
    """
    server = grpc.aio.server(
        options=[
            ("grpc.so_reuseport", 1),
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ],
        maximum_concurrent_rpcs=_MOST_AT_ONCE,
    )
    calls = _Calls(answering, metrics).by_name()
    methods = {name: _method(name, handler) for name, handler in calls.items()}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
    server.add_insecure_port(address)
    await server.start()
    return server


def _method(name: str, handler: _Handler) -> Any:
    async def answer(request: Any, context: Any) -> Any:
        try:
            return await handler(request)
        except RequestError as error:
            code = _CODES.get(HTTPStatus(error.status), grpc.StatusCode.RESOURCE_EXHAUSTED)
            await context.abort(code, str(error))
        except UnfitModelError as error:
            await context.abort(grpc.StatusCode.INTERNAL, str(error))

    return grpc.unary_unary_rpc_method_handler(
        answer,
        request_deserializer=message(f"{name}Request").FromString,
        response_serializer=message(f"{name}Response").SerializeToString,
    )


class _Calls:
    """What each call answers."""

    def __init__(self, answering: Answering, metrics: Metrics) -> None:
        self._answering, self._metrics = answering, metrics

    def by_name(self) -> Mapping[str, _Handler]:
        return {
            "ServerLive": self.server_live,
            "ServerReady": self.server_ready,
            "ServerMetadata": self.server_metadata,
            "ModelReady": self.model_ready,
            "ModelMetadata": self.model_metadata,
            "ModelInfer": self.model_infer,
            "RepositoryIndex": self.repository_index,
            "RepositoryModelLoad": self.refuse_loading,
            "RepositoryModelUnload": self.refuse_loading,
        }

    async def server_live(self, _request: Any) -> Any:
        return message("ServerLiveResponse")(live=True)

    async def server_ready(self, _request: Any) -> Any:
        return message("ServerReadyResponse")(ready=self._answering.live.now is not None)

    async def server_metadata(self, _request: Any) -> Any:
        return message("ServerMetadataResponse")(name="shoal-agent", version=version_of("shoal"))

    async def model_ready(self, request: Any) -> Any:
        try:
            self._served(request)
        except RequestError:
            return message("ModelReadyResponse")(ready=False)
        return message("ModelReadyResponse")(ready=True)

    async def model_metadata(self, request: Any) -> Any:
        served = self._served(request)
        return message("ModelMetadataResponse")(
            name=served.manifest.model,
            versions=[served.version],
            platform="onnxruntime_onnx",
            inputs=[_described(spec) for spec in served.manifest.inputs],
            outputs=[_described(spec) for spec in served.manifest.outputs],
        )

    async def model_infer(self, request: Any) -> Any:
        started = time.perf_counter()
        status = 500
        try:
            asked = _understood(request)
            version = request.model_version or None
            answer = await self._answering.infer(request.model_name, version, asked)
            response = _response(asked, answer)
            status = 200
        except RequestError as error:
            status = error.status
            raise
        finally:
            self._metrics.answered(status, time.perf_counter() - started)
        return response

    async def repository_index(self, _request: Any) -> Any:
        now = self._answering.live.now
        response = message("RepositoryIndexResponse")()
        if now is not None:
            response.models.add(name=now.manifest.model, version=now.version, state="READY")
        return response

    async def refuse_loading(self, _request: Any) -> Any:
        raise RequestError(protocol.NO_LOADING, status=403)

    def _served(self, request: Any) -> Served:
        return self._answering.served_as(request.name, request.version or None)


def _understood(request: Any) -> InferRequest:
    """Read an infer request; raise RequestError where it breaks the protocol."""
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise RequestError(f"{len(request.inputs)} inputs came with {len(raw)} raw contents")
    tensors: dict[str, tuple[str, Array]] = {}
    for index, tensor in enumerate(request.inputs):
        if tensor.name in tensors:
            raise RequestError(f"input {tensor.name!r} is given twice")
        _refuse_unoffered(tensor)
        values = (
            protocol.from_bytes(tensor.name, tensor.datatype, tuple(tensor.shape), raw[index])
            if raw
            else _from_contents(tensor)
        )
        tensors[tensor.name] = (tensor.datatype, values)
    for output in request.outputs:
        _refuse_unoffered(output)
    outputs = {output.name: True for output in request.outputs}
    return InferRequest(request.id or None, tensors, outputs, binary=True)


def _from_contents(tensor: Any) -> Array:
    """Read the numbers of a tensor that came without raw contents."""
    if tensor.datatype not in _CONTENTS:
        known = ", ".join(DTYPES)
        raise RequestError(
            f"input {tensor.name!r} has type {tensor.datatype!r}; known are {known}, FP16 in raw "
            "contents alone"
        )
    numbers = np.array(getattr(tensor.contents, _CONTENTS[tensor.datatype]))
    return protocol.from_numbers(tensor.name, tensor.datatype, tuple(tensor.shape), numbers)


def _refuse_unoffered(tensor: Any) -> None:
    for name in ("shared_memory_region", "classification"):
        if name in tensor.parameters:
            raise RequestError(f"{name} is not offered; {tensor.name!r} is a plain tensor")


def _response(asked: InferRequest, answer: Answer) -> Any:
    manifest = answer.served.manifest
    response = message("ModelInferResponse")(
        model_name=manifest.model, model_version=answer.served.version, id=asked.id or ""
    )
    if answer.number is not None:
        response.parameters["shoal_answer"].int64_param = answer.number
    for spec, values in zip(manifest.outputs, answer.results, strict=True):
        if asked.outputs and spec.name not in asked.outputs:
            continue
        response.outputs.add(name=spec.name, datatype=spec.datatype, shape=values.shape)
        content = np.ascontiguousarray(values, DTYPES[spec.datatype]).tobytes()
        response.raw_output_contents.append(content)
    return response


def _described(spec: TensorSpec) -> Any:
    return message("TensorMetadata")(name=spec.name, datatype=spec.datatype, shape=spec.shape)
