"""A transport whose sender writes into the pool by itself, in one process, over a Unix socket.

As little as a transport can be, to test the session: the receiver sees none of the writes.
"""

import os
import socket

import numpy as np

from transfer.convert import Conversion
from transfer.layout import Endpoint
from transfer.session import Offer, SessionReceiver, SessionSender

POOLS = {}


def put(pool, frame):
    ends = np.cumsum(frame.lengths)
    for offset, length, end in zip(frame.offsets, frame.lengths, ends, strict=True):
        pool[offset : offset + length] = frame.data[end - length : end]


class DirectReceiver(SessionReceiver):
    def __init__(self, layout, folder, **options):
        super().__init__(layout, DirectIntake(folder), **options)

    def expect(self, landing, pool, **told):
        super().expect(landing, pool, **told)
        POOLS[landing.id] = pool


class DirectIntake:
    def __init__(self, folder):
        self.path = str(folder / "socket")
        self.reading = None
        self.kept = []
        self.closing_proves = False

    def listen(self):
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self.path)
        listener.listen()
        return listener, Endpoint("direct", self.path)

    def welcome(self, peer, hello):
        assert hello == b"hello"
        self.reading, writing = os.pipe()
        os.write(writing, b"through the descriptor")
        os.close(writing)
        return Offer(b"offer", (self.reading,))

    def join(self, peer, connection):
        raise AssertionError("nobody joins")

    def prepare(self, handoff):
        pass

    def complete(self, handoff, proof, then):
        assert proof == b"settled"
        then()

    def stopped(self, handoff):
        pass

    def acknowledged(self, handoff):
        handoff.released()

    def parted(self, peer, handoffs):
        self.kept += handoffs
        if self.closing_proves:
            self.prove()

    def prove(self):
        for handoff in self.kept:
            handoff.released()

    async def close(self):
        self.prove()
        if self.reading is not None:
            os.close(self.reading)
            self.reading = None


class DirectSender(SessionSender):
    def __init__(self, **options):
        super().__init__(DirectCarrier(), **options)


class DirectCarrier:
    transport = "direct"

    def dial(self, endpoint, seconds):
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(endpoint.address)
        return connection

    def hello(self, endpoint):
        return b"hello"

    def meet(self, met):
        assert met.blob == b"offer"
        [fd] = met.fds
        assert os.read(fd, 100) == b"through the descriptor"
        os.close(fd)
        return DirectMover()

    def close(self):
        pass


class DirectMover:
    waits_for_grant = True

    def begin(self, outgoing):
        return DirectMove(outgoing)

    def probe(self):
        return 0.0

    def cut(self):
        pass

    def close(self):
        pass


class DirectMove:
    def __init__(self, outgoing):
        self._outgoing = outgoing
        self._conversion = Conversion(outgoing.plan, outgoing.source, outgoing.landing)

    def write(self, part):
        landing = self._outgoing.landing
        for frame in self._conversion.frames(part):
            if self._outgoing.over():
                return
            if self._outgoing.tamper is not None:
                frame = self._outgoing.tamper(landing.id, frame)
            if frame is not None:
                put(POOLS[landing.id], frame)
        self._outgoing.digest.add(part)

    def settle(self):
        return b"settled"

    def release(self):
        pass
