"""A worker's side of the data plane: its receivers, its senders, and whom it has met."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import structlog

from backends.host.config import HostConfig
from backends.host.pools import KVPool, pools_of
from backends.host.staging import Staging
from backends.protocol import BackendInfo, Meet, Met
from transfer.choose import Chooser, Peer
from transfer.coded import CodedSender, codec_of, encodes_per_second, named
from transfer.coding import Codec, coded_layout
from transfer.contract import Buffer, Receiver, Sender
from transfer.errors import LayoutMismatch, PeerLost, TransferError
from transfer.faults import FaultySender, Tamperable
from transfer.layout import Endpoint
from transfer.nixl import NixlReceiver, NixlSender, has_verbs
from transfer.pool import Pool
from transfer.session import SessionReceiver
from transfer.shm import ShmReceiver, ShmSender
from transfer.tcp import TcpReceiver, TcpSender

log = structlog.get_logger()

FAR = frozenset({"nixl", "tcp"})
CODED = frozenset({"shm", "tcp"})  # NIXL would register each buffer of codes for good
"""Transports between machines, which are encrypted where that is asked for."""

ENCODERS = 2
"""Threads that encode what travels as codes."""

AUTO = ("shm", "nixl", "tcp") if has_verbs() else ("shm", "tcp")

ANYWHERE = "tcp"
"""The transport that needs nothing but a network: without it, something is set wrongly."""


class Peers:
    """Owns every data connection of one worker.

    `auto` is what `auto` in its settings stands for. `left_out` names those of them that did not
    work here, and why. `lost` is called when the connection to a decode worker has ended by itself:
    they must meet again before anything is handed over.
    """

    def __init__(
        self,
        config: HostConfig,
        info: BackendInfo,
        pool: Buffer,
        lost: Callable[[Met], None],
        *,
        auto: tuple[str, ...] = AUTO,
    ) -> None:
        self.left_out: dict[str, str] = {}
        self._auto = auto
        self._config = config
        self._info = info
        self._pools = pools_of(info, pool)
        self._lost = lost
        self._receivers: list[SessionReceiver] = []
        self.stagings: dict[Codec, Staging] = {}
        self._codecs = [it for it in config.wire if self._has_codes(it)]
        self._encoders = ThreadPoolExecutor(ENCODERS, thread_name_prefix="kv-encode")
        senders = {name: self._sender(name) for name in self._wanted}
        for name in self._wanted:
            for codec in self._codecs:
                inner = self._sender(name)
                senders[named(name, codec)] = CodedSender(inner, codec, self._encoders)
        self.chooser = Chooser(senders, self._on_lost)

    async def warm_up(self) -> None:
        """Encode once, so that no meeting waits until that is compiled."""
        layout = self._info.layout
        for codec in self._codecs:
            await asyncio.to_thread(encodes_per_second, codec, layout, layout)

    async def listen(self) -> list[Receiver]:
        """Begin to take KV from other workers, in every way that was asked for.

        Of `auto`, what this pool or this machine cannot do is left out. Codes have pools of their
        own, in `stagings` from now on.

        Raises:
            ValueError: this pool cannot do what was asked for by name.
            OSError: this machine cannot, or the data address cannot be listened on.
        """
        for codec in self._codecs:
            memory = self._pools[0].memory
            self.stagings[codec] = await asyncio.to_thread(Staging, codec, self._info, memory)
        for name in self._wanted:
            try:
                self._receivers += await self._listen(name)
                for staging in self.stagings.values() if name in CODED else ():
                    self._receivers.append(await self._listen_for_codes(name, staging))
            except (ValueError, OSError) as error:
                asked = name in self._config.transports
                if asked and isinstance(error, ValueError):
                    raise ValueError(f"transport {name}: {error}") from error
                if asked or name == ANYWHERE:
                    raise
                self.left_out[name] = str(error)
                log.warning("transport.skipped", transport=name, reason=str(error))
        return [*self._receivers]

    async def meet(self, message: Meet) -> Met:
        """Connect to a decode worker and say how KV will travel, or why it cannot."""
        peer = Peer(message.worker, message.incarnation)
        endpoints, without = self._usable(message)
        try:
            choice = await self.chooser.meet(
                peer,
                endpoints,
                self._info.layouts,
                message.layout.sharded(message.shards),
            )
        except (TransferError, ValueError) as error:
            log.warning("peer.refused", peer=message.worker, reason=str(error))
            return Met(worker=message.worker, refusal=str(error))
        transport = choice.endpoint.transport
        log.info(
            "peer.met",
            peer=message.worker,
            transport=transport,
            plan=choice.plan,
            reason=choice.reason + without,
        )
        return Met(
            worker=message.worker,
            transport=transport,
            plan=choice.plan,
            reason=choice.reason + without,
        )

    async def close(self) -> None:
        """Close every data connection."""
        await asyncio.gather(self.chooser.close(), *(one.close() for one in self._receivers))
        self._encoders.shutdown(wait=False, cancel_futures=True)
        for staging in self.stagings.values():
            staging.close()

    def _has_codes(self, codec: Codec) -> bool:
        """Whether there are such codes for this pool; if not, why is in `left_out`."""
        try:
            if self._info.shards:
                raise LayoutMismatch("shards: there are no codes for several pools")
            coded_layout(self._info.layout, codec)
        except LayoutMismatch as error:
            self.left_out[codec] = str(error)
            log.warning("wire.skipped", wire=codec, reason=str(error))
            return False
        return True

    def _usable(self, message: Meet) -> tuple[tuple[Endpoint, ...], str]:
        """A decode worker's endpoints that this pair may use, and why not the others."""
        if not (message.exact and self._info.continuation == "exact"):
            return message.endpoints, ""
        exact = tuple(it for it in message.endpoints if codec_of(it.transport) is None)
        left = any(codec_of(it.transport) in self._codecs for it in message.endpoints)
        return exact, "; no codes: both ends are exact" if left else ""

    @property
    def _wanted(self) -> tuple[str, ...]:
        """The transports to offer, without `auto`."""
        named = [self._auto if name == "auto" else (name,) for name in self._config.transports]
        return tuple(dict.fromkeys(name for names in named for name in names))

    def _sender(self, name: str) -> Sender:
        makers: dict[str, Callable[..., Tamperable]]
        makers = {"shm": ShmSender, "nixl": NixlSender, "tcp": TcpSender}
        config = self._config
        settings: dict[str, Any] = {
            "secret": config.secret,
            "allow_unlike_weights": config.unlike_weights,
        }
        if config.tls is not None and name in FAR:
            settings["tls"] = config.tls.client()
        sender = makers[name](**settings)
        return FaultySender(sender, config.faults) if config.faults else sender

    async def _listen(self, name: str) -> list[SessionReceiver]:
        """A receiver for each pool, or none: then what was begun has ended."""
        receivers: list[SessionReceiver] = []
        try:
            for number, pool in enumerate(self._pools):
                receiver = self._receiver(name, number, pool, self._info.pool_blocks)
                receiver.shard = number
                receiver.allow_unlike_weights = self._config.unlike_weights
                await receiver.start()
                receivers.append(receiver)
        except BaseException:
            await asyncio.gather(*(it.close() for it in receivers))
            raise
        return receivers

    async def _listen_for_codes(self, name: str, staging: Staging) -> SessionReceiver:
        pool = KVPool(staging.layout, staging.memory)
        receiver = self._receiver(name, 0, pool, staging.ledger.blocks, f".{staging.codec}")
        receiver.codes = named(name, staging.codec), staging.decodes_per_second
        receiver.allow_unlike_weights = self._config.unlike_weights
        await receiver.start()
        return receiver

    def _receiver(
        self, name: str, number: int, of: KVPool, blocks: int, suffix: str = ""
    ) -> SessionReceiver:
        config, layout = self._config, of.layout
        if name == "shm":
            folder = Path(config.socket_dir) if config.socket_dir else None
            own = f"{config.id}.{number}.kv" if number else f"{config.id}{suffix}.kv"
            return ShmReceiver(
                layout,
                blocks,
                of.memory,
                socket_path=folder and folder / own,
                secret=config.secret,
            )
        tls = config.tls.server() if config.tls is not None else None
        if name == "nixl":
            pool = Pool.of(layout, blocks, of.memory)
            return NixlReceiver(
                layout, pool=pool, host=config.data_host, secret=config.secret, tls=tls
            )
        return TcpReceiver(layout, host=config.data_host, secret=config.secret, tls=tls)

    def _on_lost(self, peer: Peer, reason: PeerLost) -> None:
        log.warning("peer.lost", peer=peer.worker, reason=str(reason))
        self._lost(Met(worker=peer.worker, refusal=f"the connection was lost: {reason}"))
