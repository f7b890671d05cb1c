"""The model that is served now, and how it is replaced without dropping a request.

The next model is loaded and checked beside the running one; then one reference is switched. From
there on every request goes to the new model, while the old one answers what it had accepted and is
closed. Both are in memory for a moment; the memory of the old one is handed back to the system.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edge_agent.inference.batcher import Batcher
from edge_agent.inference.engine import Array, EngineOptions, release_memory
from edge_agent.inference.metrics import Metrics
from edge_agent.inference.model import Model, load_model
from shared.manifest import Artifact, Manifest


@dataclass(frozen=True, slots=True)
class Served:
    """A version that answers requests."""

    version: str
    manifest: Manifest
    artifact: Artifact
    batcher: Batcher
    provider: str  # ONNX Runtime's execution provider, the one it settled on

    def infer(self, feeds: Mapping[str, Array]) -> "asyncio.Future[list[Array]]":
        """Queue a request whose arrays fit the manifest's signature."""
        return self.batcher.submit(feeds)


class LiveModel:
    """Holds what is served; `now` is read again for each request."""

    def __init__(self, metrics: Metrics, options: EngineOptions | None = None) -> None:
        self.now: Served | None = None
        self._metrics, self._options = metrics, options

    async def activate(self, slot: Path) -> Served:
        """Load the model in ``slot``, check it, and switch to it.

        Raises:
            UntrustedModelError: its file is not the one that its manifest names.
            UnfitModelError: it does not work here. In both cases the old model goes on.
        """
        try:
            model = await asyncio.to_thread(load_model, slot, self._options)
            old, self.now = self.now, self._serve(model)
            del model
            if old is not None:
                # A thread of the pool lets go of its call a little late. This one holds no model,
                # or the old one's memory would sometimes be freed after it is handed back below.
                await asyncio.to_thread(old.batcher.end().join)
                del old
        finally:
            release_memory()
        return self.now

    async def close(self) -> None:
        """Answer what was accepted, then serve nothing."""
        old, self.now = self.now, None
        if old is not None:
            await old.batcher.close()

    def _serve(self, model: Model) -> Served:
        batcher = Batcher(model.engine, loop=asyncio.get_running_loop(), on_run=self._metrics.ran)
        manifest = model.manifest
        self._metrics.serves(
            model=manifest.model, version=model.version, artifact=model.artifact.sha256
        )
        return Served(model.version, manifest, model.artifact, batcher, model.engine.provider)
