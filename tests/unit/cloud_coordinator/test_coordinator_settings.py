"""Settings: who wins, and what a wrong one is told."""

import stat
from pathlib import Path

import pytest

from cloud_coordinator.keys import load_keys
from cloud_coordinator.settings import (
    Service,
    choose_ports,
    load_settings,
    read_service,
    write_service,
)
from shared.errors import ConfigError


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SHOAL_PORT", "SHOAL_HOME", "SHOAL_BROKER"):
        monkeypatch.delenv(name, raising=False)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_the_command_line_beats_the_environment_and_that_beats_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "s.toml", "port = 1\nmqtt_port = 2\nfleet_port = 3\n")
    monkeypatch.setenv("SHOAL_PORT", "10")
    monkeypatch.setenv("SHOAL_MQTT_PORT", "20")
    settings = load_settings(file, port=100, mqtt_port=None)
    assert (settings.port, settings.mqtt_port, settings.fleet_port) == (100, 20, 3)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("prot = 1", "unknown key 'prot' .* did you mean 'port'"),
        ("zzz = 1", "unknown key 'zzz' .* known here: home, host"),
        ('port = "many"', "^port in .*valid integer.*change it"),
        ("port = 70000", "^port in .*less than or equal to 65535"),
        ("port = ", "is not valid TOML"),
        ('fleet = "North Sea"', "^fleet in "),
        ('broker = "rabbit"', "broker 'rabbit' is not known; write embedded, mosquitto"),
        ('host = "0.0.0.0"', "cannot listen on '0.0.0.0': devices have no certificates yet"),
    ],
)
def test_a_wrong_setting_is_one_sentence_that_says_what_to_do(
    tmp_path: Path, text: str, sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        load_settings(write(tmp_path / "s.toml", text))
    assert "\n" not in str(caught.value)


def test_a_missing_settings_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no settings file"):
        load_settings(tmp_path / "nothing.toml")


def test_every_setting_is_described() -> None:
    fields = type(load_settings()).model_fields
    assert all(field.description for field in fields.values())


def test_chosen_ports_are_free_ones_and_stay_over_restarts(tmp_path: Path) -> None:
    settings = load_settings(home=tmp_path, port=0, mqtt_port=0, fleet_port=0)
    first = choose_ports(settings)
    ports = {first.port, first.mqtt_port, first.fleet_port}
    assert len(ports) == 3
    assert 0 not in ports
    write_service(first)
    assert choose_ports(settings) == first


def test_a_damaged_service_file_is_refused_in_a_sentence(tmp_path: Path) -> None:
    write(tmp_path / "service.json", "{")
    with pytest.raises(ConfigError, match=r"damaged .* delete it"):
        read_service(tmp_path)
    assert read_service(tmp_path / "elsewhere") is None


def test_the_service_file_says_where_the_api_is(tmp_path: Path) -> None:
    write_service(load_settings(home=tmp_path, port=1234))
    service = read_service(tmp_path)
    assert isinstance(service, Service)
    assert service.api_url == "http://127.0.0.1:1234"


def test_keys_are_made_once_and_only_their_owner_may_read_them(tmp_path: Path) -> None:
    first, second = load_keys(tmp_path), load_keys(tmp_path)
    assert first.command.public.key_id == second.command.public.key_id
    assert first.model.public.key_id == second.model.public.key_id
    assert first.admin_token == second.admin_token
    assert first.fleet.public.key_id == second.fleet.public.key_id
    assert len({key.public.key_id for key in (first.command, first.model, first.fleet)}) == 3
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == [
        "admin-token",
        "command-key.pem",
        "fleet-key.pem",
        "fleet-key.pub",
        "model-key.pem",
    ]
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600}


def test_a_damaged_key_file_is_refused_in_a_sentence(tmp_path: Path) -> None:
    write(tmp_path / "command-key.pem", "not a key")
    with pytest.raises(ConfigError, match="put the backup copy back"):
        load_keys(tmp_path)


def test_a_fleet_key_that_was_moved_away_is_not_replaced(tmp_path: Path) -> None:
    load_keys(tmp_path)
    (tmp_path / "fleet-key.pem").unlink()
    with pytest.raises(ConfigError, match=r"fleet-key.pem is missing.*set fleet_key = 'offline'"):
        load_keys(tmp_path)


def test_with_the_fleet_key_offline_only_its_public_half_is_needed(tmp_path: Path) -> None:
    beside = load_keys(tmp_path).fleet
    (tmp_path / "fleet-key.pem").unlink()
    offline = load_keys(tmp_path, fleet_key="offline").fleet
    assert (beside.place, offline.place) == ("beside", "offline")
    assert offline.public.key_id == beside.public.key_id
    assert offline.private is None


def test_an_offline_fleet_key_that_is_still_here_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load_keys(tmp_path)
    assert load_keys(tmp_path, fleet_key="offline").fleet.private is None
    assert "is still there: move it to another machine" in caplog.text


def test_an_offline_fleet_key_without_its_public_half_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"fleet-key\.pub is missing; make a key"):
        load_keys(tmp_path, fleet_key="offline")


def test_two_halves_of_different_fleet_keys_are_refused(tmp_path: Path) -> None:
    load_keys(tmp_path / "a")
    load_keys(tmp_path / "b")
    (tmp_path / "a" / "fleet-key.pub").replace(tmp_path / "b" / "fleet-key.pub")
    with pytest.raises(ConfigError, match="two different keys"):
        load_keys(tmp_path / "b")


@pytest.mark.parametrize("content", ["", "not a key", "AAAA"])
def test_a_damaged_public_fleet_key_is_refused_in_a_sentence(tmp_path: Path, content: str) -> None:
    write(tmp_path / "fleet-key.pub", content)
    with pytest.raises(ConfigError, match="put the backup copy back"):
        load_keys(tmp_path, fleet_key="offline")
