"""The first frames of a connection, said and heard by a thread that may block.

Each side proves that it knows the workers' shared secret without showing it: a keyed hash of
everything that was said so far, both sides' random numbers included, so that neither a listener
nor a recording is of use. The transport's blobs are under the same hash.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import socket
import time
from typing import TypeVar

import msgspec

from transfer.errors import PeerMisbehaved
from transfer.plan import Plan
from transfer.session import wire

NONCE_BYTES = 32
MAX_FDS = 64

Wanted = TypeVar("Wanted", bound=wire.Message)


class Denial(Exception):
    """We will not have this connection; the text is for the other side."""


class Talk:
    """Messages on one connection, all within one time limit. Remembers what was said."""

    def __init__(self, connection: socket.socket, seconds: float) -> None:
        """Begin; the connection stays the caller's."""
        self.fds: list[int] = []
        self._connection = connection
        self._until = time.monotonic() + seconds
        self._said = hashlib.sha256(b"baton session")

    def say(self, message: wire.Message, fds: tuple[int, ...] = ()) -> None:
        """Send one message.

        Raises:
            OSError: the connection broke, or the time is over.
        """
        data = wire.frame(message)
        self._said.update(data)
        self._hurry()
        sent = socket.send_fds(self._connection, [data], fds) if fds else 0
        self._connection.sendall(data[sent:])

    def hear(self, kind: type[Wanted], most: int = wire.MAX_STRANGER_BYTES) -> Wanted:
        """Wait for a message of `kind`.

        Raises:
            Denial: it is `Denied`.
            PeerMisbehaved: it is something else.
            OSError: the connection broke, or the time is over.
        """
        message = self.hear_any(most)
        if isinstance(message, wire.Denied):
            raise Denial(message.reason)
        if not isinstance(message, kind):
            raise PeerMisbehaved(f"{type(message).__name__} instead of {kind.__name__}")
        return message

    def hear_any(self, most: int = wire.MAX_STRANGER_BYTES) -> wire.Greeting:
        """Wait for any message; raises as `hear`."""
        prefix = self._exactly(wire.PREFIX.size)
        [size] = wire.PREFIX.unpack(prefix)
        if not 0 < size <= most:
            raise PeerMisbehaved(f"a message of {size} bytes")
        body = self._exactly(size)
        message = wire.greeting(body)
        self._said.update(prefix + body)
        return message

    def drop_fds(self) -> None:
        """Close the descriptors that came along, where nobody wants them."""
        for fd in self.fds:
            os.close(fd)
        self.fds = []

    def said(self) -> bytes:
        """A digest of everything that was said and heard so far."""
        return self._said.digest()

    def _exactly(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            self._hurry()
            if self._connection.family == socket.AF_UNIX:
                more, fds, _, _ = socket.recv_fds(self._connection, count - len(data), MAX_FDS)
                self.fds += fds
                if len(self.fds) > MAX_FDS:
                    raise PeerMisbehaved(f"more than {MAX_FDS} descriptors")
            else:
                more = self._connection.recv(count - len(data))
            if not more:
                raise ConnectionResetError("the connection was closed")
            data += more
        return bytes(data)

    def _hurry(self) -> None:
        left = self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError("no greeting in time")
        self._connection.settimeout(left)


def greet(
    talk: Talk, secret: bytes, agreed: Plan, blob: bytes, patience_seconds: float
) -> tuple[wire.Welcome, float]:
    """The sender's part, who is to move what was `agreed`.

    Returns what it was welcomed with, and how long the receiver is patient.

    Raises:
        Denial: the receiver will not have us, or does not know the secret.
        PeerMisbehaved: it says something else.
        OSError: the connection broke, or the time is over.
    """
    nonce = secrets.token_bytes(NONCE_BYTES)
    target, weights = agreed.target.fingerprint, agreed.source.weights
    talk.say(wire.Hello(wire.VERSION, target, nonce, patience_seconds, weights))
    theirs = talk.hear(wire.Challenge).patience_seconds
    talk.say(wire.Proof(_mac(secret, b"sender", talk.said(), blob), blob))
    said = talk.said()
    welcome = talk.hear(wire.Welcome, wire.MAX_HELLO_BYTES)
    if not hmac.compare_digest(welcome.mac, _seal(secret, said, welcome)):
        raise Denial("wrong shared secret: it does not know ours")
    return welcome, theirs or patience_seconds


def challenge(
    talk: Talk, hello: wire.Hello, secret: bytes, fingerprint: str, patience_seconds: float
) -> bytes:
    """The receiver's part, after `Hello`, up to the welcome. Returns the sender's blob.

    Raises:
        Denial: another version or layout, or it does not know the secret.
        PeerMisbehaved: it says something else.
        OSError: the connection broke, or the time is over.
    """
    if hello.version != wire.VERSION:
        raise Denial(f"version {hello.version} of the protocol, here it is {wire.VERSION}")
    talk.say(wire.Challenge(secrets.token_bytes(NONCE_BYTES), patience_seconds))
    said = talk.said()
    proof = talk.hear(wire.Proof, wire.MAX_HELLO_BYTES)
    if not hmac.compare_digest(proof.mac, _mac(secret, b"sender", said, proof.blob)):
        raise Denial("wrong shared secret")
    if hello.fingerprint != fingerprint:
        raise Denial(f"layout {hello.fingerprint}, here it is {fingerprint}")
    return proof.blob


def welcome(talk: Talk, secret: bytes, message: wire.Welcome, fds: tuple[int, ...]) -> None:
    """The receiver's last word, under its proof.

    Raises:
        OSError: the connection broke, or the time is over.
    """
    sealed = msgspec.structs.replace(message, mac=_seal(secret, talk.said(), message))
    talk.say(sealed, fds)


def _mac(secret: bytes, role: bytes, said: bytes, rest: bytes) -> bytes:
    """That `role` knows `secret`, over what was said before and what it adds."""
    return hmac.digest(secret, role + said + rest, "sha256")


def _seal(secret: bytes, said: bytes, message: wire.Welcome) -> bytes:
    bare = msgspec.structs.replace(message, mac=b"")
    return _mac(secret, b"receiver", said, wire.frame(bare))
