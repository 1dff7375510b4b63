"""TLS between our processes: each side shows a certificate that their own authority has signed.

Host names are not compared: whoever holds a certificate of that authority is one of us. Which
worker it is, the landing's secret says, or on a control connection its greeting.
"""

from __future__ import annotations

import ssl
from pathlib import Path

import msgspec


class Credentials(msgspec.Struct, frozen=True):
    """Files in PEM form: our certificate, its key, and the authority that signs ours."""

    certificate: Path
    key: Path
    authority: Path

    def server(self) -> ssl.SSLContext:
        """For whoever listens. Whoever connects must show a certificate.

        Raises:
            OSError: a file cannot be read, or does not hold what it should.
        """
        return self._loaded(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))

    def client(self) -> ssl.SSLContext:
        """For whoever connects; raises as `server`."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        return self._loaded(context)

    def _loaded(self, context: ssl.SSLContext) -> ssl.SSLContext:
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_cert_chain(self.certificate, self.key)
        context.load_verify_locations(self.authority)
        return context
