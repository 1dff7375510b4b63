"""Which blocks hold what after each pass: the scheduler's half, on rank 0, without the library.

Called on the executor's thread only, but for `forget`; nothing blocks and nothing raises for what
a request is. A request is watched from its first blocks until the worker closes it: a cancelled one
may end without `request_finished`, so what the worker never closed is dropped after a while.
"""

from __future__ import annotations

import hashlib
import threading
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import msgspec

from backends.tensorrt_llm.messages import Finished, Message, Pass, Seated, Step, Voided, encode

FORGOTTEN_SECONDS = 3600.0
MOST_WATCHED = 65536
GLOBAL_ID = 1 << 40
"""Ids from here on are those that the client chose; the executor's own are below."""

TURN_ID = 1 << 61
"""Ids from here on are of requests that only have the executor make a turn: nothing is exported."""

TURN_TOKENS = [0, 0, 0]
"""Their prompt, by which they are known where the client chooses no ids."""


class Watched(msgspec.Struct):
    """One request: its prompt's length, its blocks so far, and up to where steps were told."""

    tokens: int
    since: float
    blocks: list[int] = []
    told: int = 0


def digest_of(tokens: list[int]) -> bytes:
    """Sixteen bytes that tell one prompt from another."""
    return hashlib.sha256(array("Q", tokens).tobytes()).digest()[:16]


class Schedule:
    """What rank 0 knows of all requests. With `by_id` those with small ids are none of ours."""

    def __init__(self, say: Callable[[Message], None], *, block_tokens: int, by_id: bool) -> None:
        self._say = say
        self._block_tokens = block_tokens
        self._least = GLOBAL_ID if by_id else 0
        self._watched: dict[int, Watched] = {}
        self._digests: dict[int, tuple[bytes, int]] = {}
        self._passes = 0
        self._lock = threading.Lock()

    def admit(self, request: Any, reused: int) -> None:
        """A request is about to get its blocks; `reused` tokens of it are there already."""
        number = request.request_id
        if number < self._least:
            return
        tokens = list(request.get_tokens(0))
        if number >= TURN_ID or (self._least == 0 and tokens == TURN_TOKENS):
            self._say(Seated(number, digest_of(tokens), 0, 0))
            return
        with self._lock:
            self._sweep()
            self._watched[number] = Watched(len(tokens), time.monotonic())
        self._digests[number] = digest_of(tokens), reused

    def allocated(self, number: int, blocks: int) -> None:
        """It has them."""
        known = self._digests.pop(number, None)
        if known is not None:
            self._say(Seated(number, known[0], blocks, known[1]))

    def next_pass(self, new: Iterable[Any] = (), known: Iterable[Any] = ()) -> bytes:
        """What all ranks must know of the pass that these requests take part in.

        A request that is `new` a second time was begun anew, in other blocks than before.
        """
        new, known = list(new), list(known)
        taken = [*_taken(new, self._block_tokens), *_taken(known, None)]
        with self._lock:
            for one in new:
                if (watched := self._watched.get(one.request_id)) is not None:
                    watched.blocks.clear()
        steps = [step for one in (*new, *known) if (step := self._step(one)) is not None]
        self._passes += 1
        return encode(Pass(self._passes, tuple(steps), tuple(taken)))

    def finished(self, number: int, blocks: int) -> bool:
        """A request is over. Whether its blocks must stay until all ranks release them.

        One without any was given up before, and nothing of it can stay.
        """
        with self._lock:
            watched = self._watched.pop(number, None)
        ours = number >= self._least
        pinned = ours and watched is not None and watched.told > 0 and blocks > 0
        if ours:
            self._say(Finished(number, blocks, pinned))
        return pinned

    def forget(self, number: int) -> None:
        """Nothing more of a request is wanted. From any thread."""
        with self._lock:
            self._watched.pop(number, None)

    def _step(self, data: Any) -> Step | None:
        with self._lock:
            watched = self._watched.get(data.request_id)
        if watched is None:
            return None
        watched.blocks += _new_blocks(data)
        end = min(watched.tokens, data.computed_position + data.num_scheduled_tokens)
        return self._cut(data.request_id, watched, end) if end > watched.told else None

    def _cut(self, number: int, watched: Watched, end: int) -> Step | None:
        """The step from where the last one ended: the first begins with what was reused."""
        size = self._block_tokens
        start, watched.told = watched.told, end
        blocks = watched.blocks[start // size : -(-end // size)]
        if len(blocks) * size < end - start // size * size or min(blocks) < 0:
            self.forget(number)
            self._say(Voided(number, f"the engine has no block for some of {start} to {end}"))
            return None
        return Step(number, start, end, tuple(blocks))

    def _sweep(self) -> None:
        """Drop what nobody has closed. The lock is held."""
        oldest = time.monotonic() - FORGOTTEN_SECONDS
        for number, watched in list(self._watched.items()):
            if watched.since > oldest and len(self._watched) < MOST_WATCHED:
                return
            del self._watched[number]
            self._say(Voided(number, "it was watched for too long"))


def _taken(data: Iterable[Any], block_tokens: int | None) -> Iterator[int]:
    """The blocks that requests got and did not share: a new one begins with those it reuses."""
    for one in data:
        reused = one.computed_position // block_tokens if block_tokens else 0
        yield from (block for block in _new_blocks(one)[reused:] if block >= 0)


def _new_blocks(data: Any) -> list[int]:
    """The blocks that a request got since it was last spoken of; they are never taken away."""
    groups = getattr(data, "new_block_ids_by_layer_group", None)
    if groups and not data.new_block_ids:
        return list(groups[0])
    return list(data.new_block_ids)
