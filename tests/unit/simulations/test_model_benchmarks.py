"""Benches of models refuse what they do not measure before they do any work."""

from collections.abc import Callable
from typing import Any

import pytest

from shared.errors import ConfigError
from simulations.benchmarks import models, models_accuracy


@pytest.mark.parametrize(
    ("run", "known"), [(models.run, models.SELECTOR), (models_accuracy.run, models_accuracy.INT8)]
)
def test_an_unknown_row_is_refused_with_the_names_of_all(
    run: Callable[..., Any], known: str
) -> None:
    said: list[str] = []
    with pytest.raises(ConfigError, match="there is no row 'speed'") as refused:
        run(only="speed", quick=True, progress=said.append)
    assert known in str(refused.value)
    assert said == []
