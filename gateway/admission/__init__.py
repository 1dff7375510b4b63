"""Who may start: a queue in Redis that all gateways share, and the workers that they know.

This package knows tickets, leases and credits in tokens. It does not know HTTP, prompts or how a
request is carried out. Start with `queue.py`; what must be atomic is in the `.lua` files.
"""

from gateway.admission.client import RedisUnsuitable, open_redis
from gateway.admission.queue import Admission, Grant, Limits, Ticket
from gateway.admission.registry import Registration, Registry, WorkerRecord

__all__ = [
    "Admission",
    "Grant",
    "Limits",
    "RedisUnsuitable",
    "Registration",
    "Registry",
    "Ticket",
    "WorkerRecord",
    "open_redis",
]
