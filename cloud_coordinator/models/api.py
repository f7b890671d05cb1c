"""Routes for model versions: facts for people, manifests and artifacts for devices.

An artifact's name is the digest of its bytes, which makes it its own entity tag: a device resumes
a broken download by ``Range`` with ``If-Range`` and can never get a mixture of two files.
"""

from datetime import datetime
from typing import Annotated, Any, cast

import msgspec
from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import FileResponse
from pydantic import BaseModel, ConfigDict, Field

from cloud_coordinator.devices.authentication import device_or_admin, require_admin
from cloud_coordinator.models.card import model_card
from cloud_coordinator.models.catalogue import Catalogue
from cloud_coordinator.models.descriptions import judgement_in
from cloud_coordinator.models.service import ModelService
from cloud_coordinator.models.tables import ModelVersionRow

_FOR_EVER = "private, max-age=31536000, immutable"


class VariantView(BaseModel):
    """One variant of a version; the figures are null where it never ran."""

    model_config = ConfigDict(from_attributes=True)

    variant: str
    passed: bool
    shipped: bool
    cause: str
    step: str  # of calibration, that gave ranges which are good enough
    sha256: str | None
    size_bytes: int
    latency_p50_us: float | None
    max_difference: float | None
    relative_error: float | None
    agreement: float | None


class VersionView(BaseModel):
    """One model version; ``version`` and ``ship`` are null until it is signed."""

    version: str | None
    model: str
    state: str
    cause: str
    run_id: str
    rounds: int
    created_at: datetime
    signed_at: datetime | None
    parent: str | None
    ship: str | None
    variants: list[VariantView]
    judgement: dict[str, Any] | None  # of devices, as `Judgement`; null where nobody judged it


class NewNote(BaseModel):
    """What somebody writes about a version."""

    model_config = ConfigDict(extra="forbid")

    author: str = Field(min_length=1, max_length=63)
    text: str = Field(min_length=1, max_length=2000)


def _models(request: Request) -> ModelService:
    return cast("ModelService", request.app.state.models)


def _catalogue(request: Request) -> Catalogue:
    return cast("Catalogue", request.app.state.catalogue)


Models = Annotated[ModelService, Depends(_models)]
Known = Annotated[Catalogue, Depends(_catalogue)]
router = APIRouter(prefix="/v1", tags=["models"])


@router.get("/models", dependencies=[Depends(require_admin)])
def list_versions(
    catalogue: Known, model: str | None = None, state: str | None = None, text: str | None = None
) -> list[VersionView]:
    """Return the versions that fit, the newest first; ``text`` is of a digest, a run or a note."""
    found = catalogue.search(model=model, state=state, text=text)
    return [_view(row) for row in found]


@router.get("/models/{version}", dependencies=[Depends(require_admin)])
def show_version(version: str, models: Models) -> VersionView:
    """Return one version with every variant that was built."""
    return _view(models.version(version))


@router.get("/models/{version}/card", dependencies=[Depends(require_admin)])
def show_card(version: str, catalogue: Known) -> Response:
    """Return the model card: where the version comes from and what is known of it, in Markdown."""
    return Response(model_card(catalogue.facts(version)), media_type="text/markdown")


@router.get("/models/{version}/compare/{other}", dependencies=[Depends(require_admin)])
def compare_versions(version: str, other: str, catalogue: Known) -> Response:
    """Return all that is known of two versions, and the keys in which their plans differ."""
    return _json(catalogue.compare(version, other))


@router.get("/models/{version}/notes", dependencies=[Depends(require_admin)])
def list_notes(version: str, catalogue: Known) -> Response:
    """Return what people noted about a version, the oldest first."""
    return _json(catalogue.facts(version).notes)


@router.post("/models/{version}/notes", dependencies=[Depends(require_admin)])
def add_note(version: str, note: NewNote, catalogue: Known) -> Response:
    """Add a note to a version; notes are never changed."""
    return _json(catalogue.add_note(version, author=note.author, text=note.text))


@router.get("/models/{version}/manifest", dependencies=[Depends(device_or_admin)])
def download_manifest(version: str, models: Models) -> Response:
    """Return the signed manifest, byte for byte."""
    return Response(
        models.manifest_bytes(version),
        media_type="application/json",
        headers={"ETag": f'"{version}"', "Cache-Control": _FOR_EVER},
    )


@router.get("/artifacts/{sha256}", dependencies=[Depends(device_or_admin)])
def download_artifact(sha256: str, models: Models) -> FileResponse:
    """Return a model file, or the part of it that ``Range`` asks for."""
    return FileResponse(
        models.artifact_path(sha256),
        media_type="application/octet-stream",
        headers={"ETag": f'"{sha256}"', "Cache-Control": _FOR_EVER},
    )


def _json(document: object) -> Response:
    return Response(msgspec.json.encode(document), media_type="application/json")


def _view(row: ModelVersionRow) -> VersionView:
    variants = [VariantView.model_validate(variant) for variant in row.variants]
    return VersionView(
        version=row.version,
        model=row.model,
        state=row.state,
        cause=row.cause,
        run_id=row.run_id,
        rounds=row.rounds,
        created_at=row.created_at,
        signed_at=row.signed_at,
        parent=row.parent,
        ship=next((v.variant for v in variants if v.shipped), None),
        variants=variants,
        judgement=msgspec.to_builtins(judgement_in(row)),
    )
