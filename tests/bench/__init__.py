"""Benchmark programs: each prints what was measured beside its reference in the same run.

`engine.py` measures the transformer alone; `contenders.py` is what it is measured against.
`handoff.py` says where a handoff's time goes, `transfer/` how fast its bytes move.
"""
