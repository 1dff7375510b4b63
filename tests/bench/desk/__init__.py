"""Two workers in processes of their own, and a gateway of few lines that times a handoff.

`worker.py` is what runs in each process, `gateway.py` who asks them.
"""
