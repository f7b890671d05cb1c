"""A client of the Open Inference Protocol v2 over HTTP with binary tensors, as small as it gets.

The tests use NVIDIA's `tritonclient`; the demo uses this one, on the standard library alone, so
that its latencies are the server's and hardly the client's.
"""

import http.client
import json
import socket
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from shared.errors import UnavailableError

_HEADER_LENGTH = "Inference-Header-Content-Length"


class InferenceClient:
    """One served model at one address, such as ``http://127.0.0.1:8480``."""

    def __init__(self, address: str, model: str, *, timeout_s: float = 10.0) -> None:
        self._http = http.client.HTTPConnection(urlsplit(address).netloc, timeout=timeout_s)
        self._http.connect()
        self._http.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._path = f"/v2/models/{model}"
        metadata = json.loads(self._exchange("GET", self._path)[1])
        self._input: str = metadata["inputs"][0]["name"]
        self.versions: list[str] = metadata["versions"]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._http.close()

    def infer(self, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the model's outputs, shape (b, …), for inputs of shape (b, …)."""
        body = inputs.astype("<f4", copy=False).tobytes()
        header = json.dumps(
            {
                "inputs": [
                    {
                        "name": self._input,
                        "datatype": "FP32",
                        "shape": list(inputs.shape),
                        "parameters": {"binary_data_size": len(body)},
                    }
                ],
                "parameters": {"binary_data_output": True},
            }
        ).encode()
        answer, content = self._exchange(
            "POST", f"{self._path}/infer", header + body, {_HEADER_LENGTH: str(len(header))}
        )
        length = int(answer[_HEADER_LENGTH])
        output = json.loads(content[:length])["outputs"][0]
        return np.frombuffer(content, "<f4", offset=length).reshape(output["shape"])

    def latencies_ms(self, one: NDArray[np.float32], *, requests: int) -> NDArray[np.float64]:
        """Send one input (1, …) again and again; return each request's milliseconds."""
        taken = np.empty(requests)
        for index in range(requests):
            begin = time.perf_counter()
            self.infer(one)
            taken[index] = (time.perf_counter() - begin) * 1000
        return taken

    def _exchange(
        self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> tuple[Mapping[str, str], bytes]:
        self._http.request(method, path, body, dict(headers or {}))
        answer: Any = self._http.getresponse()
        content: bytes = answer.read()
        if answer.status != http.client.OK:
            raise UnavailableError(f"{method} {path}: {answer.status} {content[:500]!r}")
        return answer.headers, content
