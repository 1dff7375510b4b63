"""Damage handoffs on purpose, to see that the digest and everybody above it copes.

`FaultySender` wraps a transport's sender and is switched on by configuration, in a real worker
as in a test. It damages what travels, never the source: the digest that the sender states stays
that of the true prefix.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Literal, Protocol, Self, get_args

import msgspec
import numpy as np

from transfer.contract import KVSlice, Probe, Receipt, Sender, Source, Writer
from transfer.convert import Frame, Tamper
from transfer.errors import PeerLost
from transfer.layout import Endpoint, KVLayout, Landing
from transfer.rows import strides

Kind = Literal["flip_bit", "missing_page", "swapped_layer", "delay", "drop"]
KINDS: tuple[Kind, ...] = get_args(Kind)
FORM = re.compile(r"(?P<kind>[a-z_]+)@(?P<handoff>\*|[1-9][0-9]*)(:(?P<amount>[0-9.]+))?")


class Fault(msgspec.Struct, frozen=True):
    """One kind of damage to the `handoff`-th handoff, counted from 1; None: to every one.

    `amount` is the number of seconds before each write for `delay`, and for `drop` the number
    of the write at which the connection breaks.
    """

    kind: Kind
    handoff: int | None
    amount: float


def faults(text: str) -> tuple[Fault, ...]:
    """Read a comma-separated list such as `flip_bit@1,delay@*:0.05,drop@3:2`.

    Raises:
        ValueError: names the part that is not a fault.
    """
    return tuple(_fault(part.strip()) for part in text.split(",") if part.strip())


def _fault(text: str) -> Fault:
    match = FORM.fullmatch(text)
    kind = next((it for it in KINDS if match and it == match["kind"]), None)
    if match is None or kind is None:
        raise ValueError(f"{text!r} is not KIND@HANDOFF[:AMOUNT] with a kind of {', '.join(KINDS)}")
    handoff = None if match["handoff"] == "*" else int(match["handoff"])
    return Fault(kind, handoff, float(match["amount"] or 1))


class Tamperable(Sender, Protocol):
    """A sender that shows each frame to `tamper` before it leaves."""

    tamper: Tamper | None


class FaultySender:
    """A sender that damages some of its handoffs, as `what` says (see `faults`)."""

    def __init__(self, inner: Tamperable, what: str) -> None:
        """Wrap `inner`.

        Raises:
            ValueError: `what` is not a list of faults.
        """
        self._inner = inner
        self._faults = faults(what)
        self._handoffs = 0
        self._damages: dict[str, _Damage] = {}
        inner.tamper = self._tamper

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exit_: object) -> None:
        await self.close()

    async def connect(self, endpoint: Endpoint, source: KVLayout, target: KVLayout) -> str:
        """As `Sender.connect`."""
        return await self._inner.connect(endpoint, source, target)

    @property
    def lost(self) -> Callable[[Endpoint, PeerLost], None]:
        """As `Sender.lost`."""
        return self._inner.lost

    @lost.setter
    def lost(self, told: Callable[[Endpoint, PeerLost], None]) -> None:
        self._inner.lost = told

    async def probe(self, endpoint: Endpoint) -> Probe:
        """As `Sender.probe`."""
        return await self._inner.probe(endpoint)

    async def open(self, landing: Landing, source: Source) -> Writer:
        """As `Sender.open`; counts handoffs."""
        self._handoffs += 1
        mine = [it for it in self._faults if it.handoff in (None, self._handoffs)]
        if not mine:
            return await self._inner.open(landing, source)
        self._damages[landing.id] = _Damage(landing, mine)
        delay = sum(it.amount for it in mine if it.kind == "delay")
        try:
            writer = await self._inner.open(landing, source)
        except BaseException:
            self._forget(landing.id)
            raise
        return _FaultyWriter(writer, self, landing.id, delay)

    async def close(self) -> None:
        """As `Sender.close`."""
        await self._inner.close()

    def _forget(self, landing_id: str) -> None:
        self._damages.pop(landing_id, None)

    def _tamper(self, landing_id: str, frame: Frame) -> Frame | None:
        damage = self._damages.get(landing_id)
        return frame if damage is None else damage.apply(frame)


class _FaultyWriter:
    """A writer that waits before it writes."""

    def __init__(self, inner: Writer, sender: FaultySender, landing: str, delay: float) -> None:
        self._inner = inner
        self._forget = sender._forget  # noqa: SLF001 -- two halves of one thing
        self._landing = landing
        self._delay = delay

    async def write(self, part: KVSlice) -> None:
        await asyncio.sleep(self._delay)
        await self._inner.write(part)

    async def commit(self, note: bytes, seconds: float) -> Receipt:
        try:
            return await self._inner.commit(note, seconds)
        finally:
            self._forget(self._landing)

    async def abort(self) -> None:
        await self._inner.abort()
        self._forget(self._landing)


class _Damage:
    """What is done to the frames of one handoff."""

    def __init__(self, landing: Landing, mine: list[Fault]) -> None:
        layout = landing.layout
        self._kinds = {it.kind: it.amount for it in mine}
        self._frames = 0
        self._layers = layout.layers
        self._layer_bytes = strides(layout, landing.pool_blocks)["layer"] * layout.item_bytes
        if "swapped_layer" in self._kinds and layout.layers < 2:
            raise ValueError("swapped_layer: this model has one layer only")

    def apply(self, frame: Frame) -> Frame | None:
        """The frame as it will travel; None if it gets lost.

        Raises:
            ConnectionResetError: the connection breaks here.
        """
        self._frames += 1
        if self._frames == self._kinds.get("drop"):
            raise ConnectionResetError("dropped on purpose")
        damaged: Frame | None = frame
        if self._frames == 1 and "flip_bit" in self._kinds:
            frame.data[len(frame.data) // 2] ^= 0x10
        if self._frames == 1 and "missing_page" in self._kinds:
            damaged = _without_first_run(frame)
        if damaged is not None and frame.layer < 2 and "swapped_layer" in self._kinds:
            shift = self._layer_bytes * (1 - 2 * frame.layer)
            damaged = msgspec.structs.replace(damaged, offsets=damaged.offsets + np.int64(shift))
        return damaged


def _without_first_run(frame: Frame) -> Frame | None:
    if len(frame.offsets) == 1:
        return None
    first = int(frame.lengths[0])
    return Frame(frame.layer, frame.offsets[1:], frame.lengths[1:], frame.data[first:])
