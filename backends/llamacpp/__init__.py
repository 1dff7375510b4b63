"""llama.cpp as a stepped backend: decode in it from KV that any engine computed.

The library is imported only when this backend is named. Start with `engine.py`; `cells.py` says
how the pool and llama.cpp's own memory go together, `state.py` how KV crosses between them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from backends.llamacpp.engine import LlamaCppBackend

__all__ = ["LlamaCppBackend"]


def __getattr__(name: str) -> Any:
    """Import the library only when the backend is asked for: `state` and `cells` do without."""
    if name == "LlamaCppBackend":
        from backends.llamacpp.engine import LlamaCppBackend

        return LlamaCppBackend
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
