"""Settings of `shoal serve`: command line before environment (SHOAL_…) before file before default.

The ports that were really used are written down (`Service`), so that a coordinator that chose free
ones (0) comes back at the same addresses, and so that the operator's commands find it.
"""

import difflib
import os
import tomllib
from pathlib import Path
from typing import Any, Literal

import msgspec
from pydantic import Field, ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from cloud_coordinator.broker import BrokerPlan, plan_broker
from cloud_coordinator.keys import FleetKeyPlace
from shared.errors import ConfigError
from shared.files import write_atomic
from shared.listening import free_port, require_loopback

SERVICE_FILE = "service.json"


class Settings(BaseSettings):
    """Everything that a coordinator process may be told."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", env_prefix="SHOAL_")

    home: Path = Field(
        default=Path(".shoal"), description="Folder for keys, database, blobs and logs."
    )
    host: str = Field(
        default="127.0.0.1", description="Address of every listener; loopback until certificates."
    )
    port: int = Field(default=8470, ge=0, le=65535, description="Port of the REST API; 0: any.")
    mqtt_port: int = Field(
        default=8471, ge=0, le=65535, description="Port of a broker of ours; 0: any."
    )
    fleet_port: int = Field(
        default=8472, ge=0, le=65535, description="Port of the SuperLink's Fleet API; 0: any."
    )
    broker: str = Field(
        default="embedded",
        description="embedded, mosquitto or mqtt://host:port (mqtts:// for TLS).",
    )
    broker_ca: Path | None = Field(
        default=None,
        description="PEM file of the CA of a broker at mqtts://; without it, a CA that the system "
        "knows.",
    )
    database: str = Field(
        default="", description="Database URL; empty: the SQLite file shoal.db in the home."
    )
    fleet: str = Field(
        default="main",
        pattern=r"^[a-z0-9][a-z0-9-]{0,62}$",
        description="Name of the fleet; part of every MQTT topic.",
    )
    fleet_key: FleetKeyPlace = Field(
        default="beside",
        description="Where the key is that signs the membership list: beside (fleet-key.pem in the "
        "home) or offline (only fleet-key.pub is there, and a person signs).",
    )
    answer_deadline_s: float = Field(
        default=30.0, gt=0, le=3600, description="Seconds a device has to answer an invitation."
    )
    join_deadline_s: float = Field(
        default=180.0, gt=0, le=3600, description="Seconds from yes to a joined trainer."
    )
    lease_s: float = Field(
        default=900.0, ge=1, le=86400, description="Seconds a trainer lives without a word."
    )
    worker_crashes: int = Field(
        default=5, ge=1, le=100, description="Crashes in a row, without a commit, that end a run."
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        default="INFO", description="Least level that is logged."
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Let the command line win over the environment, and that over the file."""
        del dotenv_settings, file_secret_settings
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)

    @property
    def api_url(self) -> str:
        """Where the REST API is reached."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    @property
    def database_url(self) -> str:
        """The database in use."""
        return self.database or f"sqlite:///{self.home / 'shoal.db'}"

    @property
    def broker_plan(self) -> BrokerPlan:
        """Which broker, and where; raises ConfigError where the settings make no sense."""
        return plan_broker(self.broker, host=self.host, port=self.mqtt_port, ca=self.broker_ca)


class Service(msgspec.Struct, frozen=True, kw_only=True):
    """Where a coordinator is, in ``service.json`` of its home."""

    pid: int
    api_url: str
    port: int
    mqtt_port: int
    fleet_port: int


def load_settings(file: Path | None = None, **given: Any) -> Settings:
    """Put settings together and check them.

    Args:
        file: a TOML file with the fields of `Settings`; None: no file.
        given: fields from the command line; None means not given.

    Raises:
        ConfigError: an unknown key, a wrong type or an address that is not loopback; says which.
    """
    if file is not None and not file.is_file():
        raise ConfigError(f"there is no settings file {file}; check the path")
    try:
        settings = _build(file, given)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid TOML: {error}; mend that line") from error
    except ValidationError as error:
        raise ConfigError(_explain(error.errors()[0], file)) from error
    require_loopback(settings.host, purpose="the coordinator")
    _ = settings.broker_plan  # refuses what cannot be used
    return settings.model_copy(update={"home": settings.home.absolute()})


def choose_ports(settings: Settings) -> Settings:
    """Replace each port 0 by the one used last time, or by a free one."""
    last = read_service(settings.home)
    chosen: dict[str, int] = {}
    for name in ("port", "mqtt_port", "fleet_port"):
        if getattr(settings, name) == 0:
            chosen[name] = getattr(last, name) if last else _another_port(settings.host, chosen)
    return settings.model_copy(update=chosen)


def read_service(home: Path) -> Service | None:
    """Return what the last coordinator of ``home`` wrote down; None: none ever did."""
    try:
        return msgspec.json.decode((home / SERVICE_FILE).read_bytes(), type=Service)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as error:
        raise ConfigError(f"{home / SERVICE_FILE} is damaged ({error}); delete it") from error


def write_service(settings: Settings) -> None:
    """Write down where this process serves."""
    service = Service(
        pid=os.getpid(),
        api_url=settings.api_url,
        port=settings.port,
        mqtt_port=settings.mqtt_port,
        fleet_port=settings.fleet_port,
    )
    write_atomic(settings.home / SERVICE_FILE, msgspec.json.encode(service))


def _build(file: Path | None, given: dict[str, Any]) -> Settings:
    class WithFile(Settings):
        model_config = SettingsConfigDict(toml_file=file)

    return WithFile(**{key: value for key, value in given.items() if value is not None})


def _another_port(host: str, chosen: dict[str, int]) -> int:
    """Return a free port that is not yet promised to another of our listeners."""
    while (port := free_port(host)) in chosen.values():
        pass
    return port


def _explain(error: ErrorDetails, file: Path | None) -> str:
    """Say pydantic's first complaint in one sentence."""
    key = str(error["loc"][0]) if error["loc"] else "settings"
    where = f"{file}, the environment or the command line" if file else "the settings"
    if error["type"] == "extra_forbidden":
        guess = difflib.get_close_matches(key, Settings.model_fields, n=1)
        known = ", ".join(Settings.model_fields)
        advice = f"did you mean {guess[0]!r}?" if guess else f"known here: {known}"
        return f"unknown key {key!r} in {where}; {advice}"
    message = error["msg"]
    return f"{key} in {where}: {message[:1].lower()}{message[1:]}; change it and try again"
