"""Model versions: from a run's final parameters to signed, checked, downloadable artifacts."""

import os

# ONNX Runtime's official builds report to their maker unless this is set before they are loaded.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
