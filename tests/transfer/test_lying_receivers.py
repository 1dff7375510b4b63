"""What a sender has to bear from receivers that lie about where their memory is, and how much."""

import asyncio
import os

import msgspec
import pytest
from ends import receiver_of, sender_of
from tcp_desk import WIDE, Owner, wide_source

from tests.support.patience import PATIENCE_SECONDS
from transfer.contract import whole
from transfer.errors import PeerLost, PeerMisbehaved
from transfer.nixl import available
from transfer.nixl import wire as nixl
from transfer.session import Offer
from transfer.shared_memory import allocate
from transfer.shm import wire as shm

BLOCK = WIDE.block_bytes
POOL_BLOCKS = 4


def replaced(struct, **fields):
    return msgspec.structs.replace(struct, **fields)


async def hand_over(sender, owner):
    async with asyncio.timeout(PATIENCE_SECONDS):
        writer = await sender.open(owner.landing, wide_source())
        try:
            for part in whole(WIDE.layers, 24):
                await writer.write(part)
            await writer.commit(b"", PATIENCE_SECONDS)
        finally:
            await writer.abort()


async def refused_and_forgotten(transport, lie, **options):
    """A receiver that `lie` was told of is given up; an honest one is served afterwards."""
    pools = allocate(POOL_BLOCKS * BLOCK), allocate(POOL_BLOCKS * BLOCK)
    liar, honest = (receiver_of(transport, WIDE, POOL_BLOCKS, pool) for pool in pools)
    lie(liar.intake)
    async with liar, honest, sender_of(transport, **options) as sender:
        owner = Owner(liar, pool=pools[0])
        with pytest.raises((PeerLost, PeerMisbehaved)):
            await hand_over(sender, owner)
        assert not owner.arrivals
        owner = Owner(honest, pool=pools[1])
        await hand_over(sender, owner)
        assert owner.arrivals


# ---- shared memory ---------------------------------------------------------------------------


def whole_offer(change):
    """An intake whose every offer is changed by a function of its invitation and descriptors."""

    def lie(intake):
        welcome = intake.welcome

        def lying(peer, hello):
            offer = welcome(peer, hello)
            told, fds = change(shm.invitation(offer.blob), offer.fds)
            return Offer(msgspec.msgpack.encode(told), tuple(fds))

        intake.welcome = lying

    return lie


def first_piece(**fields):
    def change(told, fds):
        first, *others = told.regions
        return replaced(told, regions=(replaced(first, **fields), *others)), fds

    return change


def loose_file():
    fd = os.memfd_create("loose")
    os.ftruncate(fd, POOL_BLOCKS * BLOCK)
    return fd


@pytest.mark.parametrize(
    "change",
    [
        first_piece(file=9),
        first_piece(size=POOL_BLOCKS * BLOCK + 1),
        first_piece(size=1 << 50),
        first_piece(size=BLOCK),
        first_piece(offset=1),
        first_piece(offset=1 << 61),
        lambda told, fds: (told, fds[:1]),
        lambda told, fds: (told, ()),
        lambda told, fds: (told, (loose_file(), *fds[1:])),
        lambda told, fds: (replaced(told, regions=told.regions * 2), fds),
        lambda told, fds: (replaced(told, receipt=replaced(told.receipt, offset=1)), fds),
    ],
    ids=[
        "no such file", "one byte more", "a petabyte", "one block", "too far by a byte",
        "beyond everything", "descriptors left out", "no descriptors", "a file of no fixed length",
        "twice the regions", "a sign beyond its file",
    ],
)  # fmt: skip
async def test_a_pool_that_is_not_what_it_is_said_to_be_is_not_written_to(change):
    await refused_and_forgotten("shm", whole_offer(change))


# ---- NIXL ------------------------------------------------------------------------------------


def answer(**fields):
    """An intake that says something else of where a landing lies."""

    def lie(intake):
        admit = intake.admit
        intake.admit = lambda handoff, *, direct: replaced(admit(handoff, direct=direct), **fields)

    return lie


def terms(**fields):
    """An intake that says something else of its agent and arena."""

    def lie(intake):
        welcome = intake.welcome

        def lying(peer, hello):
            said = nixl.terms(welcome(peer, hello).blob)
            return Offer(msgspec.msgpack.encode(replaced(said, **fields)))

        intake.welcome = lying

    return lie


needs_nixl = pytest.mark.skipif(not available(), reason="needs NIXL")


@needs_nixl
@pytest.mark.parametrize(
    "lie",
    [
        answer(starts=()),
        answer(bases=()),
        answer(starts=(), bases=()),
        answer(starts=(1 << 40,)),
        answer(starts=(0, 1 << 20, 1 << 10), bases=(4096, 4096, 4096)),
        answer(bases=(0,)),
        answer(bases=(4096,)),
        answer(bases=((1 << 62) - 1,)),
        answer(mark=b"another landing"),
        answer(metadata=b"\x00" * 64),
        terms(arena=0),
        terms(arena=4096),
        terms(arena=1 << 62),
        terms(metadata=b""),
        terms(metadata=b"\x00" * 64),
    ],
)
async def test_places_that_are_not_the_receiver_s_are_not_written_to(lie, monkeypatch):
    monkeypatch.setenv("UCX_TLS", "tcp")
    await refused_and_forgotten("nixl", lie, direct_bytes=1)
