"""One sequence while its tokens arrive: its text, its length, how it ends.

This decides what a client may see of a sequence: no half characters, no stop string, no text of
the token that ended it. It does not know how that is sent.
"""

from __future__ import annotations

from typing import Literal

from gateway.text.pieces import Detokenizer
from gateway.text.stops import StopStrings

Finish = Literal["stop", "length"]


class Continuation:
    """Takes tokens, gives text.

    `count` counts tokens, the one that ends the sequence included; `characters` those of the text,
    also of text that a stop string hides or may hide yet. `finish` is set once it has
    ended; `stopped` says that a stop string ended it, which the worker does not know. Stop
    strings are looked for from the `min_tokens`th token on.
    """

    __slots__ = (
        "_include_stop",
        "_min_tokens",
        "_search",
        "characters",
        "count",
        "detokenizer",
        "finish",
    )

    def __init__(
        self,
        detokenizer: Detokenizer,
        *,
        stops: StopStrings | None = None,
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self.detokenizer = detokenizer
        self._search = stops.search() if stops else None
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self.count = 0
        self.characters = 0
        self.finish: Finish | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self._search is not None and self._search.found

    def push(self, token: int, finish: Finish | None) -> str:
        """The text that can be shown now that `token` is there."""
        self.count += 1
        text = ""
        if finish != "stop" or self._include_stop:  # the token that says "stop" is not text
            text = self.detokenizer.push(token)
        if finish is not None:
            text += self.detokenizer.flush()
        self.characters += len(text)
        if self._search is not None and self.count >= self._min_tokens:
            text = self._search.push(text)
            if self._search.found:
                finish = "stop"
            elif finish is not None:
                text += self._search.flush()
        self.finish = finish
        return text
