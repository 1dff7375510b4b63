"""The HTTP side: OpenAI's API in front of a carrier.

A request is read (`body.py`, `schema.py`), checked (`checks.py`, `messages.py`, `wishes.py`),
carried, and answered in one piece (`whole.py`) or as it comes (`stream.py`, `wire.py`). Everything
that ends badly becomes an answer in `errors.py`. This package knows workers only through the
`Carrier` of `gateway.life.job`.

Start with `app.py`.
"""

from gateway.api.app import build_app
from gateway.api.service import Observe, Service

__all__ = ["Observe", "Service", "build_app"]
