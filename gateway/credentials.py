"""The files by which gateways and workers know each other, as the configuration names them."""

from __future__ import annotations

from pathlib import Path

from gateway.config import Config
from transfer.tls import Credentials


def credentials_of(config: Config) -> Credentials | None:
    """None where nothing is encrypted."""
    security = config.security
    if not security.tls_certificate:
        return None
    return Credentials(
        certificate=Path(security.tls_certificate),
        key=Path(security.tls_key),
        authority=Path(security.tls_authority),
    )
