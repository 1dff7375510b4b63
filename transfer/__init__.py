"""Move a finished KV cache from the worker that computed it to the worker that needs it.

This package knows blocks, layouts, landings and peers. It does not know what a request,
a prompt or an HTTP status is, and it imports nothing from `backends` or `gateway`.

Start with `layout.py` (the nouns), then `contract.py` (what a transport promises).
"""
