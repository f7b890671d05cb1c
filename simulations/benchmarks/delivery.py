"""``shoal-sim bench delivery``: what it costs a device to be sure of a model.

The coordinator's own routes serve a released version from a process of their own, on loopback; the
agent's own `TrustedModels` refreshes the metadata from an empty home, then fetches and checks.
"""

import asyncio
import hashlib
import os
import random
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Coroutine
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Response

from cloud_coordinator.database import Database
from cloud_coordinator.models import api as models_api
from cloud_coordinator.trust import api as trust_api
from cloud_coordinator.trust.keys import load_trust_keys
from cloud_coordinator.trust.metadata import ListedFile
from cloud_coordinator.trust.repository import TrustRepository
from edge_agent.fetcher import CoordinatorFetcher
from edge_agent.trusted_models import TrustedModels
from shared.errors import ConfigError, NotFoundError
from shared.manifest import Artifact
from shared.messages import utc_now
from shared.release_names import artifact_target, manifest_target
from shared.signing import SigningKey, VerifyingKey
from simulations.benchmarks.report import Row, row_at_most

Progress = Callable[[str], None]
REFRESH = "first refresh of all metadata, and a manifest"
DOWNLOAD = "64 MiB fetched, synced and checked"
_REFRESH_LIMIT_S, _LEAST_MB_PER_S = 0.1, 100.0
_FILE_BYTES = 64 * 1024**2
_VERSION, _SEALED = "0" * 64, b"sealed" * 1000
_OTHER_FILES = 60  # listed besides


def run(*, only: str | None, quick: bool, progress: Progress) -> list[Row]:
    """Measure both rows, or one.

    Args:
        only: the name of one row, or None.
        quick: fewer repetitions.
        progress: is told what was measured.

    Raises:
        ConfigError: there is no such row.
    """
    if only not in {None, REFRESH, DOWNLOAD}:
        raise ConfigError(f"there is no row {only!r}; choose {REFRESH!r} or {DOWNLOAD!r}")
    with tempfile.TemporaryDirectory() as folder:
        rows = _measure(Path(folder), 5 if quick else 20, progress)
    return [row for row in rows if only in {None, row.name}]


def _measure(folder: Path, repetitions: int, progress: Progress) -> list[Row]:
    file = folder / "model.onnx"
    file.write_bytes(os.urandom(_FILE_BYTES))
    artifact = Artifact(
        variant="fp32",
        sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
        size_bytes=_FILE_BYTES,
    )
    key = SigningKey.generate()
    root = _release(folder, artifact)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        server = get_context("spawn").Process(
            target=_serve, args=(listener, folder, str(key.public)), daemon=True
        )
        server.start()
        try:
            new_fetcher = partial(
                CoordinatorFetcher,
                url,
                device="bench",
                key=key,
                rng=random.Random(0),  # noqa: S311  # jitter
            )
            refreshes, rates = [], []
            for number in range(repetitions + 1):  # the first waits for the server to start
                models = TrustedModels(folder / f"home-{number}", url, root, new_fetcher)
                refreshes.append(_seconds(partial(models.manifest, _VERSION)))
                rates.append(_FILE_BYTES / 1e6 / _seconds(partial(models.artifact, artifact)))
                progress(f"refresh {1000 * refreshes[-1]:.0f} ms, file {rates[-1]:.0f} MB/s")
                (folder / f"home-{number}/models/downloads/{artifact.sha256}.part").unlink()
        finally:
            server.terminate()
            server.join()
    rate = statistics.median(rates[1:])
    return [
        row_at_most(REFRESH, statistics.median(refreshes[1:]), "s", limit=_REFRESH_LIMIT_S),
        Row(
            name=DOWNLOAD,
            value=round(rate, 1),
            unit="MB/s",
            reference=None,
            ratio=None,
            target=f">= {_LEAST_MB_PER_S:g} MB/s",
            ok=rate >= _LEAST_MB_PER_S,
        ),
    ]


def _seconds(errand: Callable[[], Coroutine[Any, Any, object]]) -> float:
    """Return how long a coroutine of `TrustedModels` takes."""

    async def timed() -> float:
        began = time.perf_counter()
        await errand()
        return time.perf_counter() - began

    return asyncio.run(timed())


def _release(folder: Path, artifact: Artifact) -> bytes:
    """Release one version among others; return the root to pin."""
    database = Database(f"sqlite:///{folder / 'shoal.db'}")
    database.migrate()
    trust = TrustRepository(database, load_trust_keys(folder / "trust"), clock=utc_now)
    trust.renew()
    files = [
        ListedFile(
            manifest_target("released", _VERSION),
            len(_SEALED),
            hashlib.sha256(_SEALED).hexdigest(),
        ),
        ListedFile(
            artifact_target("released", artifact.sha256), artifact.size_bytes, artifact.sha256
        ),
    ]
    for number in range(_OTHER_FILES):
        other = f"{number:064x}"
        files.append(ListedFile(artifact_target("released", other), _FILE_BYTES, other))
    with database.transaction() as session:
        trust.list_files(session, "released", "run", files)
    root = trust.newest_root()
    database.close()
    return root


class _Served:
    """All that the routes ask of devices and models."""

    def __init__(self, file: Path, key: VerifyingKey) -> None:
        self._file, self._key = file, key

    async def identity_key(self, _device_id: str) -> VerifyingKey:
        return self._key

    def manifest_bytes(self, _version: str) -> bytes:
        return _SEALED

    def artifact_path(self, _sha256: str) -> Path:
        return self._file


def _serve(listener: socket.socket, folder: Path, key: str) -> None:
    """Serve metadata, manifest and file until the process is ended."""
    app, served = FastAPI(), _Served(folder / "model.onnx", VerifyingKey.from_text(key))
    database = Database(f"sqlite:///{folder / 'shoal.db'}")
    app.state.trust = TrustRepository(database, load_trust_keys(folder / "trust"), clock=utc_now)
    app.state.devices = app.state.models = served
    app.state.clock, app.state.admin_token = utc_now, ""
    app.add_exception_handler(NotFoundError, lambda _request, _error: Response(status_code=404))
    app.include_router(trust_api.router)
    app.include_router(models_api.router)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
    server.run(sockets=[listener])
