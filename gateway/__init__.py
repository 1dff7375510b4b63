"""The control plane: HTTP, queue, placement, one request's life, and the command line.

A request flows one way: `api/` reads it, `text/` makes tokens of it, `admission/` gives it its
turn, `life/` takes it through a prefill and a decode worker, and back out through `text/` and
`api/`. This package knows workers only through the messages of `backends.protocol`; it never
sees a byte of KV. Only `cli/` starts workers.
"""
