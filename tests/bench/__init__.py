"""Benchmark programs: each prints what was measured beside its reference in the same run.

`engine.py` measures the transformer alone; `contenders.py` is what it is measured against.
`handoff.py` says where a handoff's time goes, `overhead.py` what it costs beyond its bytes,
`layerwise.py` what is hidden behind computation, `transfer/` how fast the bytes move.
"""
