"""What the coordinator and the model pipeline child say to each other; free of torch and onnx."""

import msgspec

from shared.manifest import GoldenBatch, TensorSpec
from shared.statistics.probes import Probe
from shared.statistics.vectors import Answer
from shared.tasks.spec import TaskSpec

FP32 = "fp32"  # the variant that is always built, as the fallback


class Calibration(msgspec.Struct, frozen=True, kw_only=True):
    """What devices said of the ranges inside a model."""

    probe: Probe
    answers: tuple[Answer, ...]


class _Order(msgspec.Struct, frozen=True, kw_only=True):
    """First and only line to the child."""

    task: TaskSpec
    parameters_path: str  # safetensors, as shared/parameters.py writes it
    folder: str  # an empty folder; the child writes its files into it
    seed: int  # of the inputs that are drawn from the contract
    student: str = ""  # whose parameters they are, of the task's networks; empty: its own


class MakeProbe(_Order, frozen=True, kw_only=True, tag="probe"):
    """Which ranges inside the model do devices have to measure?"""


class BuildVersion(_Order, frozen=True, kw_only=True, tag="build"):
    """Make one ONNX file per variant of these parameters."""

    calibration: Calibration | None = None  # None: no static int8


ToPipeline = MakeProbe | BuildVersion


class BuildProgress(msgspec.Struct, frozen=True, tag="progress"):
    """For people who watch."""

    doing: str


class VariantReport(msgspec.Struct, frozen=True, kw_only=True):
    """One variant and all that was measured on it; the figures stay None where it never ran."""

    variant: str
    passed: bool
    cause: str = ""  # why it did not pass
    file: str = ""  # name inside the folder; empty when the variant could not be built
    sha256: str = ""
    size_bytes: int = 0
    session_config: dict[str, str] = msgspec.field(default_factory=dict)
    step: str = ""  # of calibration, that gave ranges which are good enough
    needs: tuple[str, ...] = ()  # what a processor must have, as in the manifest
    tolerance: float | None = None  # on the golden batch, in units of the output
    latency_p50_us: float | None = None  # one row, one thread, all variants taking turns
    max_difference: float | None = None  # from torch's outputs, in units of the output
    relative_error: float | None = None  # root mean square error over the outputs' spread
    agreement: float | None = None  # same top class, among rows decided with a margin


class ProbeMade(msgspec.Struct, frozen=True, kw_only=True, tag="probe-made"):
    """Devices can be asked; the child ends with status 0."""

    probe: Probe
    file: str  # name inside the folder


class Built(msgspec.Struct, frozen=True, kw_only=True, tag="built"):
    """The version is ready to be signed; the child ends with status 0."""

    variants: tuple[VariantReport, ...]
    ship: str  # the variant that devices serve
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    labels: tuple[str, ...]
    golden: GoldenBatch
    student: str = ""  # of the task's networks; empty: its own


class BuildFailed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """There is no version; the child ends with status 1."""

    cause: str
    rejected: bool  # these parameters can become no version; False: mend the cause and try again
    variants: tuple[VariantReport, ...] = ()  # what was measured before it was clear


Result = ProbeMade | Built | BuildFailed
FromPipeline = BuildProgress | Result
