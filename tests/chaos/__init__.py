"""A seeded fault machine: real code under a virtual clock, and everything that can go wrong.

The machine knows clock (`clock.py`), schedules of faults (`schedule.py`), what has been covered
(`coverage.py`) and how to run, shrink and report (`machine.py`). It knows nothing of what is
played: that is a `Scenario`. `handoffs/` plays prefixes on their way between workers, `control/`
requests on their way through gateways, queue and workers.

    python -m tests.chaos control --seed 4711        # replay one schedule, step by step
    python -m tests.chaos handoffs --count 100000    # what `make soak` does
"""
