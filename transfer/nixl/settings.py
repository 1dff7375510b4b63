"""What UCX is told before the first agent is made, unless the environment says otherwise."""

from __future__ import annotations

import os

DEFAULTS: dict[str, str] = {
    # UCX's module for EFA loads the system's libibverbs and libnl beside those of the wheel, and
    # a process with both crashes as it ends. On EFA networks set it to "all".
    "UCX_MODULES": "^efa",
    # 7, UCX's own, means "for ever" to some drivers (Soft-RoCE among them); with 6 a write to a
    # peer that is gone fails after about 13 s instead of 35 to 50. Death is noticed by the
    # session long before; this only ends the writes that were under way.
    "UCX_RC_VERBS_RETRY_COUNT": "6",
    # A peer that ends is no news to UCX's log, and the setting above is of no use without verbs.
    "UCX_LOG_LEVEL": "error",
    "UCX_WARN_UNUSED_ENV_VARS": "n",
    "NIXL_LOG_LEVEL": "WARN",
}


def apply() -> None:
    """Put the defaults into the environment; what the user has set stays."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
