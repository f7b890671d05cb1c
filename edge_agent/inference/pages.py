"""Everything beside inference: health, metadata and metrics, which nobody calls a thousand times.

Loading and unloading belong to the coordinator, so the protocol's model repository extension is
answered for its index alone and not announced.
"""

from importlib.metadata import version as version_of
from typing import Any

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from edge_agent.inference import feedback, protocol
from edge_agent.inference.answering import Answering
from edge_agent.inference.live import Served
from edge_agent.inference.metrics import Metrics
from edge_agent.inference.protocol import RequestError
from shared.manifest import TensorSpec

_NOT_READY = 400  # the protocol asks for a 4xx where ready is false


def build_pages(answering: Answering, metrics: Metrics) -> Starlette:
    """Return the ASGI app of all paths but inference."""
    pages = _Pages(answering, metrics)
    model = "/v2/models/{model}"
    versioned = f"{model}/versions/{{version}}"
    return Starlette(
        routes=[
            Route("/v2", pages.server_metadata),
            Route("/v2/health/live", pages.live),
            Route("/v2/health/ready", pages.ready),
            Route(model, pages.model_metadata),
            Route(versioned, pages.model_metadata),
            Route(f"{model}/ready", pages.model_ready),
            Route(f"{versioned}/ready", pages.model_ready),
            Route(f"{model}/config", pages.model_config),
            Route(f"{versioned}/config", pages.model_config),
            Route("/v2/repository/index", pages.index, methods=["POST"]),
            Route("/v2/repository/models/{model}/{verb}", pages.refuse_loading, methods=["POST"]),
            Route("/v1/feedback", pages.feedback, methods=["POST"]),
            Route("/metrics", pages.metrics),
        ],
        exception_handlers={HTTPException: _as_json, RequestError: _refused},
    )


class _Pages:
    def __init__(self, answering: Answering, metrics: Metrics) -> None:
        self._answering, self._metrics = answering, metrics

    async def server_metadata(self, _request: Request) -> Response:
        return JSONResponse(
            {
                "name": "shoal-agent",
                "version": version_of("shoal"),
                "extensions": ["binary_tensor_data"],
            }
        )

    async def live(self, _request: Request) -> Response:
        return JSONResponse({"live": True})

    async def ready(self, _request: Request) -> Response:
        ready = self._answering.live.now is not None
        return JSONResponse({"ready": ready}, status_code=200 if ready else _NOT_READY)

    async def model_metadata(self, request: Request) -> Response:
        return JSONResponse(_metadata(self._served(request)))

    async def model_ready(self, request: Request) -> Response:
        self._served(request)
        return JSONResponse({"ready": True})

    async def model_config(self, request: Request) -> Response:
        return JSONResponse(_config(self._served(request)))

    async def index(self, _request: Request) -> Response:
        now = self._answering.live.now
        rows: list[dict[str, str]] = []
        if now is not None:
            row = {"name": now.manifest.model, "version": now.version}
            rows.append({**row, "state": "READY", "reason": ""})
        return JSONResponse(rows)

    async def refuse_loading(self, _request: Request) -> Response:
        raise RequestError(protocol.NO_LOADING, status=403)

    async def feedback(self, request: Request) -> Response:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > feedback.MAX_BODY_BYTES:
                raise protocol.too_large(feedback.MAX_BODY_BYTES)
        receipt = self._answering.feedback.accept(bytes(body))
        return Response(msgspec.json.encode(receipt), media_type="application/json")

    async def metrics(self, _request: Request) -> Response:
        return Response(self._metrics.render(), headers={"content-type": CONTENT_TYPE_LATEST})

    def _served(self, request: Request) -> Served:
        path = request.path_params
        return self._answering.served_as(path["model"], path.get("version"))


def _metadata(served: Served) -> dict[str, Any]:
    manifest = served.manifest
    return {
        "name": manifest.model,
        "versions": [served.version],
        "platform": "onnxruntime_onnx",
        "inputs": [_tensor(spec) for spec in manifest.inputs],
        "outputs": [_tensor(spec) for spec in manifest.outputs],
        "parameters": {
            "artifact": served.artifact.sha256,
            "variant": served.artifact.variant,
            "labels": list(manifest.labels),
            "execution_provider": served.provider,
        },
    }


def _config(served: Served) -> dict[str, Any]:
    """Return what Triton's clients call the model's configuration.

    Its ``max_batch_size`` of 0 says that shapes are given whole, the batch among them.
    """
    manifest = served.manifest
    provider = {"string_value": served.provider}
    return {
        "name": manifest.model,
        "platform": "onnxruntime_onnx",
        "backend": "onnxruntime",
        "max_batch_size": 0,
        "input": [_configured(spec) for spec in manifest.inputs],
        "output": [_configured(spec) for spec in manifest.outputs],
        "parameters": {"execution_provider": provider},
    }


def _configured(spec: TensorSpec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "data_type": f"TYPE_{spec.datatype}",
        "dims": list(spec.shape),
    }


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}


async def _refused(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return JSONResponse({"error": str(error)}, status_code=error.status)


async def _as_json(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse(
        {"error": error.detail}, status_code=error.status_code, headers=error.headers
    )
