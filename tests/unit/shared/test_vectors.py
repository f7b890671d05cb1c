import numpy as np
import pytest
import torch
from torch import nn

from shared.errors import PeerError
from shared.tasks.vectors import load_vector, to_vector, vector_size


def small_network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2))


def test_a_vector_carries_all_parameters_from_one_network_to_another() -> None:
    source, target = small_network(0), small_network(1)
    source(torch.randn(8, 1, 4, 4))  # moves the running statistics of BatchNorm

    load_vector(target, to_vector(source))

    source.eval()
    target.eval()
    images = torch.randn(5, 1, 4, 4)
    assert torch.equal(source(images), target(images))


def test_integer_buffers_stay_where_they_are() -> None:
    model = small_network(0)
    model(torch.randn(8, 1, 4, 4))

    load_vector(model, np.zeros(vector_size(model), dtype=np.float32))

    assert int(model.state_dict()["1.num_batches_tracked"]) == 1
    assert vector_size(model) == 3 * 9 + 3 + 4 * 3 + 12 * 2 + 2


def test_the_vector_is_a_copy_of_shape_d_in_float32() -> None:
    model = small_network(0)
    vector = to_vector(model)
    vector[:] = 7

    assert vector.dtype == np.float32
    assert vector.shape == (vector_size(model),)
    assert not np.any(to_vector(model) == 7)


def test_a_read_only_vector_loads() -> None:
    model = small_network(0)
    vector = np.ones(vector_size(model), dtype=np.float32)
    vector.flags.writeable = False

    load_vector(model, vector)

    assert np.all(to_vector(model) == 1)


@pytest.mark.parametrize("wrong", [0, 1, 10_000])
def test_a_vector_of_another_network_is_refused_and_changes_nothing(wrong: int) -> None:
    model = small_network(0)
    before = to_vector(model)

    with pytest.raises(PeerError, match="do not fit"):
        load_vector(model, np.zeros(wrong, dtype=np.float32))

    np.testing.assert_array_equal(to_vector(model), before)


def test_a_vector_with_nan_is_refused_and_changes_nothing() -> None:
    model = small_network(0)
    before = to_vector(model)
    diverged = before.copy()
    diverged[3] = np.nan

    with pytest.raises(PeerError, match="NaN"):
        load_vector(model, diverged)

    np.testing.assert_array_equal(to_vector(model), before)
