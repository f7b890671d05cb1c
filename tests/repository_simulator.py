"""A coordinator's TUF repository in memory, behind real HTTP, that misbehaves on request.

After python-tuf's own tests/repository_simulator.py. ``metadata`` and ``files`` hold what is handed
out, by the end of the URL; a test may replace anything there, or sign it again wrongly.
"""

import contextlib
import hashlib
import re
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tuf.api.metadata import Metadata

from cloud_coordinator.trust.metadata import (
    DELEGATED,
    ROLES,
    TOP_ROLES,
    AnyRole,
    ListedFile,
    listing_of,
    root_of,
    sign,
    snapshot_of,
    targets_of,
    timestamp_of,
)
from shared.manifest import Artifact
from shared.release_names import Role, artifact_target, manifest_target
from shared.signing import SigningKey

LONG = timedelta(days=365)
Build = Callable[[int, datetime], Metadata[Any]]


class RepositorySimulator:
    """Signs correctly unless told otherwise."""

    def __init__(self) -> None:
        self.keys: dict[AnyRole, SigningKey] = {role: SigningKey.generate() for role in ROLES}
        self.versions: dict[str, int] = dict.fromkeys(ROLES, 0)
        self.lifetimes: dict[str, timedelta] = dict.fromkeys(ROLES, LONG)
        self.listed: dict[str, dict[str, ListedFile]] = {role: {} for role in DELEGATED}
        self.metadata: dict[str, bytes] = {}
        self.manifests: dict[str, bytes] = {}  # by version
        self.files: dict[str, bytes] = {}  # by digest
        self.status: dict[str, int] = {}  # refusals, by the name of what is asked for
        self.asked: list[str] = []  # manifests and artifacts
        self.hangs = threading.Event()  # set once a request hangs, where ``hang`` names it
        self.hang = ""
        self._go_on = threading.Event()
        self.url = ""
        self.rotate_root()
        self.sign_targets()
        for role in DELEGATED:
            self.sign_list(role)
        self.seal()
        self.root = self.metadata["1.root.json"]

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """Answer on ``url`` for the length of a block."""
        simulator = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                simulator._answer(self)

            def log_message(self, *_: object) -> None:
                pass

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            self.url = f"http://127.0.0.1:{server.server_address[1]}"
            thread = threading.Thread(target=server.serve_forever, args=(0.01,))
            thread.start()
            try:
                yield
            finally:
                self._go_on.set()
                server.shutdown()
                thread.join()

    # --- what is released

    def publish(
        self,
        version: str,
        sealed: bytes,
        artifact: Artifact,
        content: bytes,
        role: Role = "released",
    ) -> str:
        """Hand out a version and list it under ``role``."""
        self.manifests[version], self.files[artifact.sha256] = sealed, content
        digest = hashlib.sha256(sealed).hexdigest()
        path = artifact_target(role, artifact.sha256)
        self.list(role, ListedFile(manifest_target(role, version), len(sealed), digest))
        self.list(role, ListedFile(path, artifact.size_bytes, artifact.sha256))
        return version

    def list(self, role: Role, file: ListedFile) -> None:
        self.listed[role][file.path] = file
        self.sign_list(role)
        self.seal()

    # --- the roles, each signed with a new number

    def rotate_root(self, also: SigningKey | None = None) -> None:
        """Sign the next root by the root key, and by the one before it."""
        named = {role: self.keys[role].public for role in TOP_ROLES}
        self._issue("root", lambda n, end: root_of(named, version=n, expires=end))
        if also is not None:
            name = f"{self.versions['root']}.root.json"
            self.metadata[name] = sign(Metadata.from_bytes(self.metadata[name]), also)

    def sign_targets(self) -> None:
        named = {role: self.keys[role].public for role in DELEGATED}
        self._issue("targets", lambda n, end: targets_of(named, version=n, expires=end))

    def sign_list(self, role: Role) -> None:
        files = self.listed[role].values()
        self._issue(role, lambda n, end: listing_of(files, version=n, expires=end))

    def seal(self) -> None:
        """Sign a snapshot of everything, and a timestamp."""
        named = {role: self._newest(role) for role in ("targets", *DELEGATED)}
        self._issue("snapshot", lambda n, end: snapshot_of(named, version=n, expires=end))
        self.sign_timestamp()

    def sign_timestamp(self) -> None:
        newest = self._newest("snapshot")
        self._issue("timestamp", lambda n, end: timestamp_of(newest, version=n, expires=end))
        self.metadata["timestamp.json"] = self._newest("timestamp")[1]

    def _issue(self, role: AnyRole, build: Build) -> None:
        self.versions[role] += 1
        expires = datetime.now(UTC).replace(microsecond=0) + self.lifetimes[role]
        metadata = build(self.versions[role], expires)
        self.metadata[f"{self.versions[role]}.{role}.json"] = sign(metadata, self.keys[role])

    def _newest(self, role: str) -> tuple[int, bytes]:
        return self.versions[role], self.metadata[f"{self.versions[role]}.{role}.json"]

    # --- HTTP

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        kind, name, content = self._find(request.path)
        if kind != "metadata":
            self.asked.append(kind)
        if status := self.status.get(name, 0 if content is not None else 404):
            request.send_error(status)
            return
        assert content is not None
        wanted = re.match(r"bytes=(\d+)-", request.headers.get("range", ""))
        start = int(wanted[1]) if wanted else 0
        with contextlib.suppress(ConnectionError):
            if name == self.hang:
                self.hangs.set()
                self._go_on.wait()
            request.send_response(206 if start else 200)
            if start:
                span = f"bytes {start}-{len(content) - 1}/{len(content)}"
                request.send_header("content-range", span)
            request.send_header("content-length", str(len(content) - start))
            request.end_headers()
            request.wfile.write(content[start:])

    def _find(self, path: str) -> tuple[str, str, bytes | None]:
        """Return kind, name and content of what a path means."""
        parts = path.strip("/").split("/")
        match parts:
            case ["v1", "tuf", name]:
                return "metadata", name, self.metadata.get(name)
            case ["v1", "models", version, "manifest"]:
                return "manifest", version, self.manifests.get(version)
            case ["v1", "artifacts", sha256]:
                return "artifact", sha256, self.files.get(sha256)
        return "metadata", path, None
