"""Requests that outlive their gateway: nobody's for a while, then another one's, or given up.

What a request keeps goes on being computed when its owner is gone, pauses after a while, and is
given up when its time is over. Who adopts it must show a higher epoch than any that was seen; its
former owner, should it still be there, is told that it is that no more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator

import structlog

from backends.host.book import Book
from backends.host.config import HostConfig
from backends.host.work import Held, given_up
from backends.protocol import (
    FENCED,
    Adopt,
    Adopted,
    Failed,
    Link,
    Part,
    RequestSpec,
    Stage,
    Token,
    Tokens,
)

log = structlog.get_logger()

ROWS_IN_A_FRAME = 512


class Keeper:
    """Judges who owns what is kept.

    `stop` ends the decoding of some sequences; `end` gives back all that a request holds but its
    tokens.
    """

    def __init__(
        self,
        config: HostConfig,
        book: Book,
        stop: Callable[[Held, Iterable[int]], None],
        end: Callable[[Held], None],
        resume: Callable[[], None],
    ) -> None:
        self._config = config
        self._book = book
        self._stop = stop
        self._end = end
        self._resume = resume

    def disown(self, held: Held) -> None:
        """Its owner is gone: keep it for another one, or end it if it is not to be kept."""
        if not held.claim:
            self.give_up(held)
            return
        self._book.disown(held, _now())
        log.info("request.disowned", request=held.name, tokens=held.tokens)
        self._bound()

    def give_up(self, held: Held) -> None:
        """End a request, and keep nothing of it."""
        self._end(held)
        self._book.close(held)

    def fenced(self, link: Link, spec: RequestSpec) -> bool:
        """Whether `spec` is of a former owner, who is told so.

        What an earlier attempt of the same owner keeps of these sequences is given up otherwise.
        """
        if not spec.claim:
            return False
        before = self._book.claimed(spec.claim)
        if any(held.epoch > spec.epoch for held in before):
            link.send(_fence(spec.handle))
            return True
        again = [one.index for one in spec.sequences]
        for held in before:
            self._stop(held, again)
            for index in again:
                held.tracks.pop(index, None)
            if not held.tracks:
                self.give_up(held)
        return False

    def adopt(self, link: Link, message: Adopt) -> None:
        """Give all that is kept under a claim to a new owner, and tell it all there is so far."""
        found = self._book.claimed(message.claim)
        seen = max((held.epoch for held in found), default=0)
        if seen >= message.epoch:
            link.send(Adopted(handle=message.handle, epoch=seen))
            return
        moved = [held for held in found if self._move(held, link, message)]
        parts = tuple(
            Part(held.handle, held.born, _stage(held), tuple(sorted(held.tracks))) for held in moved
        )
        link.send(Adopted(handle=message.handle, parts=parts))
        for held in moved:
            self.tell(held)

    def tell(self, held: Held) -> None:
        """Tell its owner all tokens so far, and what became of it since."""
        for rows in _frames(held):
            held.tell(Tokens(step=0, rows=rows))
        lost = tuple(index for index, track in held.tracks.items() if track.lost)
        if held.failure is not None:
            held.tell(_again(held.failure, held.handle))
        elif lost:
            held.tell(given_up(held.handle, lost, "preempted", "while nobody owned it"))

    def sweep(self) -> None:
        """Pause, and give up, what nobody has owned for too long."""
        now = _now()
        for held, since in self._book.orphans:
            if now > min(since + held.keep_seconds, held.deadline):
                log.info("request.abandoned", request=held.name, tokens=held.tokens)
                self.give_up(held)
            elif now > since + self._config.orphan_run_seconds:
                for running in held.running.values():
                    running.paused = True
        self._bound()

    def reclaim(self) -> None:
        """Take from the pool what nobody has owned for longest; its tokens stay."""
        for held, _ in self._book.orphans:
            if held.running:
                for index in held.running:
                    held.tracks[index].lost = True
                self._end(held)
                return

    def _bound(self) -> None:
        """Give up the oldest when too much is kept for nobody."""
        orphans = self._book.orphans
        tokens = sum(held.tokens for held, _ in orphans)
        count = len(orphans)
        for held, _ in orphans:
            if count <= self._config.max_orphans and tokens <= self._config.max_orphan_tokens:
                return
            log.warning("request.abandoned", request=held.name, tokens=held.tokens, full=True)
            count -= 1
            tokens -= held.tokens
            self.give_up(held)

    def _move(self, held: Held, link: Link, message: Adopt) -> bool:
        former, handle = held.link, held.handle
        if not self._book.give(held, link, message.handle + min(held.tracks), message.epoch):
            return False
        if former is not None:
            former.send(_fence(handle))
        for running in held.running.values():
            running.paused = False
        self._resume()
        log.info("request.adopted", request=held.name, tokens=held.tokens, fenced=bool(former))
        return True


def _stage(held: Held) -> Stage:
    if held.prefilling is not None:
        return "prefilling"
    return "landing" if held.landing is not None else "decoding"


def _frames(held: Held) -> Iterator[tuple[Token, ...]]:
    for index, track in held.tracks.items():
        rows = track.rows(held.handle, index)
        for first in range(0, len(rows), ROWS_IN_A_FRAME):
            yield tuple(rows[first : first + ROWS_IN_A_FRAME])


def _fence(handle: int) -> Failed:
    return Failed(
        handle=handle,
        phase="decode",
        code=FENCED,
        detail="another gateway has taken the request over",
        retry=False,
    )


def _again(failure: Failed, handle: int) -> Failed:
    return Failed(
        handle=handle,
        phase=failure.phase,
        code=failure.code,
        detail=failure.detail,
        retry=failure.retry,
    )


def _now() -> float:
    return asyncio.get_running_loop().time()
