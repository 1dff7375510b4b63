"""Who may start: a queue in Redis that all gateways share, and the workers that they know.

This package knows tickets, leases, tenants' shares and credits in tokens. It does not know HTTP,
prompts or how a request is carried out. Start with `queue.py`; what must be atomic is in the
`.lua` files, of which `book.lua` is the first.
"""

from gateway.admission.client import RedisUnsuitable, open_redis
from gateway.admission.queue import Admission
from gateway.admission.registry import Registration, Registry, WorkerRecord
from gateway.admission.ticket import Limits, Terms, Ticket
from gateway.admission.turn import Grant

__all__ = [
    "Admission",
    "Grant",
    "Limits",
    "RedisUnsuitable",
    "Registration",
    "Registry",
    "Terms",
    "Ticket",
    "WorkerRecord",
    "open_redis",
]
