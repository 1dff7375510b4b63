"""The book of requests: by their owner's connection and handle, and what is kept by its claim."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from backends.host.work import Held, Track, deadline_of
from backends.protocol import Link, RequestSpec


class Book:
    """All requests of one worker, those that nobody owns included."""

    def __init__(self) -> None:
        self._owned: dict[tuple[Link, int], Held] = {}
        self._claimed: dict[str, list[Held]] = {}
        self._orphans: dict[Held, float] = {}
        self._numbers = itertools.count(1)

    def __len__(self) -> int:
        return len(self._owned) + len(self._orphans)

    def __iter__(self) -> Iterator[Held]:
        return iter([*self._owned.values(), *self._orphans])

    @property
    def orphans(self) -> list[tuple[Held, float]]:
        """Requests that nobody owns, since when; the oldest first."""
        return list(self._orphans.items())

    def get(self, link: Link, handle: int) -> Held | None:
        """The request that its owner calls so."""
        return self._owned.get((link, handle))

    def of(self, link: Link) -> list[Held]:
        """All requests of one owner."""
        return [held for owner, held in self._owned.items() if owner[0] is link]

    def claimed(self, claim: str) -> list[Held]:
        """All that is kept under `claim`."""
        return list(self._claimed.get(claim, ()))

    def open(self, link: Link, spec: RequestSpec) -> Held:
        """Enter a request."""
        held = Held(
            link,
            spec.handle,
            f"{spec.request}#{next(self._numbers)}",
            deadline=deadline_of(spec),
        )
        if spec.claim and spec.keep_seconds > 0:
            held.claim, held.keep_seconds = spec.claim, spec.keep_seconds
            held.born = held.epoch = spec.epoch
            held.tracks = {
                one.index: Track(list(one.generated), list(one.logprobs)) for one in spec.sequences
            }
            self._claimed.setdefault(spec.claim, []).append(held)
        self._owned[link, spec.handle] = held
        return held

    def close(self, held: Held) -> None:
        """Strike a request out. Safe to call twice."""
        if held.link is not None and self._owned.get((held.link, held.handle)) is held:
            del self._owned[held.link, held.handle]
        self._orphans.pop(held, None)
        same = self._claimed.get(held.claim, [])
        if held in same:
            same.remove(held)
            if not same:
                del self._claimed[held.claim]

    def disown(self, held: Held, now: float) -> None:
        """Its owner is gone."""
        if held.link is not None:
            del self._owned[held.link, held.handle]
            held.link = None
            self._orphans[held] = now

    def give(self, held: Held, link: Link, handle: int, epoch: int) -> bool:
        """Make `link` its owner, under `handle`; False: that handle is in use."""
        if (link, handle) in self._owned:
            return False
        if held.link is not None:
            del self._owned[held.link, held.handle]
        self._orphans.pop(held, None)
        held.link, held.handle, held.epoch = link, handle, epoch
        self._owned[link, handle] = held
        return True
