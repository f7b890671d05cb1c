"""The parameters that a run's student learns from, as the coordinator keeps them."""

from cloud_coordinator.rounds.checkpoint import load_state
from cloud_coordinator.rounds.host import RunHost
from cloud_coordinator.rounds.worker_messages import ResumePoint
from shared.errors import UntrustedModelError
from shared.parameters import Vector
from shared.secure_sum.questions import base_digest_of


def teacher_of(host: RunHost) -> Vector | None:
    """Return the teacher's parameters, shape (d,); None where the run has none.

    Raises:
        NotFoundError: they are gone.
        UntrustedModelError: they are not those that the plan names.
    """
    student = host.plan.student
    if student is None or student.distil is None:
        return None
    sha256 = student.distil.parameters_sha256
    point = ResumePoint(round_number=0, parameters_sha256=sha256)
    parameters = load_state(host.blobs, point).parameters
    if base_digest_of(parameters) != student.distil.teacher:
        raise UntrustedModelError(f"blob {sha256[:12]} does not hold the teacher of this run")
    return parameters
