"""A worker's side of the data plane: its receivers, its sender, and whom it has met."""

from __future__ import annotations

import asyncio

import structlog

from backends.host.config import HostConfig
from backends.protocol import Meet, Met
from transfer.contract import Sender
from transfer.errors import TransferError
from transfer.faults import FaultySender
from transfer.layout import KVLayout
from transfer.tcp import TcpReceiver, TcpSender

log = structlog.get_logger()


class Peers:
    """Owns every data connection of one worker."""

    def __init__(self, config: HostConfig, layout: KVLayout) -> None:
        self._config = config
        self._layout = layout
        self._receivers: list[TcpReceiver] = []
        sender = TcpSender(secret=config.secret)
        self.sender: Sender = FaultySender(sender, config.faults) if config.faults else sender

    async def listen(self) -> list[TcpReceiver]:
        """Begin to take KV from other workers.

        Raises:
            OSError: the data address cannot be listened on.
        """
        receiver = TcpReceiver(
            self._layout, host=self._config.data_host, secret=self._config.secret
        )
        await receiver.start()
        self._receivers.append(receiver)
        return self._receivers

    async def meet(self, message: Meet) -> Met:
        """Connect to a decode worker and say how KV will travel, or why it cannot."""
        refusal = f"{message.worker} offers no transport that this worker has"
        for endpoint in message.endpoints:
            if endpoint.transport != "tcp":
                continue
            try:
                line = await self.sender.connect(endpoint, self._layout, message.layout)
            except (TransferError, TimeoutError) as error:
                refusal = str(error) or type(error).__name__
            else:
                log.info("peer.met", peer=message.worker, transport=endpoint.transport, plan=line)
                return Met(worker=message.worker, transport=endpoint.transport, plan=line)
        log.warning("peer.refused", peer=message.worker, reason=refusal)
        return Met(worker=message.worker, refusal=refusal)

    async def close(self) -> None:
        """Close every data connection."""
        await asyncio.gather(self.sender.close(), *(one.close() for one in self._receivers))
