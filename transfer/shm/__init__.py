"""The transport between two processes of one machine: the sender writes into the pool itself.

The receiver hands out its pool's memory file over a Unix socket; from there on a write is one
copy, and the receiver neither sees nor checks it: a peer is trusted with the whole pool. What a
sender that was stopped may still do is covered by the quarantine: it ends with the sender's word,
with the sign it leaves in shared memory when its connection is gone, or with its process.

Start with `wire.py` (what is handed out), then `sending.py` and `receiving.py`.
"""

from transfer.shm.receiving import ShmReceiver
from transfer.shm.sending import ShmSender

__all__ = ["ShmReceiver", "ShmSender"]
