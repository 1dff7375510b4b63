"""How far a client has got: what the `id:` lines of a stream say, and `Last-Event-ID` says back.

An id is `REQUEST/12.,7,-`: of each choice how many tokens are told up to this event, a dot where
its finish reason is, a dash where not even its beginning is. A `+` at the end: so is the usage.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from gateway.errors import BadRequest

LAST_HEADER = "Last-Event-ID"
EVENT_ID = re.compile(r"([0-9a-f]{32})/((?:-|\d{1,9}\.?)(?:,(?:-|\d{1,9}\.?))*)(\+?)")


class Told(NamedTuple):
    """What of one choice a client has."""

    tokens: int = 0
    begun: bool = False
    ended: bool = False

    def __str__(self) -> str:
        if not self.begun:
            return "-"
        return f"{self.tokens}." if self.ended else f"{self.tokens}"

    @classmethod
    def parse(cls, text: str) -> Told:
        """The reverse of `str`."""
        if text == "-":
            return cls()
        return cls(int(text.removesuffix(".")), begun=True, ended=text.endswith("."))


class Progress(NamedTuple):
    """What of a request a client has. No choices: nothing."""

    request: str
    choices: tuple[Told, ...] = ()
    usage: bool = False

    @classmethod
    def parse(cls, event_id: str) -> Progress:
        """From the header.

        Raises:
            BadRequest: it is no id of ours.
        """
        match = EVENT_ID.fullmatch(event_id)
        if match is None:
            message = f"`{LAST_HEADER}` must be the id of an event of a stream from here"
            raise BadRequest(message, field=LAST_HEADER)
        request, choices, usage = match.groups()
        return cls(request, tuple(map(Told.parse, choices.split(","))), bool(usage))

    def of(self, place: int) -> Told:
        """What of one choice is told."""
        return self.choices[place] if self.choices else Told()

    @property
    def tokens(self) -> tuple[int, ...]:
        """Tokens told of each choice."""
        return tuple(told.tokens for told in self.choices)


class Marked(Protocol):
    """A choice that knows how much of it is told."""

    @property
    def mark(self) -> Told:
        """Up to the event that is about to be sent."""


class Marks:
    """Writes the `id:` lines of one stream."""

    def __init__(self, request: str, choices: Sequence[Marked]) -> None:
        self._head = f"id: {request}/"
        self._choices = choices

    def line(self, end: str = "\n") -> bytes:
        """The line for the event that is about to be sent."""
        marks = ",".join([str(choice.mark) for choice in self._choices])
        return (self._head + marks + end).encode()
