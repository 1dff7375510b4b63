"""How a gateway and a worker begin: the version that both speak, the secret that both know.

    gateway                                                     worker
       | Hello(lowest, version, nonce) ---------------------->    |
       | <--------------------------------------- Challenge(nonce) |
       | Proof(mac) ----------------------------------------->    |
       | <------------- Welcome(version, who it is, ..., mac) or Rejected

Each side proves that it knows the shared secret without showing it: a keyed hash over both
sides' random numbers and over what was offered, so that neither a listener nor a recording is of
use, nor somebody who takes newer versions out of the offer. Whoever can alter what travels
afterwards is kept out by TLS alone.
"""

from __future__ import annotations

import hmac
import secrets

import msgspec

from backends.errors import ProtocolError
from backends.protocol.messages import NONCE_BYTES, Challenge, Hello, Proof, Welcome

VERSION = 3
"""The newest version. 1 showed the secret, and is spoken no more."""

DRAINS = 3
"""The version from which on a worker understands `Drain`."""

CACHES = 3
"""The version from which on a worker says what it keeps of prefixes (`Cached`), and hands over only
the rest."""

KEEPS = 3
"""The version from which on a worker keeps requests for others: `Disown`, `Adopt`."""

LOWEST = 2
"""The oldest version that is spoken too: the one before, so that a rolling upgrade works."""


class Caller:
    """The gateway's part, for one connection. `hello` goes first."""

    def __init__(
        self, gateway: str, secret: str, *, lowest: int = LOWEST, version: int = VERSION
    ) -> None:
        nonce = secrets.token_bytes(NONCE_BYTES)
        self.hello = Hello(version=version, lowest=lowest, gateway=gateway, nonce=nonce)
        self._secret = secret
        self._theirs = b""

    def prove(self, challenge: Challenge) -> Proof:
        """The answer to the worker's challenge."""
        self._theirs = challenge.nonce
        return Proof(mac=_mac(self._secret, "gateway", self.hello, self._theirs))

    def check(self, welcome: Welcome) -> None:
        """Make sure that the worker knows the secret, and speaks a version that we do.

        Raises:
            ProtocolError: says why it is not taken.
        """
        seal = _seal(self._secret, self.hello, self._theirs, welcome)
        if not (self._theirs and hmac.compare_digest(seal, welcome.mac)):
            raise ProtocolError("it does not know our secret")
        if not self.hello.lowest <= welcome.version <= self.hello.version:
            raise ProtocolError(f"it speaks protocol version {welcome.version}")


class Door:
    """The worker's part, for one connection."""

    def __init__(
        self, hello: Hello, secret: str, *, lowest: int = LOWEST, version: int = VERSION
    ) -> None:
        """Choose the newest version that both speak.

        Raises:
            ProtocolError: there is none; the text is for the gateway.
        """
        self.version = min(hello.version, version)
        if self.version < max(hello.lowest, lowest):
            span = f"{lowest}" if lowest == version else f"{lowest} to {version}"
            raise ProtocolError(
                f"protocol version {hello.version}; this worker speaks {span}",
            )
        if len(hello.nonce) != NONCE_BYTES:
            raise ProtocolError("a greeting without a random number")
        self.challenge = Challenge(nonce=secrets.token_bytes(NONCE_BYTES))
        self._hello = hello
        self._secret = secret

    def admit(self, proof: Proof) -> None:
        """Make sure that the gateway knows the secret.

        Raises:
            ProtocolError: it does not; the text is for the gateway.
        """
        expected = _mac(self._secret, "gateway", self._hello, self.challenge.nonce)
        if not hmac.compare_digest(expected, proof.mac):
            raise ProtocolError("wrong secret")

    def seal(self, welcome: Welcome) -> Welcome:
        """`welcome` under our own proof."""
        return msgspec.structs.replace(
            welcome, mac=_seal(self._secret, self._hello, self.challenge.nonce, welcome)
        )


def _mac(secret: str, role: str, hello: Hello, theirs: bytes, *more: object) -> bytes:
    """That `role` knows `secret`, over all that the two have said so far."""
    offer = (hello.lowest, hello.version, hello.gateway, hello.nonce)
    said = msgspec.msgpack.encode(("baton control", role, *offer, theirs, *more))
    return hmac.digest(secret.encode(), said, "sha256")


def _seal(secret: str, hello: Hello, theirs: bytes, welcome: Welcome) -> bytes:
    identity = (welcome.version, welcome.worker, welcome.incarnation, welcome.role)
    return _mac(secret, "worker", hello, theirs, *identity)
