"""Landings whose writer left without a word, kept until it is proven that it writes no more.

What proves it:
- the writer's process is dead, where its number means anything here;
- the writer comes back and says that nothing of before is under way;
- the agent that it wrote to is gone. That cuts off everybody else too, so it is for writers on
  other machines only, whose death nobody here can see.

A stopped process proves nothing, and neither does a closed socket. Runs on the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable

import structlog

from transfer.errors import PeerLost
from transfer.nixl import wire
from transfer.nixl.agent import Agent

DRAIN_SECONDS = 0.2
"""What a dead process has sent before lies in this machine's sockets; it is read within that."""

RENEW_SECONDS = 2.0
"""How long one waits for the writer to come back before the agent is made anew."""

log = structlog.get_logger(__name__)


class Ward:
    """Landings of one writer, and what to do once they are safe."""

    def __init__(self, greeting: wire.Greeting, proven: Callable[[], None]) -> None:
        """Take note of them."""
        self.greeting = greeting
        self.proven = proven
        self.process: int | None = None
        self.timer: asyncio.TimerHandle | None = None


class Wards:
    """All landings in custody. `cut_all` ends every session that still uses the agent."""

    def __init__(self, agent: Agent, cut_all: Callable[[Exception], None]) -> None:
        """Begin with none."""
        self._agent = agent
        self._cut_all = cut_all
        self._wards: set[Ward] = set()
        self._here = wire.Process.here()
        self._renewing: asyncio.Future[None] | None = None

    def take(
        self, loop: asyncio.AbstractEventLoop, greeting: wire.Greeting, proven: Callable[[], None]
    ) -> None:
        """Keep what the writer of `greeting` may write to; call `proven`, once, when it cannot."""
        ward = Ward(greeting, proven)
        self._wards.add(ward)
        if greeting.process.space != self._here.space:
            ward.timer = loop.call_later(RENEW_SECONDS, self._renew, loop, ward)
            return
        ward.process = _open(greeting.process)
        if ward.process is None:
            self._dead(loop, ward)
        else:
            loop.add_reader(ward.process, self._dead, loop, ward)

    def settled(self, carrier: str) -> None:
        """A writer is back and says that it has stopped."""
        for ward in [it for it in self._wards if it.greeting.carrier == carrier]:
            self._release(ward)

    def close(self) -> None:
        """Watch nobody any more; what is not proven stays so."""
        for ward in self._wards:
            _put_down(ward)
        self._wards.clear()

    def _dead(self, loop: asyncio.AbstractEventLoop, ward: Ward) -> None:
        _put_down(ward)
        self._agent.expect(ward)
        ward.timer = loop.call_later(DRAIN_SECONDS, self._release, ward)

    def _release(self, ward: Ward) -> None:
        if ward in self._wards:
            self._wards.discard(ward)
            self._agent.relax(ward)
            _put_down(ward)
            ward.proven()

    def _renew(self, loop: asyncio.AbstractEventLoop, ward: Ward) -> None:
        if self._renewing is None and ward in self._wards:
            log.warning("agent.renewed", reason="a writer on another machine left without a word")
            self._cut_all(PeerLost("the receiver's agent is being renewed"))
            self._renewing = loop.run_in_executor(None, self._agent.renew)
            self._renewing.add_done_callback(self._renewed)

    def _renewed(self, renewing: asyncio.Future[None]) -> None:
        self._renewing = None
        if error := renewing.exception():
            log.error("agent.lost", reason=str(error))
        for ward in list(self._wards):
            self._release(ward)


def _open(process: wire.Process) -> int | None:
    """A descriptor that becomes readable when the process ends; None if it has."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return None
    if wire.started(process.pid) != process.started:  # somebody else has its number by now
        os.close(descriptor)
        return None
    return descriptor


def _put_down(ward: Ward) -> None:
    if ward.timer is not None:
        ward.timer.cancel()
        ward.timer = None
    if ward.process is not None:
        with contextlib.suppress(RuntimeError):
            asyncio.get_running_loop().remove_reader(ward.process)
        os.close(ward.process)
        ward.process = None
