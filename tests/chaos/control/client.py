"""Clients: what they ask for, what they were told, how it ended for them."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from tests.chaos.control import plot
from tests.chaos.control.backend import known_text
from tests.chaos.control.processes import FRONT_PORT
from tests.chaos.control.prompts import prompt_of

if TYPE_CHECKING:
    from tests.chaos.control.game import Game

TRY_AGAIN = frozenset({"TakenOver"})
TENANTS = ("ann", "bob", "eve")
ATTEMPTS = 4
RETRY_SECONDS = 0.4
PUTS_OFF = frozenset({"QueueUnavailable", "NoWorkers", "QueueFull", "Draining"})
"""Answers with 503 and `Retry-After`."""


def client_of(request: str) -> int:
    """Whose request that is, by its id."""
    return int(request[1:].partition(".")[0])


class Client:
    """One request of one client, from its arrival to its one ending, in one attempt or several."""

    def __init__(self, game: Game, number: int) -> None:
        dice = game.dice
        self.game = game
        self.number = number
        self.arrives = 1.2 * dice("arrives", number) ** 2
        self.gateway = dice.choose(plot.GATEWAYS, "gateway", number)
        self.n = 1 + dice.below(3, "n", number)
        self.max_tokens = 1 + dice.below(8, "tokens", number)
        if dice("long", number) < 0.08:
            self.n, self.max_tokens = 1, plot.LONG_TOKENS
        self.seconds = plot.DEADLINE_SECONDS
        self.hurried = dice("hurried", number) < 0.1
        if self.hurried:
            self.seconds = 0.3 * dice("hurry", number)
        self.prompt = prompt_of(dice, number)
        self.seeds = tuple(dice.below(1 << 30, "seed", number, i) for i in range(self.n))
        self.known = [known_text(self.prompt, seed, self.max_tokens) for seed in self.seeds]
        self.told: defaultdict[int, list[int]] = defaultdict(list)
        self.request = ""  # the id that came with what it was told
        self.finished: dict[int, str] = {}
        self.ending: str | None = None
        self.ended_at: float | None = None
        self.prefill = dice.choose(plot.PREFILLS, "prefill", number)
        self.decode = dice.choose(plot.DECODES, "decode", number)
        self.key = f"key-{number}" if dice("resumes", number) < 0.5 else ""
        self.attempts = 0
        self.attempt: Attempt | None = None

    def __str__(self) -> str:
        return f"request {self.number}"

    @property
    def posted(self) -> bool:
        """Whether the gateway has it, or ought to."""
        return self.attempt is not None and self.attempt.posted

    async def ask(self) -> None:
        """Send the request, if it is still wanted."""
        if self.ending is not None:
            return
        self.attempts += 1
        attempt = self.attempt = Attempt(self)
        loop = asyncio.get_running_loop()
        try:
            await loop.create_connection(lambda: attempt, self.gateway, FRONT_PORT)
        except OSError:
            if self.ending is None:
                self.put_off("unreachable", "")

    def post(self) -> tuple[Any, ...]:
        """What is sent. Each time it is a request of its own, until its key is looked up."""
        dice = self.game.dice
        tenant = dice.choose(TENANTS, "tenant", self.number)
        asked = {
            "id": f"r{self.number}.{self.attempts}",
            "tenant": tenant,
            "salt": tenant.encode() if dice("keeps", self.number) < 0.7 else b"",
            "prompt": self.prompt,
            "seeds": self.seeds,
            "max_tokens": self.max_tokens,
            "decode_estimate": 1 + self.max_tokens // 2,
            "priority": dice.below(3, "priority", self.number) - 1,
        }
        told = tuple(len(self.told[index]) for index in range(self.n)) if self.request else ()
        return "post", self.number, asked, self.seconds, self.key, self.request, told

    def put_off(self, why: str, detail: str) -> None:
        """A 503, or nobody there: whoever was told nothing yet may ask again, elsewhere.

        With a key of its own, it may ask for the rest whenever the connection has broken.
        """
        if self.attempts == ATTEMPTS * (3 if self.key else 1) or (
            any(self.told.values()) and not self.key
        ):
            self.end(why, detail)
            return
        self.game.tell(f"{self} is put off: {why} {detail}".rstrip())
        self.attempt = None
        self.gateway = next(it for it in plot.GATEWAYS if it != self.gateway)
        seconds = RETRY_SECONDS * min(self.attempts, 4)
        asyncio.get_running_loop().call_later(seconds, lambda: self.game.spawn(self.ask()))

    def leave(self) -> None:
        """Close the connection."""
        if self.ending is None:
            self.end("left")
            if self.attempt is not None:
                self.attempt.close()

    def end(self, how: str, detail: str = "") -> None:
        """It is over for the client."""
        if self.ending is not None:
            self.game.blame(f"{self}: ended twice: {self.ending}, then {how}")
        self.game.tell(f"{self} ends: {how} {detail}".rstrip())
        self.ending, self.ended_at = how, self.game.world.now
        if how == "done":
            for index, known in enumerate(self.known):
                told = self.told[index]
                if told != known or index not in self.finished:
                    self.game.blame(f"{self}: sequence {index} ends with {told}, not {known}")

    def token(self, request: str, index: int, token: int, finish: str | None) -> None:
        """One more token of one sequence, and the id of the request."""
        self.request = request
        line, known = self.told[index], self.known[index]
        if index in self.finished:
            self.game.blame(f"{self}: a token of sequence {index} after its last one")
        place = len(line)
        line.append(token)
        if place >= len(known) or known[place] != token:
            right = known[place] if place < len(known) else "nothing"
            self.game.blame(f"{self}: token {place} of sequence {index} is {token}, not {right}")
        if finish:
            self.finished[index] = finish
            if len(line) != len(known):
                self.game.blame(f"{self}: sequence {index} ends after {len(line)} tokens")


class Attempt(asyncio.Protocol):
    """One connection of a client."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.posted = False
        self._over = False
        self._transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        if self.client.ending is not None:
            self.close()
            return
        self.posted = True
        transport.write(self.client.post())

    def close(self) -> None:
        """End it."""
        self._over = True
        if self._transport is not None:
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._over:
            self._over = True
            if self.client.key:
                self.client.put_off("broken", "")
            else:
                self.client.end("broken")

    def data_received(self, data: Any) -> None:
        what, *rest = data
        if self._over:
            self.client.game.blame(f"{self.client}: hears {data} after its end")
        elif what == "token":
            self.client.token(*rest)
        else:
            self._over = True
            _, kind, detail = rest
            if kind in PUTS_OFF or (kind in TRY_AGAIN and self.client.key):
                self.client.put_off(kind, detail)
            else:
                self.client.end(kind, detail)
