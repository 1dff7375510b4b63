"""Which release is played."""

import os

FLAVOUR = os.environ.get("TLLM_STANDIN", "1.3")
if FLAVOUR not in ("1.2", "1.3", "main"):
    raise ImportError(f"TLLM_STANDIN: there is no flavour {FLAVOUR!r}")

LACKING = frozenset(os.environ.get("TLLM_STANDIN_LACKS", "").split())
"""Names that the release is made to lack besides, to see what is done without them."""


def since(flavour):
    """Whether the release that is played has what `flavour` brought."""
    order = ("1.2", "1.3", "main")
    return order.index(FLAVOUR) >= order.index(flavour)
