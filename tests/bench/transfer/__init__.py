"""How fast KV moves between two processes, beside what the machine could do. `make bench-transfer`.

`cases.py` says what is moved, `contenders.py` who moves it, `aims.py` what is wanted of Baton.
`pair.py` starts a contender's two processes, `side.py` is what runs in each; the other modules
are the contenders' two halves. Start with `__main__.py`.
"""
