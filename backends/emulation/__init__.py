"""Engines that run where the accelerator is not: a torch transformer, and synthetic tokens.

This folder is the only one of ours that imports torch, and `synthetic` does without even that,
so nothing is imported before it is asked for. Start with `engine.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from backends.emulation.engine import EmulationBackend
    from backends.emulation.synthetic import SyntheticBackend

__all__ = ["EmulationBackend", "SyntheticBackend"]


def __getattr__(name: str) -> Any:
    """Import the one backend that was named, and nothing else."""
    if name == "EmulationBackend":
        from backends.emulation.engine import EmulationBackend

        return EmulationBackend
    if name == "SyntheticBackend":
        from backends.emulation.synthetic import SyntheticBackend

        return SyntheticBackend
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
