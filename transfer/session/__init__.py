"""The conversation that every transport between two workers shares, over one stream socket.

A session settles who the peer is, which landing a handoff may write to, when it is complete,
how it ended, and when nothing more of it can arrive. It does not know how the bytes travel: a
transport adds that, with the contracts of `mover.py`. Start there, then `wire.py`.
"""

from transfer.session.mover import Carrier, Intake, Met, Move, Mover, Offer, Outgoing
from transfer.session.receiving import SessionReceiver
from transfer.session.sending import SessionSender

__all__ = [
    "Carrier",
    "Intake",
    "Met",
    "Move",
    "Mover",
    "Offer",
    "Outgoing",
    "SessionReceiver",
    "SessionSender",
]
