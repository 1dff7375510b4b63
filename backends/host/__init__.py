"""The worker: it hosts one backend and keeps every promise that a plug-in need not know.

`worker.py` puts the parts together and answers messages; `ledger.py` knows who holds which
block; `steps.py` runs the backend; `landings.py` is the receiving end of handoffs, `handoff.py`
the sending end; `reuse.py` keeps KV for later prefixes. Everything but the backend's step, and
looking at what is kept, runs on the event loop.
"""

from backends.host.config import HostConfig
from backends.host.plugins import load_backend, requires
from backends.host.worker import WorkerHost

__all__ = ["HostConfig", "WorkerHost", "load_backend", "requires"]
