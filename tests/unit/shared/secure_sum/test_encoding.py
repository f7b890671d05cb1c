import math
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from shared.errors import ConfigError, PeerError
from shared.secure_sum import encoding as encoding_module
from shared.secure_sum.choice import choose_encoding, largest_steps
from shared.secure_sum.config import ExactLane, LaneBits, Noise, SumConfig
from shared.secure_sum.encoding import decode_sum, encode, was_clipped
from shared.secure_sum.masking import Lanes
from shared.secure_sum.noise import sensitivity_of, share_variance
from shared.secure_sum.sampler import Keystream
from tests.unit.shared.secure_sum.whole_sum import Entropy, config_of, encoding_of

SEED = bytes(range(16))
MASK = {16: 0xFFFF, 32: 0xFFFFFFFF}
lane_bits = st.sampled_from([16, 32])
seeds = st.integers(0, 2**32 - 1)


def sum_config(
    length: int,
    bits: LaneBits = 16,
    *,
    devices: int = 8,
    clip_norm: float = 1.0,
    rotate: bool = False,
    noise: Noise | None = None,
    **changes: Any,
) -> SumConfig:
    chosen = choose_encoding(
        length=length,
        lane_bits=bits,
        clip_norm=clip_norm,
        max_roster=devices,
        rotate=rotate,
        noise=noise,
        rotation_seed=SEED,
    )
    fields: dict[str, Any] = {"encoding": chosen, "exact_lanes": (), "max_roster": devices}
    return config_of(**{**fields, "noise": noise, **changes})


def encoded(
    config: SumConfig, vector: NDArray[Any], exact: dict[str, float] | None = None, seed: int = 0
) -> Lanes:
    rng = np.random.default_rng(seed)
    return encode(config, vector, exact or {}, rng=rng, entropy=Entropy(seed))


def total_of(config: SumConfig, vectors: list[NDArray[Any]], seed: int = 0) -> Lanes:
    parts = [encoded(config, vector, seed=seed + i) for i, vector in enumerate(vectors)]
    main = parts[0].main.copy()
    for part in parts[1:]:
        main += part.main
    return Lanes(main, parts[0].exact)


def centred(lanes: Lanes) -> NDArray[np.int64]:
    signed = {np.dtype(np.uint16): np.int16, np.dtype(np.uint32): np.int32}[lanes.main.dtype]
    return lanes.main.view(signed).astype(np.int64)


# --- rounding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("bits", [16, 32])
def test_rounding_has_no_bias(kind: type[Any], bits: LaneBits) -> None:
    rng = np.random.default_rng(1)
    vector = rng.normal(size=1_000_000).astype(kind)
    clip_norm = 2 * float(np.linalg.norm(vector))
    steps = 2.0 if bits == 16 else 3000.0
    encoding = encoding_of(
        lane_bits=bits, length=vector.size, clip_norm=clip_norm, steps_per_unit=steps,
        max_steps=largest_steps(bits, 2),
    )  # fmt: skip
    config = config_of(encoding=encoding, exact_lanes=(), max_roster=2)

    error = centred(encoded(config, vector)) - vector.astype(np.float64) * steps

    assert np.abs(error).max() < 1 + 1e-3
    assert abs(error.mean()) < 4 * error.std() / math.sqrt(error.size)
    # Nor has it one that depends on what is rounded: the error is of each value, not of its size.
    assert abs(np.corrcoef(error, vector)[0, 1]) < 4 / math.sqrt(error.size)


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.25, 0.5, 0.999])
@pytest.mark.parametrize("whole", [-3, -1, 0, 2])
def test_a_lane_goes_up_as_often_as_its_fraction_says(fraction: float, whole: int) -> None:
    encoding = encoding_of(length=400_000, clip_norm=1e6, steps_per_unit=1.0, max_steps=16_000)
    config = config_of(encoding=encoding, exact_lanes=(), max_roster=2)

    lanes = centred(encoded(config, np.full(400_000, whole + fraction)))

    assert set(np.unique(lanes)) <= {whole, whole + 1}
    deviation = math.sqrt(fraction * (1 - fraction) / lanes.size)
    assert (lanes - whole).mean() == pytest.approx(fraction, abs=4 * deviation + 2**-16)


def test_whole_steps_stay_as_they_are() -> None:
    encoding = encoding_of(length=7, clip_norm=100.0, steps_per_unit=4.0, max_steps=1000)
    config = config_of(encoding=encoding, exact_lanes=())
    vector = np.array([0.0, 0.25, -0.25, 10, -10, 3.75, -0.0], np.float32)

    assert centred(encoded(config, vector)).tolist() == [0, 1, -1, 40, -40, 15, 0]


def test_the_same_dice_give_the_same_lanes_and_others_give_others() -> None:
    config = sum_config(1000)
    vector = np.random.default_rng(0).normal(size=1000) / 100

    assert encoded(config, vector, seed=1).digest() == encoded(config, vector, seed=1).digest()
    assert encoded(config, vector, seed=1).digest() != encoded(config, vector, seed=2).digest()


def test_no_dice_are_thrown_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[bytes] = []
    keys: list[bytes] = []

    class Recorded(Keystream):
        def __init__(self, key: bytes) -> None:
            super().__init__(key)
            keys.append(key)

        def fill(self, words: NDArray[Any]) -> None:
            super().fill(words)
            used.append(words.tobytes())

    monkeypatch.setattr(encoding_module, "Keystream", Recorded)
    encoded(sum_config(100_000), np.zeros(100_000, np.float32))

    cipher = Cipher(algorithms.AES128(keys[0]), modes.CTR(bytes(16))).encryptor()
    assert len(keys) == 1
    assert b"".join(used) == cipher.update(bytes(200_000))


def test_the_vector_itself_is_left_alone() -> None:
    vector = np.full(100, 5.0, np.float32)

    encoded(sum_config(100, rotate=True), vector)

    assert (vector == 5).all()


# --- encode, sum, decode -------------------------------------------------------------------------


@given(
    length=st.integers(1, 200),
    devices=st.integers(2, 20),
    bits=lane_bits,
    double=st.booleans(),
    seed=seeds,
)
def test_a_decoded_sum_is_off_by_less_than_a_step_per_device(
    *,
    length: int,
    devices: int,
    bits: LaneBits,
    double: bool,
    seed: int,
) -> None:
    config = sum_config(length, bits, devices=devices)
    rng = np.random.default_rng(seed)
    vectors = [_within(rng, length, double=double) for _ in range(devices)]

    decoded, _ = decode_sum(config, total_of(config, list(vectors), seed), count=devices)

    step = 1 / config.encoding.steps_per_unit
    error = np.abs(decoded - np.sum(vectors, axis=0, dtype=np.float64))
    assert error.max() <= devices * (step + 2e-6)  # 2e-6: clipped to just below the norm; float32


@given(length=st.integers(1, 200), devices=st.integers(2, 20), bits=lane_bits, seed=seeds)
def test_a_rotated_sum_is_as_close_as_its_steps_allow(
    length: int, devices: int, bits: LaneBits, seed: int
) -> None:
    # The range is so wide here that no coordinate is clamped after the rotation.
    steps = largest_steps(bits, devices)
    encoding = encoding_of(
        lane_bits=bits, length=length, steps_per_unit=steps, max_steps=steps, rotation_seed=SEED
    )
    config = config_of(encoding=encoding, exact_lanes=(), max_roster=devices)
    rng = np.random.default_rng(seed)
    vectors = [_within(rng, length, double=True) for _ in range(devices)]

    decoded, _ = decode_sum(config, total_of(config, list(vectors), seed), count=devices)

    error = np.linalg.norm(decoded - np.sum(vectors, axis=0))
    assert error <= devices * (math.sqrt(length) / steps + 2e-6)


def test_rotation_rounds_finer_where_coordinates_are_unequal() -> None:
    rng = np.random.default_rng(3)
    vectors = [np.concatenate([[0.9], rng.normal(size=4095) * 0.002]) for _ in range(8)]
    errors = {}
    for rotate in (False, True):
        config = sum_config(4096, rotate=rotate)
        decoded, _ = decode_sum(config, total_of(config, vectors), count=8)
        errors[rotate] = np.linalg.norm(decoded - np.sum(vectors, axis=0))

    assert errors[True] < errors[False] / 3


@given(
    devices=st.integers(2, 256),
    bits=lane_bits,
    sign=st.sampled_from([-1.0, 1.0]),
    double=st.booleans(),
)
def test_a_whole_roster_at_the_edge_does_not_overflow(
    *,
    devices: int,
    bits: LaneBits,
    sign: float,
    double: bool,
) -> None:
    config = sum_config(1, bits, devices=devices)
    vector = np.array([sign * 1e9], np.float64 if double else np.float32)

    total = total_of(config, [vector] * devices)

    largest = config.encoding.max_steps
    assert abs(int(centred(total)[0])) <= devices * largest
    decoded, _ = decode_sum(config, total, count=devices)
    assert decoded[0] == pytest.approx(sign * devices, rel=2 / largest + 2e-6)


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("devices", [2, 16, 255, 256])
def test_lanes_at_the_very_edge_add_up_exactly_and_one_device_more_is_refused(
    bits: LaneBits, devices: int
) -> None:
    steps = largest_steps(bits, devices)
    encoding = encoding_of(
        lane_bits=bits, length=2, clip_norm=4.0 * steps, steps_per_unit=1.0, max_steps=steps
    )
    config = config_of(encoding=encoding, exact_lanes=(), max_roster=devices)
    vector = np.array([1.0, -1.0]) * 2 * steps  # clamped to the largest magnitude

    decoded, _ = decode_sum(config, total_of(config, [vector] * devices), count=devices)

    assert decoded.tolist() == [devices * steps, -devices * steps]
    if devices < 256:
        beyond = encoding_of(lane_bits=bits, max_steps=largest_steps(bits, devices + 1) + 1)
        with pytest.raises(ValueError, match="overflow"):
            config_of(encoding=beyond, exact_lanes=(), max_roster=devices + 1)


# --- clipping, and what is no vector -------------------------------------------------------------


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("scale", [1.5, 1e3, 1e18, 1e30, 1e37])
def test_a_long_vector_is_shortened_to_the_clip_norm(*, rotate: bool, scale: float) -> None:
    config = sum_config(1000, 32, clip_norm=0.5, rotate=rotate)
    direction = np.random.default_rng(4).normal(size=1000)
    direction /= np.linalg.norm(direction)
    vector = (direction * scale).astype(np.float32)

    decoded, _ = decode_sum(config, encoded(config, vector), count=1)

    assert was_clipped(config, vector)
    np.testing.assert_allclose(decoded, direction * 0.5, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e160, 1e307])
def test_extreme_doubles_are_clipped_like_others(scale: float) -> None:
    config = sum_config(3, 32, clip_norm=0.5)

    decoded, _ = decode_sum(config, encoded(config, np.array([3.0, 0, -4.0]) * scale), count=1)

    expected = [0.3, 0, -0.4] if scale > 1 else [0, 0, 0]
    np.testing.assert_allclose(decoded, expected, atol=1e-5)


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("length", [1, 2, 3, 7])
def test_whole_steps_stay_exact_up_to_the_clip_norm_itself(bits: LaneBits, length: int) -> None:
    steps = largest_steps(bits, 8)
    encoding = encoding_of(
        lane_bits=bits,
        length=length,
        clip_norm=math.sqrt(length),
        steps_per_unit=steps,
        max_steps=steps,
    )
    config = config_of(encoding=encoding, exact_lanes=(), max_roster=8)

    for sign in (-1.0, 1.0):
        lanes = centred(encoded(config, np.full(length, sign)))
        assert lanes.tolist() == [sign * steps] * length


@pytest.mark.parametrize("noise", [None, Noise(multiplier=1, survivors=1)])
@pytest.mark.parametrize("size", [1e30, 3e38])
def test_the_largest_float32_numbers_are_rotated_without_overflow(
    noise: Noise | None, size: float
) -> None:
    # One step is 1e298: nothing is left of them, and before, the device rounded for ever.
    chosen = encoding_of(
        lane_bits=32,
        length=4096,
        clip_norm=1e300,
        steps_per_unit=1e-298,
        max_steps=1000,
        rotation_seed=SEED,
    )
    config = config_of(encoding=chosen, exact_lanes=(), noise=noise, max_roster=8)

    lanes = centred(encoded(config, np.full(4096, size, np.float32)))

    assert np.abs(lanes).max() <= (1 if noise is None else 10 * sensitivity_of(chosen).l2)


def test_a_short_vector_is_not_clipped() -> None:
    config = sum_config(1000, clip_norm=1.0)

    assert not was_clipped(config, np.full(1000, 0.03, np.float32))
    assert was_clipped(config, np.full(1000, 0.032, np.float32))
    assert not was_clipped(config, np.zeros(1000))


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("rotate", [False, True])
def test_a_vector_that_is_not_finite_is_refused(
    *,
    poison: float,
    kind: type[Any],
    rotate: bool,
) -> None:
    vector = np.zeros(50_000, kind)
    vector[40_000] = poison

    with pytest.raises(ValueError, match="NaN or infinity"):
        encoded(sum_config(50_000, rotate=rotate), vector)
    with pytest.raises(ValueError, match="NaN or infinity"):
        was_clipped(sum_config(50_000), vector)


@pytest.mark.parametrize(
    "vector", [np.zeros(9), np.zeros((10, 1)), np.zeros(10, np.int64), np.zeros(10, np.float16)]
)
def test_a_vector_of_another_shape_or_type_is_refused(vector: NDArray[Any]) -> None:
    with pytest.raises(ValueError, match="for 10 lanes"):
        encoded(sum_config(10), vector)


def test_an_empty_vector_is_encoded_beside_exact_lanes() -> None:
    config = sum_config(0, exact_lanes=(ExactLane(name="rows", max_steps=10),))

    lanes = encoded(config, np.zeros(0), {"rows": 7})

    assert lanes.main.size == 0
    assert decode_sum(config, lanes, count=1)[1] == {"rows": 7.0}


# --- exact lanes ---------------------------------------------------------------------------------

EXACT = (
    ExactLane(name="rows", max_steps=1000),
    ExactLane(name="loss", steps_per_unit=1e6, max_steps=10**12),
)


@given(
    rows=st.lists(st.integers(-1000, 1000), min_size=1, max_size=12),
    loss=st.floats(-1e5, 1e5),
)
def test_exact_lanes_add_up_to_the_step(rows: list[int], loss: float) -> None:
    config = sum_config(0, devices=12, exact_lanes=EXACT)
    parts = [encoded(config, np.zeros(0), {"rows": row, "loss": loss}) for row in rows]
    total = Lanes(parts[0].main, np.sum([part.exact for part in parts], axis=0, dtype=np.uint64))

    _, values = decode_sum(config, total, count=len(rows))

    assert values["rows"] == sum(rows)
    assert values["loss"] == pytest.approx(len(rows) * loss, abs=len(rows) * 1e-6)


def test_exact_values_are_clamped_to_what_the_lane_holds() -> None:
    config = sum_config(0, exact_lanes=EXACT)

    lanes = encoded(config, np.zeros(0), {"rows": 10**30, "loss": -1e300})

    assert decode_sum(config, lanes, count=1)[1] == {"rows": 1000.0, "loss": -1e6}


def test_steps_so_fine_that_a_value_overflows_are_no_way_to_ask_how_large_it_is() -> None:
    # An error for 51 rows and none for 50 would tell a coordinator that chooses the steps.
    overflowing = ExactLane(name="rows", steps_per_unit=1.7e308 / 50, max_steps=1000)
    config = sum_config(0, exact_lanes=(overflowing,))

    below, above = (encoded(config, np.zeros(0), {"rows": rows}) for rows in (50, 500))

    np.testing.assert_array_equal(below.exact, above.exact)
    assert encoded(config, np.zeros(0), {"rows": -500}).exact.view(np.int64) == [-1000]


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_an_exact_value_that_is_not_finite_is_refused(poison: float) -> None:
    with pytest.raises(ValueError, match="'loss' is not finite"):
        encoded(sum_config(0, exact_lanes=EXACT), np.zeros(0), {"rows": 1, "loss": poison})


@pytest.mark.parametrize("values", [{}, {"rows": 1.0}, {"rows": 1.0, "loss": 1.0, "more": 1.0}])
def test_exact_values_are_those_of_the_configuration(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="not those"):
        encoded(sum_config(0, exact_lanes=EXACT), np.zeros(0), values)


# --- sums that are no sums -----------------------------------------------------------------------


def test_a_lane_that_no_honest_devices_could_make_is_refused() -> None:
    config = sum_config(3, devices=8)
    largest = config.encoding.max_steps
    honest = Lanes(np.array([3 * largest, 0, -3 * largest], np.int16).view(np.uint16), _no_lanes())
    forged = Lanes(np.array([3 * largest + 1, 0, 0], np.int16).view(np.uint16), _no_lanes())

    decode_sum(config, honest, count=3)
    with pytest.raises(PeerError, match="a device broke its bounds"):
        decode_sum(config, forged, count=3)


def test_an_exact_lane_that_no_honest_devices_could_make_is_refused() -> None:
    config = sum_config(0, exact_lanes=EXACT)
    forged = Lanes(np.zeros(0, np.uint16), np.array([2001, 0], np.uint64))

    with pytest.raises(PeerError, match="'rows' is beyond ±2000 steps"):
        decode_sum(config, forged, count=2)


def test_lanes_of_another_configuration_are_refused() -> None:
    lanes = encoded(sum_config(10), np.zeros(10))

    for other in (sum_config(11), sum_config(10, 32), sum_config(10, exact_lanes=EXACT)):
        with pytest.raises(ValueError, match="lanes"):
            decode_sum(other, lanes, count=1)


# --- with noise ----------------------------------------------------------------------------------


@given(
    length=st.integers(1, 300),
    clip_steps=st.floats(0.1, 500),
    shape=st.sampled_from(["spike", "even", "random", "half steps", "too long"]),
    double=st.booleans(),
    rotate=st.booleans(),
    seed=seeds,
)
def test_integers_are_never_above_the_sensitivity_that_noise_is_for(
    *,
    length: int,
    clip_steps: float,
    shape: str,
    double: bool,
    rotate: bool,
    seed: int,
) -> None:
    encoding = encoding_of(
        lane_bits=32, length=length, steps_per_unit=clip_steps, max_steps=1000,
        rotation_seed=SEED if rotate else None,
    )  # fmt: skip
    config = config_of(encoding=encoding, exact_lanes=(), noise=Noise(multiplier=1, survivors=2))
    sensitivity = sensitivity_of(encoding)
    vector = _shaped(shape, length, clip_steps, np.random.default_rng(seed))

    integers = _before_noise(config, vector if double else vector.astype(np.float32), seed)

    assert (integers**2).sum() <= sensitivity.l2_squared
    assert np.abs(integers).sum() <= sensitivity.l1 * (1 + 1e-12)


def test_a_rounding_above_the_sensitivity_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    # Vectors of half steps, and a bound that one rounding in two is above.
    monkeypatch.setattr("shared.secure_sum.noise._REROUNDING", 0.9)
    encoding = encoding_of(length=100, steps_per_unit=5.0, max_steps=100, lane_bits=32)
    config = config_of(encoding=encoding, exact_lanes=(), noise=Noise(multiplier=1, survivors=2))
    largest = sensitivity_of(encoding).l2_squared

    squares = [(_before_noise(config, np.full(100, 0.1), seed) ** 2).sum() for seed in range(200)]

    assert max(squares) <= largest
    assert np.mean(np.array(squares) > largest - 3) > 0.02  # the bound is met, not just kept


def test_noise_is_what_the_devices_share_should_be() -> None:
    noise = Noise(multiplier=2.0, survivors=10)
    config = sum_config(200_000, 32, devices=12, noise=noise)
    vector = np.zeros(200_000, np.float32)

    found = centred(encoded(config, vector)).astype(float)

    variance = share_variance(config.encoding, noise)
    assert found.var() == pytest.approx(variance, rel=0.01)
    assert 10 * variance == pytest.approx(4 * sensitivity_of(config.encoding).l2_squared)


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("kind", ["skellam", "discrete-gaussian"])
def test_a_noised_sum_is_off_by_its_noise_and_little_more(*, rotate: bool, kind: Any) -> None:
    noise = Noise(kind=kind, multiplier=1.0, survivors=10)
    config = sum_config(50_000, 32, devices=10, noise=noise, rotate=rotate)
    rng = np.random.default_rng(6)
    vectors = [_within(rng, 50_000, double=False) for _ in range(10)]

    decoded, _ = decode_sum(config, total_of(config, list(vectors)), count=10)

    error = decoded - np.sum(vectors, axis=0)
    assert error.std() == pytest.approx(1.0, rel=0.05)
    assert abs(error.mean()) < 4 * error.std() / math.sqrt(error.size)


def test_noise_wraps_and_is_never_clamped() -> None:
    # σ of the share is 2,000 steps in lanes of 16 bits around the edge of their range.
    encoding = encoding_of(length=20_000, clip_norm=1e7, steps_per_unit=1.0, max_steps=32_767)
    sensitivity = sensitivity_of(encoding).l2
    noise = Noise(multiplier=2000 / sensitivity * math.sqrt(2), survivors=2)
    config = config_of(encoding=encoding, exact_lanes=(), noise=noise)

    found = centred(encoded(config, np.full(20_000, 32_767.0)))

    wrapped = (found - 32_767 + 2**15) % 2**16 - 2**15
    assert (found < 0).mean() == pytest.approx(0.5, abs=0.02)
    assert wrapped.std() == pytest.approx(2000, rel=0.02)
    decode_sum(config, encoded(config, np.zeros(20_000)), count=1)  # no bound is checked


def test_noise_that_cannot_be_drawn_is_refused_before_a_vector_is_sent() -> None:
    encoding = encoding_of(lane_bits=32, length=10, steps_per_unit=1e9)
    config = config_of(encoding=encoding, exact_lanes=(), noise=Noise(multiplier=1, survivors=2))

    with pytest.raises(ConfigError, match="choose other steps_per_unit"):
        encoded(config, np.zeros(10))


def test_other_entropy_gives_other_noise_and_the_same_gives_the_same() -> None:
    config = sum_config(100, 32, noise=Noise(multiplier=1, survivors=8))
    lanes = [
        encode(config, np.zeros(100), {}, rng=np.random.default_rng(0), entropy=Entropy(name))
        for name in ("one", "one", "other")
    ]

    assert lanes[0].digest() == lanes[1].digest()
    assert lanes[0].digest() != lanes[2].digest()


def _within(rng: np.random.Generator, length: int, *, double: bool) -> NDArray[Any]:
    """A vector of norm below 1."""
    vector = rng.normal(size=length)
    vector *= rng.random() / np.linalg.norm(vector)
    return vector if double else vector.astype(np.float32)


def _shaped(
    shape: str, length: int, clip_steps: float, rng: np.random.Generator
) -> NDArray[np.float64]:
    """A vector of norm 1 or, rounded as badly as can be, of half steps."""
    vector = rng.normal(size=length)
    if shape == "spike":
        vector = np.zeros(length)
        vector[length // 2] = 1.0
    elif shape == "even":
        vector = np.ones(length)
    elif shape == "half steps":
        return np.full(length, 0.5 / clip_steps)
    return vector / np.linalg.norm(vector) * (100 if shape == "too long" else 1)


def _before_noise(config: SumConfig, vector: NDArray[Any], seed: int) -> NDArray[np.int64]:
    """The integers of a device, caught before its noise is added."""
    caught: list[NDArray[np.uint32]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            encoding_module, "add_share", lambda lanes, *_, **__: caught.append(lanes.copy())
        )
        encoded(config, vector, seed=seed)
    return caught[0].view(np.int32).astype(np.int64)


def _no_lanes() -> NDArray[np.uint64]:
    return np.zeros(0, np.uint64)
