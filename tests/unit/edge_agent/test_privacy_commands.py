"""``shoal-agent policy`` and ``shoal-agent privacy``, as the owner types them."""

import json
import stat
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edge_agent.cli import app
from edge_agent.privacy.policy import OwnerPolicy, read_policy
from edge_agent.privacy.policy_commands import WORDS
from shared.errors import ConfigError, NotFoundError, ShoalError
from tests.unit.edge_agent.sum_fleet import Fleet, Session, config_of, data_of, noised_config_of

NAMES = ("edge-1", "edge-2", "edge-3")


def shoal_agent(home: Path, *arguments: str) -> str:
    """Run the command, and return what it printed; raises what it raised."""
    result = CliRunner().invoke(
        app, [*arguments, "--home", str(home)], catch_exceptions=False, env={"COLUMNS": "200"}
    )
    assert result.exit_code == 0, result.output
    return result.output


def refusal(kind: type[ShoalError], home: Path, *arguments: str) -> str:
    with pytest.raises(kind) as caught:
        shoal_agent(home, *arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- policy --------------------------------------------------------------------------------------


def test_init_writes_a_file_that_says_what_holds_anyway(tmp_path: Path) -> None:
    home = tmp_path / "home"
    assert "policy show" in shoal_agent(home, "policy", "init")
    assert read_policy(home) == OwnerPolicy()
    text = (home / "policy.toml").read_text()
    for key, meaning in WORDS.items():
        assert f"# {meaning}\n" in text
        assert f"{key} = " in text
    assert stat.S_IMODE((home / "policy.toml").stat().st_mode) == 0o600


def test_every_key_of_the_policy_has_words() -> None:
    assert list(WORDS) == list(OwnerPolicy.__struct_fields__)


def test_init_never_overwrites(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text("min_cohort = 5")
    assert "exists already" in refusal(ConfigError, tmp_path, "policy", "init")
    assert read_policy(tmp_path) == OwnerPolicy(min_cohort=5)


def test_show_tells_what_holds_and_where_it_comes_from(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text('min_cohort = 5\nrequired_peers = ["edge-7"]')
    lines = {line.split()[0]: line for line in shoal_agent(tmp_path, "policy", "show").splitlines()}
    assert "5" in lines["min_cohort"]
    assert "policy.toml" in lines["min_cohort"]
    assert '["edge-7"]' in lines["required_peers"]
    assert "default" in lines["exact_sums"]
    assert "1e-06" in lines["delta"]


def test_show_as_json_names_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text("min_cohort = 5")
    shown = json.loads(shoal_agent(tmp_path, "policy", "show", "--json"))
    assert shown["values"]["min_cohort"] == 5
    assert shown["values"]["max_corrupt"] is None
    assert set(shown["defaults"]) == set(shown["values"]) - {"min_cohort"}


def test_check_says_what_the_policy_comes_down_to(tmp_path: Path) -> None:
    strict = shoal_agent(tmp_path, "policy", "check")
    assert "the strict defaults hold: sums of at least 18 devices, 16 of them honest" in strict
    assert "with noise only, up to ε = 8 at δ = 1e-06" in strict
    (tmp_path / "policy.toml").write_text(
        "min_cohort = 5\nexact_sums = true\nindividual_updates = true"
    )
    loose = shoal_agent(tmp_path, "policy", "check")
    assert "is fine: sums of at least 5 devices, 4 of them honest, exact ones allowed" in loose
    assert "by themselves" in loose


def test_check_names_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text("exact_sum = true")
    assert "did you mean 'exact_sums'?" in refusal(ConfigError, tmp_path, "policy", "check")


# --- privacy -------------------------------------------------------------------------------------


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path, *NAMES)


def take_part(fleet: Fleet, *configs: object, plain: bool = False) -> Path:
    """Let the fleet make these sums; returns the home of one of its devices."""
    devices = {name: fleet.sums(name) for name in NAMES}
    for config in configs:
        Session(fleet, config, devices).run()  # type: ignore[arg-type]
    first = devices["edge-1"]
    if plain:
        (fleet.homes["edge-1"] / "policy.toml").write_text("individual_updates = true")
        first.allow_plain_update("run-9", 4, data_of(first))
    for device in devices.values():
        device.close()
    return fleet.homes["edge-1"]


def test_without_a_ledger_nothing_was_given_away(tmp_path: Path) -> None:
    assert "no data of this device took part" in shoal_agent(tmp_path, "privacy", "show")
    assert json.loads(shoal_agent(tmp_path, "privacy", "show", "--json")) == []
    assert not (tmp_path / "privacy.db").exists()
    assert "no ledger yet" in refusal(NotFoundError, tmp_path, "privacy", "reset", "pumps")


def test_exact_sums_are_told_in_plain_words(fleet: Fleet) -> None:
    rounds = [config_of(round_number=n, base_digest=f"{n}" * 64) for n in (1, 2, 3)]
    shown = shoal_agent(take_part(fleet, *rounds), "privacy", "show")
    assert "pumps, training rows (/data/pumps.csv)" in shown
    assert "3 exact sums for training in run run-1, rounds 1 to 3, last on 2026-11-23" in shown
    assert "contributed exactly 3 times: no ε claim holds for these data" in shown
    assert "pumps, held-out rows (/data/pumps.csv)\n  gave nothing away" in shown


def test_noised_sums_tell_what_they_spent_of_the_budget(fleet: Fleet) -> None:
    home = take_part(fleet, noised_config_of(), noised_config_of(run_id="run-2"))
    shown = shoal_agent(home, "privacy", "show")
    assert "1 sum with noise for training in run run-2, round 1" in shown
    assert "of 8 at δ = 1e-06" in shown
    assert "no ε claim" not in shown
    (train, held_out) = json.loads(shoal_agent(home, "privacy", "show", "--json"))
    assert train["epsilon"] == train["noised_epsilon"] > 0
    assert train["noised"] == 2
    assert held_out["epsilon"] == 0


def test_one_exact_sum_ends_the_claim_of_all_noised_ones(fleet: Fleet) -> None:
    home = take_part(fleet, noised_config_of(), config_of(run_id="run-2"))
    (train, _) = json.loads(shoal_agent(home, "privacy", "show", "--json"))
    assert train["epsilon"] is None
    assert train["noised_epsilon"] > 0
    assert "contributed exactly once: no ε claim" in shoal_agent(home, "privacy", "show")


def test_an_update_by_itself_is_told_too(fleet: Fleet) -> None:
    shown = shoal_agent(take_part(fleet, plain=True), "privacy", "show")
    assert "1 contribution in no sum for training in run run-9, round 4" in shown
    assert "no ε claim" in shown


def test_only_the_owner_begins_an_account_anew_and_only_on_purpose(fleet: Fleet) -> None:
    home = take_part(fleet, config_of())
    assert "add --yes" in refusal(ConfigError, home, "privacy", "reset", "pumps")
    assert "exactly once" in shoal_agent(home, "privacy", "show")
    assert "count no more: 1" in shoal_agent(home, "privacy", "reset", "pumps", "--yes")
    shown = shoal_agent(home, "privacy", "show")
    assert "exactly" not in shown
    assert "counted since you began anew" in shown
    assert "no data 'lamps'" in refusal(NotFoundError, home, "privacy", "reset", "lamps", "--yes")
