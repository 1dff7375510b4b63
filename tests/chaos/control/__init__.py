"""The whole control plane of several processes, with the production code of each.

Two gateways (queue, registry, fleet, relay), two prefill and two decode workers (the host around a
tiny exact backend) and a Redis. `plot.py` says what may happen, `game.py` plays it, `processes.py`
are the processes, `network.py` lies between them, `world.py` is their time; `redis_*` stand in
for Redis, `backend.py` and `transport.py` for accelerators and data plane.
"""
