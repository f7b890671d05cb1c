"""What a person reads who wrote a key or a value wrong."""

from typing import Annotated, Any, Literal

import msgspec
import pytest

from shared.config import convert
from shared.errors import ConfigError


class Column(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    minimum: Annotated[float, msgspec.Meta(ge=0)] | None = None


class Options(msgspec.Struct, forbid_unknown_fields=True):
    columns: Annotated[tuple[Column, ...], msgspec.Meta(min_length=1)]
    model: Literal["linear", "mlp"] = "linear"
    first: Column | None = None


ONE = [{"name": "age"}]


@pytest.mark.parametrize(
    ("document", "sentence"),
    [
        ({"colums": ONE}, "unknown key 'colums' at the top; did you mean 'columns'?"),
        (
            {"columns": [{"name": "age", "least": 1}]},
            "unknown key 'least' in [columns[0]]; known here: name, minimum",
        ),
        (
            {"columns": ONE, "first": {"nmae": "age"}},
            "unknown key 'nmae' in [first]; did you mean 'name'?",
        ),
        ({}, "key 'columns' is missing at the top; add it"),
        ({"columns": [{}]}, "key 'name' is missing in [columns[0]]; add it"),
        (
            {"columns": ONE, "model": "mpl"},
            "model: there is no 'mpl'; choose one of 'linear', 'mlp'",
        ),
        (
            {"columns": [{"name": "age", "minimum": "5"}]},
            "columns[0].minimum: expected `float | null`, got `str`; change it and try again",
        ),
        ([], "the document: expected `object`, got `array`; change it and try again"),
    ],
)
def test_a_mistake_is_named_with_its_place_and_its_cure(document: Any, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        convert(document, Options, source="task.toml")
    assert str(caught.value) == f"task.toml: {sentence}"
