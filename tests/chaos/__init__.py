"""A seeded fault machine: real code under a virtual clock, and everything that can go wrong.

The machine knows clock (`clock.py`), schedules of faults (`schedule.py`), what has been covered
(`coverage.py`) and how to run, shrink and report (`machine.py`). It knows nothing of what is
played: that is a `Scenario`. `handoffs/` is the first: prefixes on their way between workers.

    python -m tests.chaos --seed 4711        # replay one schedule, step by step
    python -m tests.chaos --count 100000     # what `make soak` does
"""
