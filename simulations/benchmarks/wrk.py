"""Load by wrk, the generator that Debian packages: one process, a few microseconds per request."""

import asyncio
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from shared.errors import UnavailableError

_UNITS = {"us": 1e-3, "ms": 1.0, "s": 1e3, "m": 60e3}


@dataclass(frozen=True, slots=True)
class Load:
    """What one run of wrk saw."""

    requests: int
    failed: int  # answers other than 2xx and 3xx, and broken connections
    p50_ms: float


def require_wrk() -> None:
    """Raise UnavailableError where wrk is not installed."""
    if shutil.which("wrk") is None:
        raise UnavailableError("this benchmark needs wrk; install it with 'apt-get install wrk'")


async def post(
    url: str, body: bytes, headers: Mapping[str, str], *, folder: Path, clients: int, seconds: float
) -> Load:
    """Post ``body`` again and again over ``clients`` connections.

    Raises:
        UnavailableError: wrk failed.
    """
    content, script = folder / "body", folder / "post.lua"
    content.write_bytes(body)
    lines = [f'wrk.headers["{name}"] = "{value}"' for name, value in headers.items()]
    lines += ['wrk.method = "POST"', f'wrk.body = io.open("{content}", "rb"):read("*a")']
    script.write_text("\n".join(lines), encoding="ascii")
    process = await asyncio.create_subprocess_exec(
        *("wrk", "-t1", f"-c{clients}", f"-d{seconds:g}s", "--latency", "-s", str(script), url),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said = (await process.communicate())[0].decode()
    if process.returncode:
        raise UnavailableError(f"wrk failed: {said.strip()}")
    return read_report(said)


def read_report(said: str) -> Load:
    """Read what wrk printed; raise UnavailableError where it is not understood."""
    requests = re.search(r"(\d+) requests in", said)
    median = re.search(r"50%\s+([\d.]+)(us|ms|s|m)\b", said)
    if requests is None or median is None:
        raise UnavailableError(f"wrk said nothing that is understood: {said.strip()}")
    refused = re.search(r"Non-2xx or 3xx responses: (\d+)", said)
    broken = re.search(
        r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", said
    )
    failed = sum(int(number) for match in (refused, broken) if match for number in match.groups())
    p50_ms = float(median[1]) * _UNITS[median[2]]
    return Load(int(requests[1]), failed, p50_ms)
