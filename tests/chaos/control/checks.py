"""The invariants: what is looked at whenever something happens, and at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from backends.host.ledger import Holder
from gateway.admission.scripts import SCRIPTS, Keys, script
from tests.chaos.control import plot
from tests.chaos.control.backend import BLOCK_BYTES
from tests.chaos.control.client import client_of
from tests.chaos.control.processes import DEPLOYMENT, MODEL, WorkerProcess
from tests.chaos.control.redis_server import Server
from tests.chaos.control.transport import Part, WireReceiver
from transfer.landings import Expected
from transfer.layout import Epoch

if TYPE_CHECKING:
    from tests.chaos.control.game import Game

KINDS = ("prefill", "decode")
WISH = 7  # where in the arguments of those it is
QUEUE = frozenset({"enqueue", "leave", "requeue", "renew"})
NAMES = {script(name).digest.encode(): name for name in SCRIPTS}
PREFIX = Keys(DEPLOYMENT).prefix.encode()
ROOM = Keys(DEPLOYMENT).room(MODEL).encode()
WAITING, TICKETS, LEASES = (
    PREFIX + it + MODEL.encode() for it in (b"waiting:", b"tickets:", b"leases:")
)
TRANSIENT = tuple(
    PREFIX + it for it in (b"waiting", b"tickets", b"leases", b"line", b"order", b"active")
)
"""Keys of which nothing may be left when nobody waits and nobody runs."""


class Checks:
    """All that is looked at in one game."""

    def __init__(self, game: Game) -> None:
        self._game = game
        self._turns: dict[str, int] = {}
        self._claimed: set[str] = set()
        self._packed: dict[bytes, bytes] = {}
        self._unpacked: dict[bytes, dict[str, Any]] = {}
        self._leases: dict[bytes, float] = {}
        self._epochs: dict[bytes, tuple[int, str]] = {}
        self._owners: dict[bytes, tuple[float, int]] = {}

    # ---- Redis

    def script(self, server: Server, words: list[bytes], answer: Any) -> None:
        """A command was carried out and is not answered yet."""
        name = NAMES.get(words[1]) if words[0] == b"EVALSHA" else None
        if name is None:
            return
        arguments = words[3 + int(words[2]) :]
        wish = msgspec.msgpack.decode(arguments[WISH]) if name in QUEUE else {}
        self._book(server)
        self._rights(server, name, wish)
        if name == "enqueue":
            self._enqueued(wish["id"])
        elif name == "requeue":
            self._strike(wish["id"], "requeue")
        elif name == "leave":
            for turn, *_ in wish["over"]:
                self._strike(turn, "leave")

    def _strike(self, turn: str, point: str) -> None:
        if turn in self._turns:
            self._game.strike(self._turns[turn], point)

    def _enqueued(self, turn: str) -> None:
        for gateway in self._game.gateways:
            entry = gateway.admission._turns.get(turn)
            if entry is not None:
                self._turns[turn] = client_of(entry.ticket.id)
        self._strike(turn, "enqueue")

    def turn(self, name: str) -> int | None:
        """Whose turn that is."""
        return self._turns.get(name)

    def _book(self, server: Server) -> None:
        """Nobody both waits and runs, and what is held is what leases say."""
        leases, tickets = server.store.read(LEASES) or {}, self._tickets(server)
        both = leases.keys() & (server.store.read(WAITING) or {}).keys()
        if both:
            self._game.blame(f"{both} wait and hold a lease")
        self._owned(tickets)
        held = {it: tickets[it] for it in leases if it in tickets}
        held_now = self._room(server, b"held_prefill", b"held_decode")
        for noted, kind, field in zip(held_now, KINDS, ("claim", "decode"), strict=True):
            counted = sum(ticket[field] for ticket in held.values())
            if noted != counted:
                self._game.blame(f"{noted:.0f} {kind} tokens are held, and leases say {counted}")
        self._epochs = {it: right for it, right in self._epochs.items() if it in held}
        for turn, ticket in held.items():
            right = ticket["epoch"], ticket["gateway"]
            before = self._epochs.get(turn, right)
            if right < before or (right[0] == before[0] and right != before):
                self._game.blame(f"the right to {turn.decode()} went from {before} to {right}")
            self._epochs[turn] = right

    def _tickets(self, server: Server) -> dict[bytes, dict[str, Any]]:
        packed = server.store.read(TICKETS) or {}
        if packed is not self._packed:
            self._packed = packed
            self._unpacked = {it: msgspec.msgpack.decode(at) for it, at in packed.items()}
        return self._unpacked

    def _room(self, server: Server, *fields: bytes) -> list[float]:
        return [float(it or b"0") for it in server.store.call(b"HMGET", ROOM, *fields)]

    def _owned(self, tickets: dict[bytes, dict[str, Any]]) -> None:
        """A ticket at its place goes from an owner to a later one, and never back."""
        owners = {it: (ticket["deadline"], ticket["owner"]) for it, ticket in tickets.items()}
        for turn, (place, now) in owners.items():
            known, before = self._owners.get(turn, (place, now))
            if known == place and now < before:
                self._game.blame(f"{turn.decode()} went from owner {before} back to {now}")
        self._owners = owners

    def queue(self, server: Server) -> list[str]:
        """What the queue still holds."""
        store = server.store
        return [
            f"{key.decode()} holds {list(store.read(key))}"
            for key in store.keys
            if key.startswith(TRANSIENT)
        ]

    def _rights(self, server: Server, name: str, wish: dict[str, Any]) -> None:
        """A lease ends when it lapses or is given back; a new one has room, or is the only one."""
        before, now = self._leases, server.store.now_us / 1000
        leases = self._leases = server.store.read(LEASES) or {}
        over = {wish.get("id"), *(turn for turn, *_ in wish.get("over", ()))}
        for turn in before.keys() - leases.keys():
            if before[turn] > now and turn.decode() not in over:
                self._game.blame(f"the lease of {turn.decode()} was taken away too early")
        if name == "renew" or leases.keys() <= before.keys() or len(leases) == 1:
            return
        for kind in KINDS:
            fields = f"held_{kind}", f"offered_{kind}"
            held, offered = self._room(server, *(it.encode() for it in fields))
            if held > offered:
                self._game.blame(f"{held} {kind} tokens are held, {offered} were offered")

    def redis_began(self, server: Server) -> None:
        """It knows of the leases and epochs that it had written down."""
        self._leases = server.store.read(LEASES) or {}
        self._epochs, self._owners = {}, {}

    def lifetimes(self, server: Server) -> None:
        """No key may stay for ever."""
        for key in server.store.keys:
            if not server.store.lasts(key):
                self._game.blame(f"{key.decode()} has no lifetime")

    # ---- gateways

    def placed(self, name: str, prefill: str, decode: str) -> None:
        """A gateway asks for a landing: no breaker may be open that concerns it."""
        gateway = self._game.processes.get(name)
        if gateway is None:
            return
        breakers = gateway.fleet.breakers
        for key in (prefill, decode, (prefill, decode)):
            if breakers.shown(key).state == "open":
                self._game.blame(f"{name} goes to {key}, which is left alone")

    # ---- workers

    def watch(self, worker: WorkerProcess, receiver: WireReceiver) -> None:
        """Look at every right that is shown, and at every write that lands."""

        def claimed(entry: Expected, epoch: Epoch) -> None:
            landing = entry.landing
            if epoch != landing.epoch:
                self._game.blame(f"landing {landing.id}: accepted {epoch}, not {landing.epoch}")
            if landing.id in self._claimed:
                self._game.blame(f"landing {landing.id}: a second writer was accepted")
            self._claimed.add(landing.id)

        def wrote(landing: str, parts: list[Part]) -> None:
            client = self._game.landings.get(landing)
            held = worker.ledger._held
            mine: set[int] = set()
            for holder, blocks in held.items():
                if holder.reason in ("landing", "quarantine"):
                    mine.update(blocks)
            for at, _ in parts:
                if at // BLOCK_BYTES not in mine:
                    self._game.blame(
                        f"request {client}: a write to landing {landing} landed in block "
                        f"{at // BLOCK_BYTES}, which waits for none"
                    )

        receiver.claimed, receiver.wrote = claimed, wrote

    def computing(self, worker: WorkerProcess, number: int) -> None:
        """A step has a row of that request: somebody must want it, or have wanted it just now."""
        client = self._game.clients.get(number)
        if client is None or client.ended_at is None or client.key:
            return  # what has a key is kept for a while
        late = self._game.world.now - max(client.ended_at, self._game.calm)
        if late > plot.CANCEL_SECONDS:
            self._game.blame(f"{worker} computes for {client}, {late:.2f} s after it had ended")

    def books(self, worker: WorkerProcess) -> None:
        """Every block is free or has one owner, or several sequences that share it."""
        wrong = worker.ledger.audit()
        owners: dict[int, Holder] = {}
        for holder, blocks in worker.ledger._held.items():
            if holder.reason != "decode":
                for block in blocks:
                    if owners.setdefault(block, holder) is not holder:
                        wrong.append(f"block {block} has two owners")
        if wrong:
            self._game.blame(f"{worker}: {'; '.join(wrong)}")
