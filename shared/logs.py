"""How both programs log: one event per line on standard error, times in UTC."""

import logging
import sys
import time

_LINE = "%(asctime)sZ %(levelname)-7s %(name)s: %(message)s"
_CHATTY = ("httpx", "httpcore", "mqtt", "asyncio")  # their INFO is not our story


class _OneLine(logging.Formatter):
    """Shows what is no letter by its number: strangers' words reach logs, and logs terminals."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's name
        """Return the line of one event; a traceback follows it as it is."""
        return visible(super().formatMessage(record))


def visible(text: str) -> str:
    """Replace whatever could steer a terminal, line breaks included, by its Python escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def configure_logging(level: str) -> None:
    """Send all log records from ``level`` (a name such as ``INFO``) on to standard error."""
    formatter = _OneLine(_LINE, datefmt="%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
