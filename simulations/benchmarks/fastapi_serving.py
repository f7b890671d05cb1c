"""The reference of ``shoal-sim bench serving``: the same model behind FastAPI and pydantic.

It is what the frameworks' own introductions lead to: a body model, a coroutine, a dict as answer;
with uvicorn on httptools and uvloop, and a session with the settings of ours.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI
from onnxruntime.capi.onnxruntime_inference_collection import InferenceSession
from onnxruntime.capi.onnxruntime_pybind11_state import SessionOptions
from pydantic import BaseModel


class Tensor(BaseModel):
    """One input of a request."""

    name: str
    datatype: str
    shape: list[int]
    data: list[float]


class Body(BaseModel):
    """A request of the Open Inference Protocol."""

    inputs: list[Tensor]


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--port", type=int, required=True)
    arguments = parser.parse_args()
    options = SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = InferenceSession(arguments.model.read_bytes(), options)
    app = FastAPI()

    @app.post("/v2/models/cnn/infer")
    async def infer(body: Body) -> dict[str, Any]:
        tensor = body.inputs[0]
        image = np.array(tensor.data, np.float32).reshape(tensor.shape)
        logits = np.asarray(session.run(None, {"image": image})[0])
        output = {"name": "logits", "datatype": "FP32", "shape": logits.shape}
        return {"model_name": "cnn", "outputs": [{**output, "data": logits.ravel().tolist()}]}

    uvicorn.run(app, port=arguments.port, access_log=False, log_level="error", http="httptools")


if __name__ == "__main__":
    main()
