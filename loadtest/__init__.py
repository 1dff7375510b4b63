"""Traffic from outside: locust users, and benchmarks that print an answer.

Everything here speaks HTTP to a running server, ours or another. The one exception is
`bench/worker.py`, a load generator at the other end: it plays a worker on the control connection.
Start with `README.md`.
"""
