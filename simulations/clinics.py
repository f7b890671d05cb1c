"""Writes the CSV files of the README's tutorial: ``python -m simulations.clinics FOLDER``.

The rows are real: Wisconsin's breast cancer data (UCI, 569 patients), which scikit-learn bundles,
dealt to five clinics of different kinds: from one that sees mostly small tumours to one that sees
mostly large ones.
"""

import csv
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from sklearn.datasets import load_breast_cancer

CLINICS = "abcde"
COLUMNS = ("radius", "texture", "smoothness", "concavity", "symmetry")  # of "mean …" in the source
_SPREAD = 1.5  # of chance over size: larger makes the clinics more alike


def write_clinics(folder: Path) -> Sequence[Path]:
    """Write ``clinic-a.csv`` to ``clinic-e.csv`` into ``folder`` and return their paths."""
    data = load_breast_cancer()
    wanted = [list(data.feature_names).index(f"mean {column}") for column in COLUMNS]
    features, labels = data.data[:, wanted], data.target_names[data.target]
    sizes = (features[:, 0] - features[:, 0].mean()) / features[:, 0].std()
    order = np.argsort(sizes + np.random.default_rng(0).normal(0, _SPREAD, len(sizes)))
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"clinic-{clinic}.csv" for clinic in CLINICS]
    for path, rows in zip(paths, np.array_split(order, len(paths)), strict=True):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow((*COLUMNS, "diagnosis"))
            writer.writerows(
                (*map(str, values), label)
                for values, label in zip(features[rows], labels[rows], strict=True)
            )
    return paths


if __name__ == "__main__":
    for written in write_clinics(Path(sys.argv[1] if len(sys.argv) > 1 else ".")):
        print(written)
