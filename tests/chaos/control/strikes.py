"""What strikes the world of a schedule: its processes, its lines, its memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tests.chaos.control import plot
from tests.chaos.control.backend import BLOCK_BYTES
from tests.chaos.control.client import Client
from tests.chaos.control.processes import RedisProcess, WorkerProcess
from tests.chaos.schedule import Fault

if TYPE_CHECKING:
    from tests.chaos.control.game import Game


class Strikes:
    """Carries faults out in one game."""

    def __init__(self, game: Game) -> None:
        self._game = game

    def act(self, fault: Fault, client: Client) -> bool:
        """Have it happen to the world; False: it is something that happens to a message."""
        act = self._acts.get(fault.kind)
        if act is not None:
            act(client, fault.amount)
        return act is not None

    @cached_property
    def _acts(self) -> dict[str, Callable[[Client, float], None]]:
        return {
            "leave": lambda client, amount: self._later(0.05 * amount, client.leave),
            "kill gateway": lambda client, amount: self._kill(client.gateway, amount),
            "kill prefill": lambda client, amount: self._kill(client.prefill, amount),
            "kill decode": lambda client, amount: self._kill(client.decode, amount),
            "kill redis": lambda client, amount: self._kill(plot.REDIS, amount),
            "stop gateway": lambda client, amount: self._stop(client.gateway, amount),
            "stop prefill": lambda client, amount: self._stop(client.prefill, amount),
            "stop decode": lambda client, amount: self._stop(client.decode, amount),
            "stop redis": lambda client, amount: self._stop(plot.REDIS, amount),
            "part control": self._part_control,
            "part data": lambda client, amount: self._part(client.prefill, client.decode, amount),
            "part redis": lambda client, amount: self._part(client.gateway, plot.REDIS, amount),
            "cut control": self._cut_control,
            "cut data": lambda client, amount: self._game.network.cut(
                client.prefill, client.decode
            ),
            "cut redis": lambda client, amount: self._game.network.cut(client.gateway, plot.REDIS),
            "slow": self._slow,
            "drain prefill": lambda client, amount: self._drain(client.prefill, amount),
            "drain decode": lambda client, amount: self._drain(client.decode, amount),
            "fail prefill": lambda client, amount: self._fail(client.prefill, amount),
            "fail decode": lambda client, amount: self._fail(client.decode, amount),
            "rot": lambda client, amount: self._rot(
                client.prefill if int(amount * 100) % 2 else client.decode, amount
            ),
        }

    def _later(self, seconds: float, act: Callable[..., None], *arguments: Any) -> None:
        self._game.world.at(self._game.outside, self._game.world.now + seconds, act, *arguments)

    def _lasts(self, seconds: float) -> float:
        self._game.disturb(self._game.world.now + seconds)
        return seconds

    def _kill(self, slot: str, amount: float) -> None:
        process = self._game.processes.pop(slot, None)
        if process is None:
            return
        self._game.tell(f"{slot} dies")
        kept = None
        if isinstance(process, RedisProcess):
            loses = ("nothing", "last second", "all")[int(3 * amount)]
            kept = process.server.kept(loses)
        process.die()
        seconds = self._lasts(plot.RESTART_SECONDS * (3 * amount % 1))
        self._later(seconds, self._start_again, slot, kept)

    def _start_again(self, slot: str, kept: Any) -> None:
        self._game.tell(f"{slot} starts again")
        self._game.start(slot, kept)

    def _drain(self, slot: str, amount: float) -> None:
        process = self._game.processes.get(slot)
        if process is not None:
            self._game.tell(f"{slot} is told to drain")
            self._lasts(plot.DRAIN_SECONDS + plot.GIVE_BACK_SECONDS + plot.RESTART_SECONDS)
            process.drain(lambda: self._drained(slot, process, amount))

    def _drained(self, slot: str, process: WorkerProcess, amount: float) -> None:
        """It has ended by itself."""
        self._game.tell(f"{slot} has drained")
        self._game.processes.pop(slot)
        process.die()
        seconds = self._lasts(plot.RESTART_SECONDS * amount)
        self._later(seconds, self._start_again, slot, None)

    def _fail(self, slot: str, amount: float) -> None:
        """Every step of a worker fails for a while."""
        process = self._game.processes.get(slot)
        if process is not None:
            seconds = self._lasts(plot.LONG_SECONDS * amount)
            self._game.tell(f"{slot} computes nothing right for {seconds:.2f} s")
            process.fails_until = self._game.world.now + seconds

    def _rot(self, slot: str, amount: float) -> None:
        """A bit changes in what a worker keeps for later and nobody uses now."""
        process = self._game.processes.get(slot)
        kept = process.idle_blocks() if process is not None else []
        if kept:
            block = kept[int(amount * len(kept))]
            self._game.tell(f"{slot}: a bit of block {block} changes")
            pool = memoryview(process.pool)
            flip(pool[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES], amount)

    def _stop(self, slot: str, amount: float) -> None:
        process = self._game.processes.get(slot)
        if process is not None:
            seconds = self._lasts(plot.LONG_SECONDS * 1.5 * amount)
            self._game.tell(f"{slot} stands still for {seconds:.2f} s")
            process.loop.stop(seconds)

    def _part(self, one: str, other: str, amount: float) -> None:
        """One way; the other way for the other half of amounts."""
        way = (one, other) if amount < 0.5 else (other, one)
        self._game.network.hold_up(*way, self._lasts(2 * plot.LONG_SECONDS * (amount % 0.5)))

    def _part_control(self, client: Client, amount: float) -> None:
        worker = client.prefill if int(amount * 100) % 2 else client.decode
        self._part(client.gateway, worker, amount)

    def _cut_control(self, client: Client, amount: float) -> None:
        self._game.network.cut(client.gateway, client.prefill if amount < 0.5 else client.decode)

    def _slow(self, client: Client, amount: float) -> None:
        places = (client.gateway, client.prefill, client.decode, plot.REDIS)
        one = int(amount * 4)
        seconds = self._lasts(4 * plot.LONG_SECONDS * (amount % 0.25))
        self._game.network.slow_down(places[one], places[(one + 1) % 4], seconds)


def damaged(data: Any, amount: float) -> Any:
    """Flip a bit of what is written, or of the digest that is committed."""
    what, landing, *rest = data
    if what == "write":
        parts = [(at, bytearray(it)) for at, it in rest[0]]
        if parts:
            flip(parts[int(amount * len(parts))][1], amount)
        return what, landing, [(at, bytes(it)) for at, it in parts]
    digest = bytearray(rest[0])
    flip(digest, amount)
    return what, landing, bytes(digest), *rest[1:]


def flip(data: bytearray | memoryview, amount: float) -> None:
    """Change one bit."""
    bit = int(amount * len(data) * 8)
    data[bit // 8] ^= 1 << bit % 8
