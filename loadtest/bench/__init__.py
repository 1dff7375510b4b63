"""The parts of the benchmark programs: load, the servers measured, processes, figures.

Start with `client.py` (what is measured and when), then `servers.py` (what is measured against).
"""
