"""Writes down every byte that a program sends to another machine, and what it wanted to hide.

Python itself loads this in agents, and in their children, that are started with this folder in
their PYTHONPATH. Bytes are taken before TLS encrypts them. ``NUMBER-PID.sent`` holds what one
connection sent; ``PID.hidden`` a line of JSON for each thing that must not be found in there, with
bytes as base64.
"""

import base64
import functools
import importlib.abc
import importlib.util
import itertools
import json
import os
import socket
import ssl
import sys
import threading
import weakref
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = os.environ.get("WIRETAP_FOLDER", "")
_lock = threading.Lock()
_numbers = itertools.count()
_connections: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def _write(connection: Any, content: bytes) -> None:
    with _lock:
        if connection not in _connections:
            _connections[connection] = f"{next(_numbers)}-{os.getpid()}.sent"
        with Path(FOLDER, _connections[connection]).open("ab") as file:
            file.write(content)


def _tap(owner: type, name: str) -> None:
    send = getattr(owner, name)

    @functools.wraps(send)
    def tapped(self: Any, data: Any, *rest: Any) -> Any:
        sent = send(self, data, *rest)
        if getattr(self, "family", socket.AF_INET) in {socket.AF_INET, socket.AF_INET6}:
            content = bytes(data)
            _write(self, content if sent is None else content[:sent])
        return sent

    setattr(owner, name, tapped)


def _note(kind: str, **what: Any) -> None:
    written = json.dumps({"kind": kind} | {name: _plain(value) for name, value in what.items()})
    with _lock, Path(FOLDER, f"{os.getpid()}.hidden").open("a") as file:
        file.write(written + "\n")


def _plain(value: Any) -> Any:
    if hasattr(value, "tobytes"):
        value = value.tobytes()
    if isinstance(value, bytes | bytearray):
        return base64.b64encode(value).decode()
    return value


def _after_training(module: Any) -> None:
    train, evaluate = module.train, module.evaluate

    def tapped_train(*args: Any, **options: Any) -> Any:
        update = train(*args, **options)
        _note("parameters", values=update.parameters)
        _note("sums", sums=update.sums | {"examples": float(update.num_examples)})
        return update

    def tapped_evaluate(*args: Any, **options: Any) -> Any:
        sums = evaluate(*args, **options)
        _note("sums", sums=sums)
        return sums

    module.train, module.evaluate = tapped_train, tapped_evaluate


def _after_encoding(module: Any) -> None:
    encode = module.encode

    def tapped(config: Any, vector: Any, exact: Any, **options: Any) -> Any:
        lanes = encode(config, vector, exact, **options)
        _note("vector", values=vector)
        _note("lanes", main=lanes.main, exact=lanes.exact, bits=config.encoding.lane_bits)
        return lanes

    module.encode = tapped


def _after_keys(module: Any) -> None:
    new = module.SessionSecrets.new.__func__

    def tapped(cls: Any, *args: Any, **options: Any) -> Any:
        secrets = new(cls, *args, **options)
        for value in (secrets.mask_seed, secrets.key_seed, secrets.box_private.private_bytes_raw()):
            _note("secret", value=value)
        return secrets

    module.SessionSecrets.new = classmethod(tapped)


def _after_secure_sums(module: Any) -> None:
    mask = module.SecureSums.mask

    def tapped(self: Any, session: bytes, question: bytes) -> Any:
        known = self._sessions.get(session)
        answer, lanes = mask(self, session, question)
        if lanes is not None:
            config = known.opened.config
            _note(
                "left",
                device=self._enrolment.device_id,
                session=session,
                question=f"{config.run_id} {config.purpose} {config.base_digest}",
                main=lanes.main,
                exact=lanes.exact,
                answer=answer,
            )
        return answer, lanes

    module.SecureSums.mask = tapped


_HOOKS = {
    "edge_agent.training": _after_training,
    "shared.secure_sum.encoding": _after_encoding,
    "shared.secure_sum.keys": _after_keys,
    "edge_agent.secure_sums": _after_secure_sums,
}


class _Finder(importlib.abc.MetaPathFinder):
    """Calls a hook once its module has been executed, before anybody imports from it."""

    def find_spec(self, name: str, *_: Any) -> Any:
        hook = _HOOKS.pop(name, None)
        if hook is None:
            return None
        spec: Any = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            hook(module)

        spec.loader.exec_module = exec_module
        return spec


if FOLDER:
    _tap(socket.socket, "send")
    _tap(socket.socket, "sendall")
    _tap(ssl.SSLSocket, "send")
    _tap(ssl.SSLSocket, "write")
    _tap(ssl.SSLObject, "write")
    sys.meta_path.insert(0, _Finder())
