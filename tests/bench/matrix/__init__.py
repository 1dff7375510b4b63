"""Every engine that prefills with every engine that decodes: `python -m tests.bench.matrix`.

In float32 all of them must give the same text. As they are used (bfloat16, four bits) their
distributions are compared instead, over the same tokens. `rows.py` says which engines there are.
"""
