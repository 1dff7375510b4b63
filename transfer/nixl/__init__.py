"""The transport for networks that write into memory by themselves: RDMA verbs, or what UCX has.

The sender writes into the receiver's pool with NIXL (`agent.py`); where runs are too short for
that, it writes into an arena there and has the receiver copy them to their places. Start with
`wire.py` (what is said beside the session), then `sending.py` and `receiving.py`.

Needs `nixl-cu12` or another build of NIXL; `available` says whether one is here.
"""

from transfer.nixl.agent import available, has_verbs
from transfer.nixl.receiving import NixlReceiver
from transfer.nixl.sending import NixlSender

__all__ = ["NixlReceiver", "NixlSender", "available", "has_verbs"]
