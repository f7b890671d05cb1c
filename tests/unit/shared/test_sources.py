import gzip
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shared.errors import DataError
from shared.tasks.contract import DataContract, Feature, ImageShape
from shared.tasks.sources import read_source
from tests.system_packages import require_fashion_mnist

PUMPS = DataContract(
    sources=("csv", "npz"),
    features=(
        Feature(name="pressure", minimum=0, maximum=10),
        Feature(name="temperature", minimum=-40, maximum=120),
    ),
    target="state",
    labels=("ok", "failed"),
    max_bad_fraction=0.5,
)
PRICES = DataContract(
    sources=("csv", "npz"),
    features=(Feature(name="area"),),
    target="price",
    target_minimum=0,
    target_maximum=1000,
)
PICTURES = DataContract(
    sources=("images", "idx", "npz"),
    image=ImageShape(4, 3, 1),
    labels=("cat", "dog"),
    max_bad_fraction=0.5,
)


def write_csv(folder: Path, text: str) -> Path:
    path = folder / "data.csv"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(path: Path, contract: DataContract) -> str:
    with pytest.raises(DataError) as caught:
        read_source(path, contract)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


# --- CSV ------------------------------------------------------------------------------------------


def test_a_csv_is_read_by_its_header_whatever_the_order_of_columns(tmp_path: Path) -> None:
    path = write_csv(tmp_path, "state,note,temperature,pressure\nok,a,20,1.5\nfailed,b,-3.5,2\n")

    intake = read_source(path, PUMPS)

    np.testing.assert_array_equal(intake.examples.inputs, np.array([[1.5, 20], [2, -3.5]]))
    assert intake.examples.inputs.dtype == np.float32
    assert intake.examples.targets.tolist() == [0, 1]
    assert intake.examples.targets.dtype == np.int64
    assert intake.skipped == {}


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_csv_may_be_delimited_as_spreadsheets_do_and_start_with_a_mark(
    tmp_path: Path, delimiter: str
) -> None:
    path = tmp_path / "data.csv"
    lines = ["area,price", "10,250.5", "", "20,500"]
    path.write_text("\n".join(lines).replace(",", delimiter), encoding="utf-8-sig")

    examples = read_source(path, PRICES).examples

    assert examples.inputs.tolist() == [[10], [20]]
    assert examples.targets.tolist() == [250.5, 500]
    assert examples.targets.dtype == np.float32


def test_rows_that_break_the_contract_are_left_out_and_counted_by_reason(tmp_path: Path) -> None:
    good = "1,20,ok\n" * 20
    bad = "11,20,ok\n1,hot,ok\n1,,ok\n1,nan,failed\n1,20,broken\n1,20\n1,inf,ok\n"
    path = write_csv(tmp_path, f"pressure,temperature,state\n{good}{bad}")

    intake = read_source(path, PUMPS)

    assert len(intake.examples) == 20
    assert intake.skipped == {
        "feature 'pressure' is out of range": 1,
        "feature 'temperature' is not a number": 1,
        "feature 'temperature' is missing": 2,
        "feature 'temperature' is out of range": 1,
        "label is none of 'ok', 'failed'": 1,
        "number of fields is not that of the header": 1,
    }


def test_a_csv_with_too_many_bad_rows_is_refused_with_the_counted_reasons(tmp_path: Path) -> None:
    path = write_csv(tmp_path, "pressure,temperature,state\n1,20,ok\n1,20,broken\n1,20,gone\n")

    assert refusal(path, PUMPS) == (
        f"{path} does not fit its task: 2 of 3 rows break the contract (at most 50% may): "
        "2 x label is none of 'ok', 'failed' (first: line 3); "
        "mend the data or correct the task's options"
    )


def test_targets_outside_their_range_and_numbers_too_large_are_left_out(tmp_path: Path) -> None:
    path = write_csv(tmp_path, "area,price\n" + "1,5\n" * 30 + "1,1001\n1,x\n1e39,5\n")

    assert read_source(path, PRICES).skipped == {
        "target 'price' is out of range": 1,
        "target 'price' is not a number": 1,
        "feature 'area' is out of range": 1,
    }


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "has no column 'area', it has none; rename the column"),
        ("area;cost\n1;2\n", "has no column 'price', it has 'area', 'cost'; rename the column"),
        ("area,price,area\n1,2,3\n", "has several columns 'area'; rename all but one"),
        ("area,price\n", "holds no rows; give a source with data"),
        ('area,price\n1,"' + "x" * 200_000, "is not a CSV file: field larger than field limit"),
    ],
)
def test_a_csv_that_cannot_serve_is_refused_in_one_sentence(
    tmp_path: Path, text: str, sentence: str
) -> None:
    assert sentence in refusal(write_csv(tmp_path, text), PRICES)


def test_a_csv_in_another_encoding_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_bytes("area,price,straße\n1,2,3\n".encode("latin-1"))

    assert refusal(path, PRICES) == f"{path} is not text in UTF-8; save it as CSV in UTF-8"


# --- Paths ----------------------------------------------------------------------------------------


def test_a_path_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    assert "does not exist; check the path" in refusal(tmp_path / "nothing.csv", PRICES)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_refused(tmp_path: Path) -> None:
    path = write_csv(tmp_path, "area,price\n1,2\n")
    path.chmod(0)

    assert "Permission denied; check the file" in refusal(path, PRICES)


def test_a_folder_in_place_of_a_csv_file_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "data.csv"
    folder.mkdir()

    assert "but the task reads a CSV file with a header or an NPZ file" in refusal(folder, PRICES)


def test_a_file_of_unknown_kind_is_refused_with_the_kinds_there_are(tmp_path: Path) -> None:
    path = tmp_path / "data.xlsx"
    path.touch()

    assert "is of no kind that is read here; give a CSV file" in refusal(path, PRICES)


# --- Folders of pictures --------------------------------------------------------------------------


def picture_folder(folder: Path) -> Path:
    for label, shade in (("cat", 10), ("dog", 200)):
        (folder / label).mkdir(parents=True)
        for number in range(3):
            pixels = np.full((4, 3), shade + number, np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{number}.png")
    return folder


def test_a_picture_folder_is_read_in_the_order_of_its_paths(tmp_path: Path) -> None:
    examples = read_source(picture_folder(tmp_path), PICTURES).examples

    assert examples.inputs.shape == (6, 1, 4, 3)
    assert examples.inputs.dtype == np.uint8
    assert examples.inputs[:, 0, 0, 0].tolist() == [10, 11, 12, 200, 201, 202]
    assert examples.targets.tolist() == [0, 0, 0, 1, 1, 1]


def test_pictures_that_break_the_contract_are_left_out_and_counted(tmp_path: Path) -> None:
    picture_folder(tmp_path)
    Image.new("L", (5, 5)).save(tmp_path / "cat" / "large.png")
    Image.new("I;16", (3, 4)).save(tmp_path / "cat" / "deep.png")
    (tmp_path / "cat" / "cut.png").write_bytes((tmp_path / "cat" / "0.png").read_bytes()[:50])
    (tmp_path / "cat" / "fake.jpg").write_text("no picture")
    (tmp_path / "dog" / "notes.txt").touch()
    (tmp_path / "dog" / ".DS_Store").touch()
    (tmp_path / "bird").mkdir()
    (tmp_path / "bird" / "0.png").touch()

    intake = read_source(tmp_path, PICTURES)

    assert len(intake.examples) == 6
    assert intake.skipped == {
        "picture is not 4 x 3 pixels": 1,
        "picture has more than 8 bits per channel": 1,
        "picture cannot be decoded": 2,
        "file is neither PNG nor JPEG": 1,
        "folder is named like no label": 1,
    }


def test_pictures_all_of_another_size_are_refused(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    Image.new("L", (28, 28)).save(tmp_path / "cat" / "0.png")

    sentence = refusal(tmp_path, PICTURES)

    assert "1 x picture is not 4 x 3 pixels (first: cat/0.png)" in sentence
    assert sentence.endswith("mend the data or correct the task's options")


def test_colours_become_grey_and_grey_becomes_colours_as_the_contract_asks(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    Image.new("RGB", (3, 4), (255, 0, 0)).save(tmp_path / "cat" / "red.png")
    Image.new("L", (3, 4), 100).save(tmp_path / "cat" / "grey.png")
    coloured = DataContract(
        sources=("images",), image=ImageShape(4, 3, 3), labels=("cat",), max_bad_fraction=0
    )

    grey = read_source(tmp_path, PICTURES).examples.inputs
    colours = read_source(tmp_path, coloured).examples.inputs

    assert grey[:, 0, 0, 0].tolist() == [100, 76]
    assert colours[:, :, 0, 0].tolist() == [[100, 100, 100], [255, 0, 0]]


def test_a_folder_without_a_label_s_sub_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "kitten").mkdir()

    assert "no sub-folder named like one of the labels (cat, dog); sort" in refusal(
        tmp_path, PICTURES
    )


# --- IDX ------------------------------------------------------------------------------------------


def write_idx(path: Path, array: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> None:
    header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
    content = header + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_pair(folder: Path, labels: list[int], *, name: str = "train", end: str = "") -> None:
    images = np.arange(len(labels) * 12, dtype=np.uint8).reshape(-1, 4, 3)
    write_idx(folder / f"{name}-images-idx3-ubyte{end}", images)
    write_idx(folder / f"{name}-labels-idx1-ubyte{end}", np.array(labels, np.uint8))


@pytest.mark.parametrize("end", ["", ".gz"])
def test_a_folder_with_one_pair_of_idx_files_is_read(tmp_path: Path, end: str) -> None:
    write_pair(tmp_path, [0, 1, 1], end=end)

    intake = read_source(tmp_path, PICTURES)

    assert intake.examples.inputs.shape == (3, 1, 4, 3)
    assert intake.examples.inputs.ravel().tolist() == list(range(36))
    assert intake.examples.targets.tolist() == [0, 1, 1]


def test_idx_labels_outside_the_contract_are_left_out(tmp_path: Path) -> None:
    write_pair(tmp_path, [0, 2, 1])

    intake = read_source(tmp_path, PICTURES)

    assert intake.examples.targets.tolist() == [0, 1]
    assert intake.skipped == {"label is none of 'cat', 'dog'": 1}


def test_one_of_several_idx_pairs_must_be_named(tmp_path: Path) -> None:
    write_pair(tmp_path, [0, 1], name="t10k")
    write_pair(tmp_path, [1, 1, 0], name="train")

    assert "name one of them: t10k-images-idx3-ubyte, train-images-idx3-ubyte" in refusal(
        tmp_path, PICTURES
    )
    named = read_source(tmp_path / "train-images-idx3-ubyte", PICTURES)
    assert named.examples.targets.tolist() == [1, 1, 0]


def cut_short(folder: Path) -> None:
    path = folder / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])


def of_another_size(folder: Path) -> None:
    write_idx(folder / "train-images-idx3-ubyte", np.zeros((2, 5, 5), np.uint8))


def damaged_gzip(folder: Path) -> None:
    plain = folder / "train-images-idx3-ubyte"
    zipped = gzip.compress(plain.read_bytes())
    plain.with_name(plain.name + ".gz").write_bytes(zipped[:-6])
    plain.unlink()


def no_labels(folder: Path) -> None:
    (folder / "train-labels-idx1-ubyte").unlink()


def fewer_labels(folder: Path) -> None:
    write_idx(folder / "train-labels-idx1-ubyte", np.zeros(1, np.uint8))


def labels_for_images(folder: Path) -> None:
    write_idx(folder / "train-images-idx3-ubyte", np.zeros(2, np.uint8))


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (cut_short, "is cut short or too long; fetch it again"),
        (of_another_size, "holds images of 5 x 5 x 1 where the contract wants 4 x 3 x 1; scale"),
        (damaged_gzip, "is a damaged gzip file"),
        (no_labels, "has no labels beside it; put train-labels-idx1-ubyte into the same folder"),
        (fewer_labels, "holds 2 images but its labels file 1 labels"),
        (labels_for_images, "is not an IDX file of bytes in 3 dimensions"),
    ],
)
def test_damaged_idx_files_are_refused(
    tmp_path: Path, spoil: Callable[[Path], None], sentence: str
) -> None:
    write_pair(tmp_path, [0, 1])
    spoil(tmp_path)

    assert sentence in refusal(tmp_path, PICTURES)


def test_fashion_mnist_is_read_as_debian_ships_it() -> None:
    images = require_fashion_mnist() / "t10k-images-idx3-ubyte.gz"
    contract = DataContract(
        sources=("idx",), image=ImageShape(28, 28, 1), labels=tuple("abcdefghij")
    )

    intake = read_source(images, contract)

    assert intake.examples.inputs.shape == (10_000, 1, 28, 28)
    assert np.bincount(intake.examples.targets).tolist() == [1000] * 10
    assert intake.skipped == {}


# --- NPZ ------------------------------------------------------------------------------------------


def write_npz(folder: Path, **arrays: object) -> Path:
    path = folder / "data.npz"
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


def test_features_are_read_from_npz_and_checked(tmp_path: Path) -> None:
    inputs = np.array([[1, 20], [np.nan, 20], [1, 200], [2, 30], [3, 40]])
    path = write_npz(tmp_path, inputs=inputs, targets=np.array([0, 0, 0, 1, 7]))

    intake = read_source(path, replace_bad_fraction(PUMPS, 0.9))

    assert intake.examples.inputs.tolist() == [[1, 20], [2, 30]]
    assert intake.examples.inputs.dtype == np.float32
    assert intake.examples.targets.tolist() == [0, 1]
    assert intake.skipped == {
        "feature 'pressure' is missing": 1,
        "feature 'temperature' is out of range": 1,
        "label is none of 'ok', 'failed'": 1,
    }


def replace_bad_fraction(contract: DataContract, fraction: float) -> DataContract:
    return DataContract(
        sources=contract.sources,
        features=contract.features,
        target=contract.target,
        labels=contract.labels,
        max_bad_fraction=fraction,
    )


@pytest.mark.parametrize("shape", [(2, 4, 3), (2, 4, 3, 1), (2, 1, 4, 3)])
def test_images_are_read_from_npz_in_any_usual_layout(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    pixels = np.arange(24, dtype=np.uint8)
    path = write_npz(tmp_path, images=pixels.reshape(shape), labels=np.array(["dog", "cat"]))

    examples = read_source(path, PICTURES).examples

    assert examples.inputs.shape == (2, 1, 4, 3)
    assert examples.inputs.ravel().tolist() == pixels.tolist()
    assert examples.targets.tolist() == [1, 0]


def test_numbers_are_predicted_from_npz_too(tmp_path: Path) -> None:
    path = write_npz(tmp_path, inputs=np.ones((3, 1)), targets=np.array([1, 2, 3]))

    assert read_source(path, PRICES).examples.targets.dtype == np.float32


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"x": np.ones(3), "y": np.ones(3)}, "holds the arrays x, y; name them inputs and targets"),
        (
            {"inputs": np.array([{}]), "targets": np.ones(1)},
            "is not an NPZ archive of plain arrays; store it with numpy.savez",
        ),
        (
            {"inputs": np.ones((3, 2)), "targets": np.ones(3)},
            "shape (2,) where the contract has 1 numeric features",
        ),
        ({"inputs": np.ones((3, 1)), "targets": np.ones(2)}, "3 inputs but 2 targets"),
        (
            {"inputs": np.ones((3, 1)), "targets": np.array(["a", "b", "c"])},
            "where the contract wants numbers, one for each row",
        ),
        ({"inputs": np.ones((0, 1)), "targets": np.ones(0)}, "holds no rows"),
    ],
)
def test_an_npz_that_cannot_serve_is_refused_in_one_sentence(
    tmp_path: Path, arrays: dict[str, object], sentence: str
) -> None:
    assert sentence in refusal(write_npz(tmp_path, **arrays), PRICES)


def test_images_of_another_type_or_size_are_refused(tmp_path: Path) -> None:
    path = write_npz(tmp_path, images=np.zeros((2, 4, 3)), labels=np.zeros(2, np.int64))

    assert "type float64 and shape (4, 3) where the contract wants uint8 of 4 x 3 x 1" in refusal(
        path, PICTURES
    )


def test_a_file_that_only_calls_itself_npz_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    path.write_text("no archive")

    assert "is not an NPZ archive of plain arrays" in refusal(path, PRICES)
