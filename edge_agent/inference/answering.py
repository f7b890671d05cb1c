"""From a request that was understood to its answer, the same for every door of the server."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from edge_agent.inference import protocol
from edge_agent.inference.engine import Array
from edge_agent.inference.feedback import Feedback
from edge_agent.inference.live import LiveModel, Served
from edge_agent.inference.protocol import InferRequest, RequestError
from shared.errors import UnfitModelError


@dataclass(frozen=True, slots=True)
class Answer:
    """What one version says to one request."""

    served: Served
    results: list[Array]  # by output, in the order of the signature
    number: int | None  # under which labels may come back; None: the model has no classes


class Answering:
    """Asks whatever is served now."""

    def __init__(self, live: LiveModel, feedback: Feedback) -> None:
        self.live, self.feedback = live, feedback

    def served_as(self, model: str, version: str | None) -> Served:
        """Return what is served if it goes by that name and version.

        Raises:
            RequestError: it does not (404).
        """
        now = self.live.now
        if now is None:
            raise RequestError("no model is served yet; the coordinator deploys one", status=404)
        if model == now.manifest.model and version in {None, now.version}:
            return now
        named = model if version is None else f"{model} version {version}"
        served = f"{now.manifest.model} {now.version}"
        raise RequestError(f"{named} is not served here; this is {served}", status=404)

    async def infer(self, model: str, version: str | None, request: InferRequest) -> Answer:
        """Run a request.

        Raises:
            RequestError: it does not fit what is served.
            UnfitModelError: the model failed.
        """
        # No await between reading what is served and queueing there: a swap drains the queue.
        served = self.served_as(model, version)
        manifest = served.manifest
        feeds = protocol.match(request, manifest.inputs, manifest.outputs)
        results = await served.infer(feeds)
        if not _all_finite(results) and _all_finite(feeds.values()):
            raise UnfitModelError("the model answered with NaN or infinity")
        number = self.feedback.remember(served.version, manifest, request.id, results)
        return Answer(served, results, number)


def _all_finite(arrays: Iterable[Array]) -> bool:
    return all(array.dtype.kind != "f" or bool(np.isfinite(array).all()) for array in arrays)
