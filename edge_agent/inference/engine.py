"""The door to ONNX Runtime: one loaded model that answers in arrays, or says why it cannot.

The defaults are those of a small device, as measured: one thread and no spinning (two spinning
threads burn fourteen times the CPU for a tenth of the latency), and no memory arena, which together
with `release_memory` keeps resident memory flat over any number of swaps.
"""

import contextlib
import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as ort
from onnxruntime.capi.onnxruntime_inference_collection import InferenceSession

from edge_agent.inference.onnx_file import require_self_contained
from shared.errors import UnfitModelError
from shared.manifest import ALLOWED_SESSION_CONFIG, TensorSpec

Array = NDArray[Any]
DTYPES: Mapping[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")  # the first that is there wins
_ORT_TYPES = {
    "BOOL": "tensor(bool)",
    "FP16": "tensor(float16)",
    "FP32": "tensor(float)",
    "FP64": "tensor(double)",
}
_ERRORS_ONLY = 3
# ONNX Runtime's exceptions share no base class of their own.
_ORT_ERRORS: tuple[type[Exception], ...] = (
    ort.EPFail,
    ort.Fail,
    ort.InvalidArgument,
    ort.InvalidGraph,
    ort.InvalidProtobuf,
    ort.NoSuchFile,
    ort.NotImplemented,
    ort.RuntimeException,
    RuntimeError,
)
_RUN_ERRORS: tuple[type[Exception], ...] = (*_ORT_ERRORS, MemoryError)


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How a session uses the machine."""

    threads: int = 1  # of one inference
    arena: bool = False  # keep freed memory for the next inference
    providers: tuple[str, ...] = PROVIDERS  # in order of preference


class Engine:
    """One model in memory. Calls may come from any thread, one at a time."""

    def __init__(
        self,
        content: bytes,
        *,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        session_config: Mapping[str, str],
        options: EngineOptions | None = None,
    ) -> None:
        """Load ``content`` and compare it with the signature that its manifest promises.

        Raises:
            UnfitModelError: it does not load, needs too much memory, has another signature, or
                takes data from other files.
        """
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        require_self_contained(content)
        self._session = open_session(content, session_config, options or EngineOptions())
        _require_signature("input", self.inputs, self._session.get_inputs())
        _require_signature("output", self.outputs, self._session.get_outputs())
        self._output_names = [spec.name for spec in self.outputs]

    @property
    def provider(self) -> str:
        """The execution provider that ONNX Runtime settled on."""
        return str(self._session.get_providers()[0])

    @property
    def can_batch(self) -> bool:
        """Whether rows of several requests may go through in one run."""
        return all(spec.shape[:1] == (-1,) for spec in self.inputs + self.outputs)

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        """Compute all outputs, in the order of the signature.

        Raises:
            UnfitModelError: the model failed on these values.
        """
        try:
            outputs: Any = self._session.run(self._output_names, dict(feeds))
        except _RUN_ERRORS as error:
            raise UnfitModelError(f"the model failed: {_first_line(error)}") from error
        return list(outputs)


def has_accelerator() -> bool:
    """Whether sessions run on something else than the CPU here."""
    return PROVIDERS[0] in ort.get_available_providers()


def release_memory() -> None:
    """Hand what was freed back to the system; glibc keeps it otherwise after each swap."""
    with contextlib.suppress(OSError, AttributeError):  # musl and macOS have no malloc_trim
        ctypes.CDLL(None).malloc_trim(0)


def open_session(
    content: bytes, session_config: Mapping[str, str], options: EngineOptions
) -> InferenceSession:
    """Load a model; raise UnfitModelError where it does not load or needs too much memory."""
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = options.threads
    settings.inter_op_num_threads = 1
    settings.enable_cpu_mem_arena = options.arena
    settings.log_severity_level = _ERRORS_ONLY
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    settings.add_session_config_entry("session.inter_op.allow_spinning", "0")
    for key in ALLOWED_SESSION_CONFIG & session_config.keys():
        settings.add_session_config_entry(key, session_config[key])
    available = ort.get_available_providers()
    providers = [name for name in options.providers if name in available]
    try:
        return InferenceSession(content, settings, providers=providers)
    except MemoryError as error:
        raise UnfitModelError("the model needs more memory than there is for it") from error
    except _ORT_ERRORS as error:
        raise UnfitModelError(f"the model does not load: {_first_line(error)}") from error


def _require_signature(kind: str, promised: Sequence[TensorSpec], found: Sequence[Any]) -> None:
    """Compare the manifest's tensors with the graph's; a free dimension has a name or None."""
    wanted = {spec.name: _described(spec.datatype, spec.shape) for spec in promised}
    shapes = {
        node.name: tuple(dim if isinstance(dim, int) else -1 for dim in node.shape)
        for node in found
    }
    got = {node.name: (node.type, shapes[node.name]) for node in found}
    if wanted != got:
        raise UnfitModelError(
            f"the model's {kind}s are {_listed(got)} and its manifest promises {_listed(wanted)}"
        )


def _described(datatype: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    if datatype not in DTYPES:
        raise UnfitModelError(f"tensors of type {datatype!r} cannot be served")
    return _ORT_TYPES.get(datatype, f"tensor({datatype.lower()})"), shape


def _listed(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> str:
    return ", ".join(f"{name}: {kind}{list(shape)}" for name, (kind, shape) in tensors.items())


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:300]
