"""One request's life between its grant and its last token.

`states.py` has the table, `job.py` the nouns and the listener's contract, `worker.py` the
connection to one worker, `pairs.py` who has met whom, `breakers.py` who is left alone for a while,
`fleet.py` all of them, `relay.py` the run itself. The choice among workers is `gateway.placement`.
"""
