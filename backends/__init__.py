"""Compute: the contracts that a plug-in fulfils, the worker that hosts it, and the engines.

A plug-in author reads `api.py` and nothing else. `protocol/` holds the messages between a
gateway and a worker, `host/` the worker itself; each other folder is one engine. This package
knows tokens, blocks and steps. It knows neither Redis nor HTTP, and nothing of `gateway`.
"""
