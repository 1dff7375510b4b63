"""How the address of a Redis is written, and what it means."""

from __future__ import annotations

from urllib.parse import parse_qs, unquote, urlsplit

import msgspec

PLAIN = ("redis://", "rediss://", "unix://")
BY_SENTINELS = ("redis+sentinel://", "rediss+sentinel://")
FORMS = "redis://, rediss://, unix:// or redis+sentinel://HOST:PORT,HOST:PORT/NAME"
SENTINEL_PORT = 26379


class Sentinels(msgspec.Struct, frozen=True, kw_only=True):
    """Who is asked for the primary called `name`. User and password are those of the servers."""

    addresses: tuple[tuple[str, int], ...]
    name: str
    database: int = 0
    username: str | None = None
    password: str | None = None
    sentinel_password: str | None = None
    tls: bool = False


def sentinels_of(url: str) -> Sentinels | None:
    """The sentinels that `url` names; None when it is the address of a server.

    `redis+sentinel://[USER:PASSWORD@]HOST:PORT[,HOST:PORT...]/NAME[?db=N&sentinel_password=...]`

    Raises:
        ValueError: it is written neither in this way nor as an ordinary address.
    """
    if url.startswith(PLAIN):
        return None
    if not url.startswith(BY_SENTINELS):
        raise ValueError(f"expected {FORMS}")
    parts = urlsplit(url)
    credentials, _, hosts = parts.netloc.rpartition("@")
    username, _, password = credentials.partition(":")
    name = unquote(parts.path.strip("/"))
    query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
    database = query.pop("db", "0")
    sentinel_password = query.pop("sentinel_password", None)
    if not (hosts and name and database.isdecimal()) or query:
        raise ValueError(f"expected {FORMS}")
    return Sentinels(
        addresses=tuple(map(_address, hosts.split(","))),
        name=name,
        database=int(database),
        username=unquote(username) or None,
        password=unquote(password) or None,
        sentinel_password=sentinel_password,
        tls=url.startswith("rediss"),
    )


def _address(text: str) -> tuple[str, int]:
    if text.startswith("["):
        host, _, port = text[1:].partition("]")
        port = port.removeprefix(":")
    else:
        host, _, port = text.partition(":")
    if not host or (port and not (port.isdecimal() and 0 < int(port) < 65536)):
        raise ValueError(f"{text!r} is no address of a sentinel: expected HOST:PORT")
    return host, int(port or SENTINEL_PORT)
