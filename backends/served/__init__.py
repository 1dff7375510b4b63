"""Servers that speak HTTP as a backend: existing fleets behind Baton's queue, unchanged.

Such a fleet moves KV by itself and shows none of it, so a worker in front of one has the role
`both`: every job is one in place. `engine.py` is the engine contract around it, `fleet.py` what
all fleets have in common, `http.py` how a server is spoken to; what is said is a kind's own affair
(`backends/vllm/served.py`).
"""

from backends.served.engine import ServedEngine
from backends.served.fleet import Fleet, Options, Progressed
from backends.served.http import Server

__all__ = ["Fleet", "Options", "Progressed", "ServedEngine", "Server"]
