"""A client of the Open Inference Protocol v2 over HTTP with binary tensors, as small as it gets.

The tests use NVIDIA's `tritonclient`; the demo uses this one so that it needs nothing beyond httpx.
"""

import json
import time
from types import TracebackType
from typing import Self

import httpx
import numpy as np
from numpy.typing import NDArray

_HEADER_LENGTH = "Inference-Header-Content-Length"


class InferenceClient:
    """One served model at one address, such as ``http://127.0.0.1:8480``."""

    def __init__(self, address: str, model: str, *, timeout_s: float = 10.0) -> None:
        self._http = httpx.Client(base_url=address, timeout=timeout_s)
        self._path = f"/v2/models/{model}"
        metadata = self._http.get(self._path).raise_for_status().json()
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
        answer = self._http.post(
            f"{self._path}/infer",
            content=header + body,
            headers={_HEADER_LENGTH: str(len(header))},
        ).raise_for_status()
        length = int(answer.headers[_HEADER_LENGTH])
        output = json.loads(answer.content[:length])["outputs"][0]
        return np.frombuffer(answer.content[length:], "<f4").reshape(output["shape"])

    def latencies_ms(self, one: NDArray[np.float32], *, requests: int) -> NDArray[np.float64]:
        """Send one input (1, …) again and again; return each request's milliseconds."""
        taken = np.empty(requests)
        for index in range(requests):
            begin = time.perf_counter()
            self.infer(one)
            taken[index] = (time.perf_counter() - begin) * 1000
        return taken
