"""The transport that works anywhere: frames over TCP, received straight into the pool.

Start with `wire.py` (what is said), then `sending.py` and `receiving.py`.
"""

from transfer.tcp.receiving import TcpReceiver
from transfer.tcp.sending import TcpSender

__all__ = ["TcpReceiver", "TcpSender"]
