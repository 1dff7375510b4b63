"""How Baton's processes log: events with fields, as JSON lines or coloured for people.

An event is `noun.past_verb`; ids are bound once with `structlog.contextvars`.
"""

from __future__ import annotations

import logging
import sys
from typing import Any, Literal

import msgspec
import structlog

Level = Literal["debug", "info", "warning", "error"]
Format = Literal["auto", "json", "console"]


def configure(level: Level = "info", style: Format = "auto") -> None:
    """Send structlog's events, and warnings of libraries, to standard error."""
    console = sys.stderr.isatty() if style == "auto" else style == "console"
    number = getattr(logging, level.upper())
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    rendering: list[structlog.typing.Processor] = (
        [structlog.dev.ConsoleRenderer()]
        if console
        else [structlog.processors.format_exc_info, _as_json]
    )
    structlog.configure(
        processors=shared + rendering,
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(
        level=max(number, logging.WARNING),
        stream=sys.stderr,
        format="%(levelname)s %(name)s: %(message)s",
        force=True,
    )


def _as_json(_: Any, __: str, event: structlog.typing.EventDict) -> str:
    name = event.pop("event")
    return msgspec.json.encode({"event": name, **event}, enc_hook=repr).decode()
