"""Handoffs between prefill and decode workers, with the production code of both ends.

`plot.py` says what may happen, `game.py` plays it, `workers.py` are the two ends, `wire.py` is
what lies between them and breaks, `truth.py` knows what is right without asking production code.
"""
