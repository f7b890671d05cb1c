"""How both programs log: one event per line on standard error, times in UTC."""

import logging
import sys
import time

_LINE = "%(asctime)sZ %(levelname)-7s %(name)s: %(message)s"
_CHATTY = ("httpx", "httpcore", "mqtt", "asyncio")  # their INFO is not our story


def configure_logging(level: str) -> None:
    """Send all log records from ``level`` (a name such as ``INFO``) on to standard error."""
    formatter = logging.Formatter(_LINE, datefmt="%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
