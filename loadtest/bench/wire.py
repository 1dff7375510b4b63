"""Just enough HTTP/1.1 and SSE to load a server without becoming the bottleneck.

Counting works on the bytes as they arrive, in one pass of `bytes.count`, so that a client spends
one or two microseconds per token. It is right for well-formed streams only; whether a server's
streams are well formed is for the tests to say, not for a benchmark.
"""

from __future__ import annotations

DONE = b"\ndata: [DONE]"
TOKEN = b'"delta":{"content":'
HEADERS_END = b"\r\n\r\n"
MAX_HEADERS_BYTES = 64 * 1024


def post(host: str, path: str, body: bytes) -> bytes:
    """A request on a connection that stays open."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


class BadResponse(Exception):
    """The server answered something else than was asked for; says what."""


class Occurrences:
    """Counts a needle in a stream of bytes, wherever the reads happen to cut it."""

    def __init__(self, needle: bytes) -> None:
        self._needle = needle
        self._border = len(needle) - 1
        self._tail = b""
        self.count = 0

    def feed(self, data: bytes) -> None:
        """Count what `data` completes."""
        needle, border = self._needle, self._border
        self.count += data.count(needle)
        # Tail and head are each shorter than the needle, so only one across the cut fits.
        if (self._tail + data[:border]).find(needle) >= 0:
            self.count += 1
        self._tail = data[-border:] if len(data) >= border else (self._tail + data)[-border:]


class Head:
    """Collects one message's headers."""

    def __init__(self) -> None:
        self._bytes = b""

    def feed(self, data: bytes) -> tuple[bytes, bytes] | None:
        """The headers and what follows them, once they are complete.

        Raises:
            BadResponse: they do not end.
        """
        self._bytes += data
        end = self._bytes.find(HEADERS_END)
        if end < 0:
            if len(self._bytes) > MAX_HEADERS_BYTES:
                raise BadResponse(f"no end of headers in {MAX_HEADERS_BYTES} bytes")
            return None
        # The rest keeps the last line break, so that a needle which begins with one is found.
        head, rest = self._bytes[: end + 2], self._bytes[end + 3 :]
        self._bytes = b""
        return head, rest


def status_of(head: bytes) -> int:
    """The status code of a response's headers.

    Raises:
        BadResponse: there is none.
    """
    words = head.split(b" ", 2)
    if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():
        raise BadResponse(f"not an HTTP response: {head[:80]!r}")
    return int(words[1])


def length_of(head: bytes) -> int | None:
    """The body's length by its headers; None when it comes in chunks.

    Raises:
        BadResponse: the length is no number.
    """
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-length":
            if not value.strip().isdigit():
                raise BadResponse(f"Content-Length is {value.strip()!r}")
            return int(value)
    return None


class Reply:
    """One whole response, its body thrown away: with a length, or in chunks."""

    def __init__(self) -> None:
        self._head = Head()
        self._left: int | None = None
        self._chunked = False
        self._tail = b"\r\n"

    def feed(self, data: bytes) -> bool:
        """True once the response is complete.

        Raises:
            BadResponse: the status is not 200, or it is no response at all.
        """
        if self._left is None and not self._chunked:
            parts = self._head.feed(data)
            if parts is None:
                return False
            head, rest = parts
            data = rest[1:]
            if status_of(head) != 200:
                raise BadResponse((head + b"\r\n" + data)[:400].decode(errors="replace"))
            self._left = length_of(head)
            self._chunked = self._left is None
        if self._left is not None:
            self._left -= len(data)
            return self._left <= 0
        self._tail = (self._tail + data)[-7:]
        return self._tail.endswith(b"\r\n0\r\n\r\n")
