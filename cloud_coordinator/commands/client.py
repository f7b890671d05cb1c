"""The operator's client: finds the coordinator of a home and speaks to its REST API."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from cloud_coordinator.keys import ADMIN_TOKEN_FILE
from cloud_coordinator.settings import read_service
from shared.errors import ConfigError, ShoalError, UnavailableError

_TIMEOUT_S = 30.0

Home = Annotated[
    Path, typer.Option(help="The coordinator's home: its address and admin token lie there.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
DEFAULT_HOME = Path(".shoal")


class ApiClient:
    """Speaks to the coordinator that serves ``home``."""

    def __init__(self, home: Path) -> None:
        """Read address and token.

        Raises:
            ConfigError: no coordinator was ever started there, or the token cannot be read.
        """
        service = read_service(home)
        if service is None:
            raise ConfigError(
                f"no coordinator was started in {home}; give its folder with --home, or start one "
                f"with 'shoal serve --home {home}'"
            )
        self._home = home
        self._url = service.api_url
        self._headers = {"Authorization": f"Bearer {_token(home)}"}

    def get(self, path: str, **query: str | None) -> Any:
        """GET a resource and return its JSON; what is None in the query is left out."""
        given = {name: value for name, value in query.items() if value is not None}
        return self._request("GET", path, query=given).json()

    def get_text(self, path: str) -> str:
        """GET a resource that is text."""
        return self._request("GET", path).text

    def post(self, path: str, body: Any = None) -> Any:
        """POST ``body`` as JSON and return the answer's."""
        return self._request("POST", path, body).json()

    def _request(
        self, method: str, path: str, body: Any = None, *, query: Mapping[str, str] | None = None
    ) -> httpx.Response:
        try:
            answer = httpx.request(
                method,
                self._url + path,
                json=body,
                params=query,
                headers=self._headers,
                timeout=_TIMEOUT_S,
                trust_env=False,  # a proxy cannot reach this machine's loopback
            )
        except httpx.TransportError as error:
            raise UnavailableError(
                f"no coordinator answers at {self._url} ({error}); "
                f"start it with 'shoal serve --home {self._home}'"
            ) from error
        if answer.is_error:
            raise ShoalError(_sentence(answer))
        return answer


def _token(home: Path) -> str:
    path = home / ADMIN_TOKEN_FILE
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError(
            f"cannot read the admin token {path}: {error.strerror}; run this as the user who runs "
            "the coordinator"
        ) from error


def _sentence(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"])
    except (ValueError, KeyError, TypeError):
        return f"the coordinator answered {answer.status_code}; see its log"
