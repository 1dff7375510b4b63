"""A whole deployment in real processes, under load, while its parts are killed and stopped.

`site.py` has the processes, `clients.py` those who ask and what they must hear, `faults.py` what
is done to whom and when, `play.py` the run. `python -m tests.storm` is `make chaos`.
"""
