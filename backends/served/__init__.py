"""Servers that speak HTTP as a backend: existing fleets behind Baton's queue, unchanged.

Such a fleet moves KV by itself and shows none of it, so a worker in front of one has the role
`both`: every job is one in place. `engine.py` is the engine contract around it, `http.py` how a
server is spoken to; what is said is an engine's own affair (`backends/vllm/served.py`).
"""

from backends.served.engine import Fleet, Progressed, ServedEngine
from backends.served.http import Server

__all__ = ["Fleet", "Progressed", "ServedEngine", "Server"]
