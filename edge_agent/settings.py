"""The daemon's settings, read once in cli.py from options and the environment."""

from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class AgentSettings(BaseSettings):
    """One life of the daemon. Variables are named ``SHOAL_AGENT_`` and the field, in capitals."""

    model_config = SettingsConfigDict(env_prefix="SHOAL_AGENT_", frozen=True, extra="forbid")

    home: Path = Field(description="State folder: keys, enrolment, data registry, models, logs")
    inference_host: str = Field(
        default="127.0.0.1", description="Address on which the device's own programs ask the model"
    )
    inference_port: int = Field(
        default=8480, ge=0, le=65535, description="Port of the inference server; 0 takes a free one"
    )
    model_slot_bytes: int = Field(
        default=2 * 1024**3,
        ge=1,
        description="Largest model file; two are kept, and several while one is chosen",
    )
    grpc_port: int | None = Field(
        default=None,
        ge=0,
        le=65535,
        description="Port on which the model is also served by gRPC; 0 takes a free one",
    )
    telemetry_interval_s: float = Field(
        default=60.0, ge=0.1, le=86400, description="Seconds between two telemetry messages"
    )
    log_level: str = Field(
        default="INFO",
        pattern="^(?i:debug|info|warning|error)$",
        description="Least severe log record that is printed: debug, info, warning or error",
    )
