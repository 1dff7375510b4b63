"""An authority and a worker's certificate, made on the spot."""

import subprocess

from transfer.tls import Credentials


def openssl(*arguments):
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


def authority(folder):
    openssl(
        *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
        *("-days", "1", "-subj", "/CN=workers", "-keyout", folder / "ca.key"),
        *("-out", folder / "ca.pem"),
    )
    openssl(
        *("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
        *("-subj", "/CN=worker", "-keyout", folder / "key.pem", "-out", folder / "request.pem"),
    )
    openssl(
        *("x509", "-req", "-days", "1", "-in", folder / "request.pem", "-CA", folder / "ca.pem"),
        *("-CAkey", folder / "ca.key", "-CAcreateserial", "-out", folder / "cert.pem"),
    )
    return Credentials(folder / "cert.pem", folder / "key.pem", folder / "ca.pem")
