"""What the owner of a device allows, key by key."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from edge_agent.privacy.policy import OwnerPolicy, fewest_survivors, read_policy
from shared.errors import ConfigError, PeerError, PolicyError
from shared.membership import Member
from shared.secure_sum.config import Encoding, Noise, SumConfig
from shared.signing import SigningKey
from tests.unit.edge_agent.sum_fleet import config_of

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)
KEY = SigningKey.generate().public


def strict_config(**changes: Any) -> SumConfig:
    """A noised sum that the default policy allows, and hardly more."""
    defaults: dict[str, Any] = {
        "exact_lanes": (),
        "encoding": Encoding(
            lane_bits=32, length=10, clip_norm=1.0, steps_per_unit=100.0, max_steps=100
        ),
        "noise": Noise(multiplier=1.0, survivors=16),
        "min_survivors": 18,
        "max_roster": 64,
        "at_least": 16,
    }
    return config_of(**{**defaults, **changes})


def refused(policy: OwnerPolicy, config: SumConfig) -> str:
    with pytest.raises(PolicyError) as caught:
        policy.check_config(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_default_policy_allows_a_noised_sum_of_sixteen_honest_survivors() -> None:
    OwnerPolicy().check_config(strict_config())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"min_survivors": 2, "at_least": 15}, "min_cohort = 18"),
        ({"at_least": 3, "min_survivors": 17}, "min_cohort = 18"),
        ({"at_least": 15}, "16 must be honest"),
        ({"corrupt_fraction": 0.09}, "corrupt_fraction = 0.1"),
        ({"noise": None}, "exact_sums = false"),
        ({"noise": Noise(multiplier=1.0, survivors=17)}, "shares of 17 devices"),
        (
            {
                "encoding": Encoding(
                    lane_bits=32, length=0, clip_norm=1.0, steps_per_unit=100.0, max_steps=100
                )
            },
            "promises nothing",
        ),
        ({"purpose": "statistics", "threshold": "group"}, "over no groups"),
        ({"purpose": "statistics", "noise": None, "groups": 2}, "over one group only"),
    ],
)
def test_each_downgrade_is_refused_with_what_the_owner_allows(
    changes: dict[str, Any], words: str
) -> None:
    assert words in refused(OwnerPolicy(), strict_config(**changes))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("min_cohort", 30, "min_cohort = 30 in policy.toml, and this sum may be of 18 devices"),
        ("corrupt_devices", 4, "corrupt_devices = 4"),
        ("corrupt_fraction", 0.2, "corrupt_fraction = 0.2"),
        ("max_corrupt", 6, "max_corrupt = 6 in policy.toml, and 7 of 64 devices"),
        ("min_noise_multiplier", 1.5, "min_noise_multiplier = 1.5"),
    ],
)
def test_each_stricter_key_refuses_what_the_default_allows(
    key: str, value: Any, words: str
) -> None:
    assert words in refused(OwnerPolicy(**{key: value}), strict_config())


def test_noised_statistics_may_be_of_shards() -> None:
    OwnerPolicy().check_config(strict_config(purpose="statistics", base_digest=None, groups=2))


def test_statistics_can_be_switched_off() -> None:
    config = strict_config(purpose="statistics", base_digest=None)
    OwnerPolicy().check_config(config)
    assert "statistics = false" in refused(OwnerPolicy(statistics=False), config)


def test_exact_sums_need_the_owners_word() -> None:
    OwnerPolicy(exact_sums=True).check_config(strict_config(noise=None))


def test_floors_hold_for_the_smallest_sum_that_a_configuration_admits() -> None:
    # 16 honest of 17 would need 18, so no roster of fewer than 18 can end, whatever min_survivors.
    assert fewest_survivors(strict_config(min_survivors=2)) == (18, 16)
    OwnerPolicy().check_config(strict_config(min_survivors=2))


def test_a_configuration_that_no_roster_can_satisfy_is_the_peers_mistake() -> None:
    with pytest.raises(PeerError, match="no roster of up to 16 devices"):
        OwnerPolicy().check_config(strict_config(max_roster=16, min_survivors=2, drop_fraction=0.0))


def test_five_devices_are_enough_where_the_owner_says_so() -> None:
    policy = OwnerPolicy(min_cohort=5, exact_sums=True)
    config = config_of(min_survivors=5, at_least=4, max_roster=5)
    policy.check_config(config)
    assert policy.min_honest == 4
    assert "may be of 4 devices" in refused(
        policy, config_of(min_survivors=4, at_least=3, max_roster=5)
    )


# --- the roster ----------------------------------------------------------------------------------


def member(name: str, *, days: float = 30, owner: str = "") -> Member:
    return Member(name, KEY, NOW - timedelta(days=days), owner)


def test_any_roster_of_members_is_accepted_by_default() -> None:
    OwnerPolicy().check_roster([member("edge-1", days=0), member("edge-2", days=0)], NOW)


def test_required_peers_must_be_there() -> None:
    policy = OwnerPolicy(required_peers=("edge-7",))
    policy.check_roster([member("edge-1"), member("edge-7")], NOW)
    with pytest.raises(PolicyError, match=r"required_peers has 'edge-7'.* the roster lacks"):
        policy.check_roster([member("edge-1"), member("edge-2")], NOW)
    with pytest.raises(PolicyError, match="the membership list lacks"):
        policy.check_members({"edge-1": member("edge-1")})


def test_new_peers_are_refused_but_the_device_itself_may_be_new() -> None:
    policy = OwnerPolicy(min_peers_known_for_days=7)
    policy.check_roster([member("me", days=1), member("edge-2", days=7)], NOW, own_id="me")
    with pytest.raises(PolicyError, match=r"= 7 in policy.toml, and 1 of the 3 devices"):
        policy.check_roster(
            [member("me", days=1), member("edge-2", days=6.9), member("edge-3")], NOW, own_id="me"
        )


def test_devices_must_belong_to_enough_owners_and_unnamed_ones_count_as_one() -> None:
    policy = OwnerPolicy(min_owners=2)
    policy.check_roster([member("a", owner="north"), member("b")], NOW)
    with pytest.raises(PolicyError, match=r"min_owners = 2.* the roster has devices of 1"):
        policy.check_roster([member("a"), member("b")], NOW)


def test_single_updates_leave_only_with_the_owners_word() -> None:
    OwnerPolicy(individual_updates=True).check_plain_update()
    with pytest.raises(PolicyError, match="individual_updates = false"):
        OwnerPolicy().check_plain_update()


# --- the file ------------------------------------------------------------------------------------


def written(home: Path, text: str) -> OwnerPolicy:
    (home / "policy.toml").write_text(text)
    return read_policy(home)


def test_without_a_file_the_strict_defaults_hold(tmp_path: Path) -> None:
    assert read_policy(tmp_path) == OwnerPolicy()


def test_what_is_not_written_keeps_its_default(tmp_path: Path) -> None:
    assert written(tmp_path, "min_cohort = 5") == OwnerPolicy(min_cohort=5)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("min_cohrt = 5", "did you mean 'min_cohort'?"),
        ("min_cohort = 1", "min_cohort: "),
        ("epsilon = nan", "epsilon: "),
        ("epsilon = inf", "epsilon: "),
        ("delta = 0.0", "delta: "),
        ("exact_sums = 1", "exact_sums: "),
        ("corrupt_devices = 18", "leaves nobody honest"),
        ("max_corrupt = 1", "max_corrupt = 1 is below the 2"),
        ("min_cohort =", "not valid TOML"),
    ],
)
def test_a_mistake_in_the_file_is_named(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        written(tmp_path, text)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
