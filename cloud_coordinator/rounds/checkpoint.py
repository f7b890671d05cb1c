"""The state between two rounds as blobs; a round is named only after its blobs are durable."""

from cloud_coordinator.blobs import BlobStore
from cloud_coordinator.rounds.aggregation import ModelState
from cloud_coordinator.rounds.worker_messages import ResumePoint
from shared.errors import UntrustedModelError
from shared.parameters import load_vectors, save_vectors

_PARAMETERS = "parameters"  # the name that `shared.parameters.load_parameters` looks for


def save_state(blobs: BlobStore, state: ModelState, *, round_number: int) -> ResumePoint:
    """Store ``state`` as the result of a round, durable before it returns.

    Raises:
        UnavailableError: the disk is full.
    """
    return ResumePoint(
        round_number=round_number,
        parameters_sha256=blobs.put(save_vectors({_PARAMETERS: state.parameters})),
        optimizer_sha256=blobs.put(save_vectors(state.optimizer)) if state.optimizer else None,
    )


def load_state(blobs: BlobStore, point: ResumePoint) -> ModelState:
    """Return what `save_state` stored.

    Raises:
        NotFoundError: a blob is missing.
        UntrustedModelError: a blob was changed.
    """
    vectors = load_vectors(blobs.read(point.parameters_sha256))
    if _PARAMETERS not in vectors:
        raise UntrustedModelError(f"blob {point.parameters_sha256[:12]} holds no parameters")
    parameters = vectors[_PARAMETERS].astype("float32", copy=False)
    if point.optimizer_sha256 is None:
        return ModelState(parameters)
    return ModelState(parameters, load_vectors(blobs.read(point.optimizer_sha256)))
