"""Two places for a model version on disk, of which one is served: at any moment one is whole.

Layout under ``home/models``: ``a/`` and ``b/`` each hold `MANIFEST` (the sealed bytes) and `MODEL`;
the file ``current`` says which slot is served and whether the other holds the version that was
served before. Each step is one atomic rename, made durable before the next, in an order that leaves
a usable state wherever the power fails:

1. `Slots.stage` first takes the spare slot out of the pointer, so that a half-written slot is never
   mistaken for the previous version; then it removes the spare's manifest (a slot without one is
   empty), moves the new file in, and writes the new manifest last.
2. `Slots.switch` replaces the pointer.

What was staged but never switched to is found again by `Slots.find`, so a restarted agent tests and
activates it without another download; so is the previous version, when it is desired again.
"""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec

from edge_agent.slot_files import MANIFEST, MODEL, sealed_manifest
from shared.errors import UntrustedModelError
from shared.files import explained_disk_errors, sha256_of, sync_directory, write_atomic
from shared.signed_manifest import SignedManifest, open_manifest
from shared.signing import VerifyingKey

SlotName = Literal["a", "b"]
_OTHER: Mapping[SlotName, SlotName] = {"a": "b", "b": "a"}

logger = logging.getLogger(__name__)


class _Pointer(msgspec.Struct, frozen=True):
    """Content of ``current``."""

    current: SlotName | None = None
    previous: SlotName | None = None


class Slots:
    """The model versions on this device. One process at a time may write."""

    def __init__(self, home: Path) -> None:
        self.folder = home / "models"
        self._pointer_path = self.folder / "current"

    @property
    def current(self) -> Path | None:
        """The slot that is served; None before the first version."""
        return self._path(self._pointer().current)

    @property
    def previous(self) -> Path | None:
        """The slot that was served before and is still whole; None while it is being reused."""
        return self._path(self._pointer().previous)

    @property
    def spare(self) -> Path:
        """The slot that the next version goes to."""
        current = self._pointer().current
        return self.folder / (_OTHER[current] if current else "a")

    def find(self, version: str, trusted: Mapping[str, VerifyingKey]) -> Path | None:
        """Return a slot that holds ``version`` whole, to the last bit; reads the model's file.

        The current slot, or the spare one: then it was staged before a crash, or served before.
        """
        current = self.current
        places = [self.spare] if current is None else [current, self.spare]
        return next((slot for slot in places if _holds(slot, version, trusted)), None)

    def stage(self, sealed: bytes, model: Path) -> Path:
        """Put a version into the spare slot, which then holds nothing else; return the slot.

        Args:
            sealed: the manifest as it was downloaded, already checked.
            model: the downloaded file on the same file system; it is moved, not copied.

        Raises:
            UnavailableError: the disk is full.
        """
        slot = self.spare
        with explained_disk_errors(self.folder):
            self._point(_Pointer(self._pointer().current, None))
            _clear(slot)
            for torn in self.folder.glob(f".{self._pointer_path.name}.*"):  # cut by a crash
                torn.unlink()
            model.replace(slot / MODEL)
            sync_directory(slot)
            write_atomic(slot / MANIFEST, sealed)
        return slot

    def switch(self, slot: Path) -> None:
        """Make ``slot`` the current one, and the current one the previous.

        Raises:
            UnavailableError: the disk is full; nothing changed.
        """
        pointer = self._pointer()
        name: SlotName = "a" if slot.name == "a" else "b"
        if pointer.current != name:
            with explained_disk_errors(self.folder):
                self._point(_Pointer(name, pointer.current))

    def discard(self, slot: Path) -> None:
        """Empty a slot whose content cannot be trusted; never the current one."""
        if slot == self.current:
            raise ValueError(f"{slot} is being served")
        with explained_disk_errors(self.folder):
            self._point(_Pointer(self._pointer().current, None))
            _clear(slot)

    def _pointer(self) -> _Pointer:
        try:
            return msgspec.json.decode(self._pointer_path.read_bytes(), type=_Pointer)
        except FileNotFoundError:
            return _Pointer()
        except msgspec.DecodeError:
            logger.exception("%s is damaged; starting as if no model were here", self._pointer_path)
            return _Pointer()

    def _point(self, pointer: _Pointer) -> None:
        if pointer != self._pointer():
            write_atomic(self._pointer_path, msgspec.json.encode(pointer))

    def _path(self, name: SlotName | None) -> Path | None:
        return None if name is None else self.folder / name


def verified_manifest(slot: Path, trusted: Mapping[str, VerifyingKey]) -> SignedManifest:
    """Read a slot's manifest and check its signature; the model's digest is checked on loading.

    Raises:
        UntrustedModelError: missing, unreadable, or signed by none of the ``trusted`` keys.
    """
    return open_manifest(sealed_manifest(slot), trusted=trusted)


def _holds(slot: Path, version: str, trusted: Mapping[str, VerifyingKey]) -> bool:
    try:
        found = verified_manifest(slot, trusted)
        known = found.manifest.artifact(sha256_of(slot / MODEL))
    except (UntrustedModelError, OSError):
        return False
    return found.version == version and known is not None


def _clear(slot: Path) -> None:
    """Empty the folder, its manifest first, so that it is never taken for whole on the way."""
    slot.mkdir(parents=True, exist_ok=True)
    (slot / MANIFEST).unlink(missing_ok=True)
    sync_directory(slot)
    for entry in slot.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()
