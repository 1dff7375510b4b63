"""Prefill on TensorRT-LLM: its KV leaves through a KV-cache connector of our own.

Two sides of a Unix socket. Inside the library's ranks, which are other processes: `connector.py`
(the classes that the library calls), `scheduling.py` (which blocks are final after a pass, on
rank 0) and `exporting.py` (the thread that copies them into the arena). Around the library, in
the worker: `engine.py` (the plug-in), `desk.py` (the other end of the socket), `carrying.py` (one
job, from prompt to the last free block). `messages.py` is what they say to each other; `probe.py`
looks at what the installed release can do; `geometry.py` turns what it registers into a layout.

Only `connector.py` and what `engine.py` starts import the library. Start with `engine.py`.
"""
