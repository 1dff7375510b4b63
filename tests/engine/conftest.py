"""A model for engines that compute."""

from tests.conformance.conftest import tiny

__all__ = ["tiny"]
