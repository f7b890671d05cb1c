"""Writes the two CSV files of the README's tutorial: ``python -m simulations.two_clinics FOLDER``.

The rows are real: Wisconsin's breast cancer data (UCI, 569 patients), which scikit-learn bundles,
dealt to two clinics of different kinds: one sees mostly large tumours, the other mostly small ones.
"""

import csv
import sys
from pathlib import Path

import numpy as np
from sklearn.datasets import load_breast_cancer

COLUMNS = ("radius", "texture", "smoothness", "concavity", "symmetry")  # of "mean …" in the source


def write_clinics(folder: Path) -> tuple[Path, Path]:
    """Write ``clinic-a.csv`` and ``clinic-b.csv`` into ``folder`` and return their paths."""
    data = load_breast_cancer()
    wanted = [list(data.feature_names).index(f"mean {column}") for column in COLUMNS]
    features, labels = data.data[:, wanted], data.target_names[data.target]
    rng = np.random.default_rng(0)
    large = features[:, 0] > np.median(features[:, 0])
    at_a = rng.random(len(labels)) < np.where(large, 0.7, 0.3)
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "clinic-a.csv", folder / "clinic-b.csv"
    for path, rows in zip(paths, (at_a, ~at_a), strict=True):
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
