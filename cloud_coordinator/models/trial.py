"""Runs a variant in a process that may crash: ONNX Runtime has ended whole processes on some.

Seen with ONNX Runtime 1.32: a segmentation fault while a half-precision transformer is optimised.
Such a crash must cost that variant, not the build.

Run as ``python -m cloud_coordinator.models.trial MODEL SESSION_CONFIG INPUTS OUTPUTS``, the last
two being ``.npy`` files; a refusal is one sentence on standard output and status 3.
"""

import io
import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

import numpy as np

from cloud_coordinator.models.parity import Outputs, open_session, run
from shared.child import die_with_parent
from shared.errors import UnavailableError, UnfitModelError
from shared.files import write_atomic

_REFUSED, _NO_SPACE = 3, 4  # exit statuses that Python itself does not use


def try_out(
    model: Path,
    session_config: Mapping[str, str],
    inputs: Path,
    *,
    deadline: timedelta = timedelta(minutes=3),
) -> Outputs:
    """Return what ``model`` computes for ``inputs``, in a process of its own.

    Args:
        model: the ONNX file; the outputs are written beside it and removed.
        session_config: settings of ONNX Runtime's session.
        inputs: ``.npy`` file, shape (b, …).
        deadline: the longest that it may take.

    Raises:
        UnfitModelError: it cannot be loaded or run, it crashed, or it took too long.
        UnavailableError: the disk is full.
    """
    outputs = model.with_suffix(".npy")
    try:
        trial = subprocess.run(
            [
                *(sys.executable, "-m", "cloud_coordinator.models.trial"),
                *(str(model), json.dumps(dict(session_config)), str(inputs), str(outputs)),
            ],
            stdout=subprocess.PIPE,
            text=True,
            timeout=deadline.total_seconds(),
            check=False,
        )
        if trial.returncode == 0:
            computed: Outputs = np.load(outputs, allow_pickle=False)
            return computed
    except subprocess.TimeoutExpired as error:
        raise UnfitModelError(f"it computed for more than {deadline}") from error
    finally:
        outputs.unlink(missing_ok=True)
    if trial.returncode == _NO_SPACE:
        raise UnavailableError(trial.stdout.strip())
    if trial.returncode == _REFUSED:
        raise UnfitModelError(trial.stdout.strip())
    raise UnfitModelError(f"ONNX Runtime crashed on it ({_ending(trial.returncode)})")


def write_array(path: Path, array: Outputs) -> None:
    """Write a ``.npy`` file; raise UnavailableError when the disk is full."""
    content = io.BytesIO()
    np.save(content, array)
    write_atomic(path, content.getvalue())


def _ending(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"status {status}"


def main() -> int:
    """Run one trial and return the exit status."""
    die_with_parent()
    model, session_config, inputs, outputs = sys.argv[1:]
    try:
        session = open_session(Path(model).read_bytes(), json.loads(session_config))
        write_array(Path(outputs), run(session, np.load(inputs, allow_pickle=False)))
    except (UnfitModelError, UnavailableError) as error:
        print(error)  # noqa: T201  # the parent reads it
        return _REFUSED if isinstance(error, UnfitModelError) else _NO_SPACE
    return 0


if __name__ == "__main__":
    sys.exit(main())
