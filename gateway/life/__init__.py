"""One request's life between its grant and its last token.

`states.py` has the table, `job.py` the nouns and the listener's contract, `fleet.py` the
connections to workers, `placement.py` the choice among them, `relay.py` the run itself.
"""
