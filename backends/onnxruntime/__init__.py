"""A decoder in ONNX Runtime: another engine than torch, for the same checkpoints.

Nothing is imported before it is asked for. Start with `engine.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from backends.onnxruntime.engine import OnnxRuntimeBackend

__all__ = ["OnnxRuntimeBackend"]


def __getattr__(name: str) -> Any:
    """Import the backend when it is named."""
    if name == "OnnxRuntimeBackend":
        from backends.onnxruntime.engine import OnnxRuntimeBackend

        return OnnxRuntimeBackend
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
