"""How a gateway and a worker begin: versions, and a secret that is never shown."""

from collections.abc import AsyncIterator

import msgspec
import pytest

from backends.errors import ProtocolError
from backends.protocol import (
    LENGTH,
    LOWEST,
    MAX_STRANGER_BYTES,
    VERSION,
    Caller,
    Challenge,
    Door,
    Hello,
    Inspect,
    Message,
    Proof,
    Rejected,
    Welcome,
)
from tests.host.test_control import SHAPE, Site, SyntheticBackend, site

INFO = SyntheticBackend(**SHAPE).info


def welcome(door: Door) -> Welcome:
    said = Welcome(version=door.version, worker="w", incarnation=1, role="both", info=INFO)
    return door.seal(said)


def greet(caller: Caller, ours: str = "sesame", **versions: int) -> Welcome:
    """Both parts, face to face; what the worker says at the end."""
    door = Door(caller.hello, ours, **versions)
    door.admit(caller.prove(door.challenge))
    return welcome(door)


def test_two_that_know_the_secret_speak_the_newest_version() -> None:
    caller = Caller("g", "sesame")
    said = greet(caller)
    caller.check(said)
    assert said.version == VERSION


@pytest.mark.parametrize(
    ("gateway", "worker", "chosen"),
    [((2, 3), (2, 3), 3), ((2, 2), (2, 3), 2), ((2, 3), (2, 2), 2), ((3, 4), (2, 3), 3)],
)
def test_neighbouring_versions_speak_the_older_one(
    gateway: tuple[int, int], worker: tuple[int, int], chosen: int
) -> None:
    caller = Caller("g", "sesame", lowest=gateway[0], version=gateway[1])
    said = greet(caller, lowest=worker[0], version=worker[1])
    caller.check(said)
    assert said.version == chosen


def test_versions_without_one_in_common_say_which_they_speak() -> None:
    with pytest.raises(ProtocolError, match=r"version 9; this worker speaks 2 to 3"):
        greet(Caller("g", "sesame", lowest=8, version=9), lowest=2, version=3)
    with pytest.raises(ProtocolError, match=r"version 1; this worker speaks"):
        Door(Hello(version=1, gateway="g"), "sesame")


def test_a_worker_that_answers_in_another_version_is_not_taken() -> None:
    caller = Caller("g", "sesame", lowest=3, version=3)
    door = Door(caller.hello, "sesame")
    caller.prove(door.challenge)
    said = Welcome(version=2, worker="w", incarnation=1, role="both", info=INFO)
    with pytest.raises(ProtocolError, match="version 2"):
        caller.check(door.seal(said))


@pytest.mark.parametrize("theirs", ["", "guess", "sesame "])
def test_neither_lets_in_whoever_does_not_know_the_secret(theirs: str) -> None:
    with pytest.raises(ProtocolError, match="wrong secret"):
        greet(Caller("g", theirs))
    caller = Caller("g", "sesame")
    door = Door(caller.hello, theirs)
    caller.prove(door.challenge)
    with pytest.raises(ProtocolError, match="does not know our secret"):
        caller.check(welcome(door))


def test_a_recorded_greeting_opens_nothing() -> None:
    caller = Caller("g", "sesame")
    first = Door(caller.hello, "sesame")
    proof = caller.prove(first.challenge)
    first.admit(proof)
    with pytest.raises(ProtocolError, match="wrong secret"):
        Door(caller.hello, "sesame").admit(proof)
    later = Caller("g", "sesame")
    later.prove(first.challenge)
    with pytest.raises(ProtocolError, match="does not know"):
        later.check(welcome(first))


def test_a_proof_does_not_pass_for_the_other_sides() -> None:
    caller = Caller("g", "sesame")
    door = Door(caller.hello, "sesame")
    proof = caller.prove(door.challenge)
    with pytest.raises(ProtocolError, match="does not know"):
        caller.check(msgspec.structs.replace(welcome(door), mac=proof.mac))


@pytest.mark.parametrize(
    "forged",
    [{"version": LOWEST}, {"lowest": 1}, {"gateway": "other"}, {"nonce": b"n" * 32}],
)
def test_nobody_changes_the_offer_on_its_way(forged: dict[str, object]) -> None:
    caller = Caller("g", "sesame")
    door = Door(msgspec.structs.replace(caller.hello, **forged), "sesame")
    with pytest.raises(ProtocolError, match="wrong secret"):
        door.admit(caller.prove(door.challenge))


def test_nobody_changes_who_answers_on_the_way() -> None:
    caller = Caller("g", "sesame")
    said = msgspec.structs.replace(greet(caller), worker="other")
    with pytest.raises(ProtocolError, match="does not know"):
        caller.check(said)


def test_a_worker_that_skips_the_challenge_is_not_taken() -> None:
    caller = Caller("g", "")
    said = Welcome(version=VERSION, worker="w", incarnation=1, role="both", info=INFO)
    with pytest.raises(ProtocolError, match="does not know"):
        caller.check(said)


def test_a_greeting_without_a_random_number_is_refused() -> None:
    with pytest.raises(ProtocolError, match="random"):
        Door(Hello(version=VERSION, lowest=LOWEST, gateway="g", nonce=b"short"), "")


# ---- a real worker


@pytest.fixture
async def worker() -> AsyncIterator[Site]:
    async for it in site(secret="sesame"):
        yield it


async def rejected(worker: Site, *said: Message) -> str:
    peer = await worker.peer()
    for message in said:
        peer.send(message)
    reason: str = (await peer.hear(Rejected)).reason
    assert await peer.ended()
    return reason


async def test_a_worker_says_why_it_lets_nobody_in(worker: Site) -> None:
    caller = Caller("g", "guess")
    proof = caller.prove(Challenge(nonce=b"n" * 32))
    assert await rejected(worker, caller.hello, proof) == "wrong secret"
    assert "99" in await rejected(worker, Caller("g", "sesame", lowest=99, version=99).hello)
    assert "1;" in await rejected(worker, Hello(version=1, gateway="g"))
    assert "Hello" in await rejected(worker, Inspect(ticket=1))
    assert "Hello" in await rejected(worker, Proof(mac=b""))
    assert "Hello" in await rejected(worker, caller.hello, caller.hello)
    assert "Hello" in await rejected(worker, caller.hello, Inspect(ticket=1))


async def test_a_stranger_gets_no_memory_for_long_frames(worker: Site) -> None:
    peer = await worker.peer()
    peer.writer.write(LENGTH.pack(MAX_STRANGER_BYTES + 1))
    assert await peer.ended()
    assert not worker.host._strangers
