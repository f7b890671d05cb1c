import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.tasks.metrics import (
    classification_bounds,
    classification_summary,
    classification_sums,
    regression_bounds,
    regression_summary,
    regression_sums,
    restore_statistics,
    scale_statistics,
)
from shared.tasks.task import LARGEST_LOSS


def added(*parts: dict[str, float]) -> dict[str, float]:
    return {name: sum(part[name] for part in parts) for name in parts[0]}


@given(seed=st.integers(0, 2**32 - 1), cut=st.integers(1, 19))
def test_sums_of_parts_are_the_sums_of_the_whole(seed: int, cut: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(20, 4, generator=generator)
    labels = torch.randint(4, (20,), generator=generator)
    numbers = torch.randn(20, generator=generator)

    whole = classification_sums(logits, labels)
    parts = added(
        classification_sums(logits[:cut], labels[:cut]),
        classification_sums(logits[cut:], labels[cut:]),
    )
    assert parts == pytest.approx(whole, rel=1e-5)

    scale = {"mean": 3.0, "scale": 2.0}
    whole = regression_sums(logits[:, 0], numbers, **scale)
    parts = added(
        regression_sums(logits[:cut, 0], numbers[:cut], **scale),
        regression_sums(logits[cut:, 0], numbers[cut:], **scale),
    )
    assert parts == pytest.approx(whole)


def test_accuracy_counts_hits() -> None:
    logits = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 2.0], [0.0, 2.0]])
    metrics = classification_summary(classification_sums(logits, torch.tensor([0, 1, 1, 1])))

    assert metrics["accuracy"] == 0.75
    assert metrics["loss"] == pytest.approx(np.log(1 + np.exp(-2)) + 2 / 4)


def test_regression_metrics_agree_with_their_textbook_forms() -> None:
    rng = np.random.default_rng(0)
    targets = rng.uniform(1e6, 1e6 + 10, 500)  # far from 0, where naive sums lose their digits
    predictions = targets + rng.normal(0, 1, 500)
    sums = regression_sums(
        torch.from_numpy(predictions), torch.from_numpy(targets), mean=1e6 + 5, scale=5.0
    )

    metrics = regression_summary(sums, scale=5.0)

    errors = predictions - targets
    assert metrics["rmse"] == pytest.approx(np.sqrt((errors**2).mean()))
    assert metrics["mae"] == pytest.approx(np.abs(errors).mean())
    assert metrics["r2"] == pytest.approx(1 - (errors**2).sum() / targets.var() / 500)
    assert metrics["loss"] == pytest.approx((errors**2).mean() / 25)


def test_targets_that_never_vary_leave_nothing_to_explain() -> None:
    sums = regression_sums(torch.zeros(5), torch.ones(5), mean=0.0, scale=1.0)

    assert regression_summary(sums, scale=1.0)["r2"] == 0


@given(rows=st.integers(1, 50), reach=st.floats(0.1, 10), seed=st.integers(0, 2**32 - 1))
def test_statistics_within_their_bounds_come_back_as_means_of_one_device(
    rows: int, reach: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    targets, predictions = torch.from_numpy(rng.uniform(-reach, reach, (2, rows)))
    sums = regression_sums(predictions, targets, mean=0.0, scale=1.0)

    scaled = scale_statistics(sums, regression_bounds(reach))
    restored = restore_statistics(scaled, regression_bounds(reach))

    assert np.abs(scaled).max() == 1  # of ``examples``: how many there are is not told
    assert restored == pytest.approx({name: value / rows for name, value in sums.items()})


def test_what_is_beyond_its_bound_is_clipped() -> None:
    sums = {"examples": 2.0, "loss_sum": 1e9, "correct": 1.0}

    scaled = scale_statistics(sums, classification_bounds())

    assert restore_statistics(scaled, classification_bounds()) == {
        "examples": 1.0,
        "loss_sum": LARGEST_LOSS,
        "correct": 0.5,
    }


def test_a_device_without_examples_adds_nothing() -> None:
    assert not scale_statistics({"examples": 0.0}, classification_bounds()).any()
