"""The transport that works anywhere: frames over TCP, received straight into the pool.

Beside its session, a pair has data connections that carry nothing but frames (`wire.py`):
`sending.py` fills them, `lane.py` empties them, each in a thread of its own.
"""

from transfer.tcp.receiving import TcpReceiver
from transfer.tcp.sending import TcpSender

__all__ = ["TcpReceiver", "TcpSender"]
