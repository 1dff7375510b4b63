"""Stop strings, found across token borders without ever showing what follows them.

An automaton per stop string knows how much of it the text so far ends with; that much is held
back, and not a character more. The result does not depend on how the text is cut into pieces:
the string that is complete first wins, of several complete at once the longest.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """What one request asked for, prepared once; `search` follows one of its sequences."""

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self.include = include
        self.words = [(stop, _fallbacks(stop)) for stop in stops]
        self.beginnings = frozenset(stop[0] for stop in stops)

    def search(self) -> StopSearch:
        """For one sequence."""
        return StopSearch(self)


def _fallbacks(word: str) -> list[int]:
    """For each place, how long a beginning of `word` ends there (Knuth, Morris and Pratt)."""
    fallbacks = [0] * len(word)
    length = 0
    for place in range(1, len(word)):
        while length and word[place] != word[length]:
            length = fallbacks[length - 1]
        length += word[place] == word[length]
        fallbacks[place] = length
    return fallbacks


class StopSearch:
    """Watches one sequence's text. Once `found`, it is not used any more."""

    __slots__ = ("_held", "_matched", "_stops", "found")

    def __init__(self, stops: StopStrings) -> None:
        self._stops = stops
        self._matched = [0] * len(stops.words)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """What can be shown now; the last there is, if a stop string was `found` in it."""
        if not self._held and self._stops.beginnings.isdisjoint(text):
            return text
        for place, character in enumerate(text):
            complete = self._step(character)
            if complete:
                self.found = True
                seen = self._held + text[: place + 1]
                self._held = ""
                return seen if self._stops.include else seen[:-complete]
        seen = self._held + text
        shown = len(seen) - max(self._matched)
        self._held = seen[shown:]
        return seen[:shown]

    def flush(self) -> str:
        """What is held back, when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _step(self, character: str) -> int:
        """The length of the longest stop string that `character` completes, or 0."""
        complete = 0
        for number, (word, fallbacks) in enumerate(self._stops.words):
            matched = self._matched[number]
            while matched and word[matched] != character:
                matched = fallbacks[matched - 1]
            if word[matched] == character:
                matched += 1
            self._matched[number] = matched
            if matched == len(word):
                complete = max(complete, matched)
        return complete
