"""The model server on the device: a child process of the agent, and the agent's end of it."""

import os

# ONNX Runtime's official builds report to their maker unless this is set before they are loaded.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
