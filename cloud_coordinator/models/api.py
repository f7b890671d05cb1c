"""Routes for model versions: figures for people, manifests and artifacts for devices.

An artifact's name is the digest of its bytes, which makes it its own entity tag: a device resumes
a broken download by ``Range`` with ``If-Range`` and can never get a mixture of two files.
"""

from datetime import datetime
from typing import Annotated, cast

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import FileResponse
from pydantic import BaseModel, ConfigDict

from cloud_coordinator.devices.authentication import device_or_admin, require_admin
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


def model_service(request: Request) -> ModelService:
    """Return the service that `app.py` put into ``app.state.models``."""
    return cast("ModelService", request.app.state.models)


Models = Annotated[ModelService, Depends(model_service)]
router = APIRouter(prefix="/v1", tags=["models"])


@router.get("/models", dependencies=[Depends(require_admin)])
def list_versions(models: Models) -> list[VersionView]:
    """Return all versions, the newest first."""
    return [_view(row) for row in models.versions()]


@router.get("/models/{version}", dependencies=[Depends(require_admin)])
def show_version(version: str, models: Models) -> VersionView:
    """Return one version with every variant that was built."""
    return _view(models.version(version))


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
    )
