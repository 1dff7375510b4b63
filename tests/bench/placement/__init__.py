"""How many requests meet their targets: Baton's queueing and placement beside the usual ones.

A simulation in virtual time. `shapes.py` has the traffic, `hardware.py` what workers and links
take, `orders.py` the queues, `site.py` puts them together. What decides is the code of
`gateway.placement` itself; the queue, which is Lua in Redis, and the workers are modelled.
Run it with `python -m tests.bench.placement`.
"""
