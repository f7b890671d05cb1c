"""Reads what a path holds into examples that fit a data contract; free of torch.

Rows that break the contract are left out and counted, never fatal. A source with too many of them
is refused with the reasons: it is more likely the wrong file than a slightly dirty one.
"""

from collections.abc import Callable
from pathlib import Path

from shared.errors import DataError
from shared.tasks.contract import DataContract, SourceKind
from shared.tasks.csv_source import read_csv
from shared.tasks.examples import Examples
from shared.tasks.idx_source import find_idx_images, is_idx_images, read_idx
from shared.tasks.image_source import read_image_folder
from shared.tasks.intake import Intake, SkippedRows
from shared.tasks.npz_source import read_npz

_READERS: dict[SourceKind, Callable[[Path, DataContract, SkippedRows], Examples]] = {
    "csv": read_csv,
    "images": read_image_folder,
    "idx": read_idx,
    "npz": read_npz,
}
_WORDS: dict[SourceKind, str] = {
    "csv": "a CSV file with a header",
    "images": "a folder with one sub-folder of PNG or JPEG files per label",
    "idx": "a folder with IDX files",
    "npz": "an NPZ file",
}


def read_source(path: Path, contract: DataContract) -> Intake:
    """Read all rows of the source at ``path`` that fit ``contract``.

    Args:
        path: a CSV or NPZ file, an image folder, an IDX folder, or one IDX file of images whose
            labels lie beside it.
        contract: what the rows must be; see `DataContract`.

    Returns:
        At least one example, and the skipped rows by reason.

    Raises:
        DataError: the path cannot be read, is of a kind that the contract does not take, or too
            many rows break the contract; one sentence with the counted reasons.
    """
    kind = _kind_of(path)
    if kind not in contract.sources:
        wanted = " or ".join(_WORDS[source] for source in contract.sources)
        raise DataError(f"{path} is {_WORDS[kind]}, but the task reads {wanted}; name one of those")
    skipped = SkippedRows()
    try:
        examples = _READERS[kind](path, contract, skipped)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}; check the file") from error
    _refuse_too_many(path, contract, skipped, usable=len(examples))
    return Intake(examples, dict(skipped.counts))


def _kind_of(path: Path) -> SourceKind:
    if not path.exists():
        raise DataError(f"{path} does not exist; check the path")
    if path.is_dir():
        return "idx" if find_idx_images(path) else "images"
    if is_idx_images(path):
        return "idx"
    match path.suffix.lower():
        case ".csv" | ".tsv":
            return "csv"
        case ".npz":
            return "npz"
    raise DataError(
        f"{path} is of no kind that is read here; "
        f"give {', '.join(_WORDS[kind] for kind in ('csv', 'npz', 'images'))}, or {_WORDS['idx']}"
    )


def _refuse_too_many(
    path: Path, contract: DataContract, skipped: SkippedRows, *, usable: int
) -> None:
    bad = skipped.counts.total()
    if not usable and not bad:
        raise DataError(f"{path} holds no rows; give a source with data")
    if not usable or bad > contract.max_bad_fraction * (usable + bad):
        raise DataError(
            f"{path} does not fit its task: {bad} of {usable + bad} rows break the contract "
            f"(at most {contract.max_bad_fraction:.0%} may): {skipped}; "
            "mend the data or correct the task's options"
        )
