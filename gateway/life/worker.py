"""The connection to one worker: greet it, keep what it says of itself, pass its messages on."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from typing import Protocol

from backends.errors import ProtocolError
from backends.protocol import (
    Adopted,
    Caller,
    Challenge,
    Failed,
    FirstToken,
    Granted,
    HandedOver,
    Landed,
    Link,
    Load,
    Message,
    Refused,
    Rejected,
    ToGateway,
    Token,
    Tokens,
    Welcome,
    split_address,
)
from gateway.admission.registry import WorkerRecord
from gateway.life.cached import Known

PACE_STEPS = 8
CONNECT_SECONDS = 5.0

LegMessage = Granted | Refused | FirstToken | HandedOver | Landed | Failed | Adopted


class LegPort(Protocol):
    """What a leg hears from the workers that carry it."""

    def token(self, row: Token) -> None:
        """One more token of one of its sequences."""

    def heard(self, worker: Worker, message: LegMessage) -> None:
        """Anything else that bears its handle."""

    def lost(self, worker: Worker, reason: str) -> None:
        """A worker that it uses is gone."""


class Worker:
    """One connected worker. What it says besides tokens goes to `heard`."""

    def __init__(
        self,
        record: WorkerRecord,
        link: Link,
        welcome: Welcome,
        heard: Callable[[Worker, Message], None],
    ) -> None:
        self.id = record.id
        self.record = record
        self.welcome = welcome
        self.load: Load | None = None
        self.cached = Known(record.id, welcome.info.pool_blocks)
        self.legs: dict[int, LegPort] = {}
        self.silent_ticks = 0
        self._link = link
        self._heard = heard
        self._step = 0  # the last one that it told of
        self._paced = (0, 0.0)

    @property
    def identity(self) -> tuple[str, int]:
        """Names this start of this worker."""
        return self.id, self.welcome.incarnation

    def hear(self, _: Link, message: Message) -> None:
        """Take what the worker says; its tokens go straight to their legs."""
        self.silent_ticks = 0
        if type(message) is not Tokens:
            self._heard(self, message)
            return
        self._step = message.step
        legs = self.legs
        for row in message.rows:
            leg = legs.get(row.handle)
            if leg is not None:
                leg.token(row)

    def pace(self, now: float) -> float | None:
        """Seconds per step since the last answer; None while too few were told of to say."""
        step, since = self._paced
        steps = self._step - step
        if steps < PACE_STEPS:
            return None
        self._paced = self._step, now
        return (now - since) / steps

    @property
    def emulated(self) -> str:
        """After what its timing is made up, if it is: an accelerator, or "formula"."""
        info = self.welcome.info
        return info.emulates or ("formula" if info.emulated else "")

    @property
    def draining(self) -> bool:
        """Whether it takes no new work, and will leave."""
        return self.load is not None and self.load.draining

    @property
    def shunned(self) -> tuple[str, ...]:
        """Prefill workers that it gives no landings for the time being."""
        return self.load.shunned if self.load is not None else ()

    def send(self, message: Message) -> None:
        """Dropped in silence when the connection is lost; the legs are told of that."""
        self._link.send(message)

    def give_up(self) -> None:
        """End the connection, without waiting for anything that is still to be sent."""
        self._link.abort("nothing was heard from it")


async def connect(
    record: WorkerRecord,
    caller: Caller,
    tls: ssl.SSLContext | None,
    heard: Callable[[Worker, Message], None],
    taken: Callable[[Worker], None],
    lost: Callable[[Worker, str], None],
) -> asyncio.Future[None]:
    """Greet the worker that `record` names; the future is done when its connection is lost.

    `taken` is called once it has answered, before any message of it goes to `heard`; `lost`
    once, with the reason, when it had been taken. `tls` is for TCP.

    Raises:
        OSError: nobody answers there, or not over TLS.
        TimeoutError: whoever is there does not answer in time.
        ConnectionError: it refused us, or is not that worker.
        ValueError: the record's address is no address.
    """
    loop = asyncio.get_running_loop()
    greeting: asyncio.Future[None] = loop.create_future()
    ended: asyncio.Future[None] = loop.create_future()
    workers: list[Worker] = []

    def greeted(link: Link, message: Message) -> None:
        if greeting.done():
            return
        if isinstance(message, Challenge):
            link.send(caller.prove(message))
            return
        fault = _fault(record, caller, message)
        if isinstance(message, Welcome) and not fault:
            worker = Worker(record, link, message, heard)
            link.message = worker.hear
            link.trust()
            workers.append(worker)
            taken(worker)
            greeting.set_result(None)
        else:
            greeting.set_exception(ConnectionError(f"{record.id} is not taken: {fault}"))

    def gone(_: Link, reason: str) -> None:
        if not greeting.done():
            greeting.set_exception(ConnectionError(reason))
        if workers:
            lost(workers[0], reason)
        if not ended.done():
            ended.set_result(None)

    link = Link(ToGateway, greeted, gone)
    async with asyncio.timeout(CONNECT_SECONDS):
        await _dial(record.address, link, tls)
        link.send(caller.hello)
        try:
            await greeting
        except BaseException:
            link.close()
            raise
    return ended


def _fault(record: WorkerRecord, caller: Caller, greeting: Message) -> str:
    """Why whoever greets so is not the worker that `record` names; empty when it is."""
    if isinstance(greeting, Rejected):
        return f"it refused us: {greeting.reason}"
    if not isinstance(greeting, Welcome):
        return f"it said {greeting!r:.200}"
    try:
        caller.check(greeting)
    except ProtocolError as error:
        return str(error)
    if greeting.worker != record.id:
        return f"{greeting.worker} answers at its address"
    return ""


async def _dial(address: str, link: Link, tls: ssl.SSLContext | None) -> None:
    loop = asyncio.get_running_loop()
    kind, where, port = split_address(address)
    if kind == "unix":
        await loop.create_unix_connection(lambda: link, where)
    else:
        # The name is for TLS alone; it is not compared (see `transfer.tls`).
        name = where if tls is not None else None
        await loop.create_connection(lambda: link, where, port, ssl=tls, server_hostname=name)
