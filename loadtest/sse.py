"""Read server-sent events as they arrive, whole or in pieces."""

from __future__ import annotations

from collections.abc import Iterator

MAX_EVENT_BYTES = 1 << 20


class BadStream(Exception):
    """The server's event stream cannot be read; says why."""


class Events:
    """Cuts bytes into the data of complete events; comments and other fields are skipped.

    `last_id` is the id of the event that was yielded last, or of one before it if it has none.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[str] = []
        self._id = self.last_id = ""

    def feed(self, piece: bytes) -> Iterator[str]:
        """The data of each event that ends in `piece`.

        Raises:
            BadStream: an event does not end, or is no UTF-8.
        """
        *lines, self._rest = (self._rest + piece).split(b"\n")
        if len(self._rest) + sum(map(len, self._data)) > MAX_EVENT_BYTES:
            raise BadStream(f"an event exceeds {MAX_EVENT_BYTES} bytes")
        for line in lines:
            field, _, value = line.removesuffix(b"\r").partition(b":")
            if field == b"data":
                self._data.append(_text(value.removeprefix(b" ")))
            elif field == b"id":
                self._id = _text(value.removeprefix(b" "))
            elif not field and not value and self._data:
                self.last_id = self._id
                yield "\n".join(self._data)
                self._data = []


def _text(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise BadStream(f"an event is no UTF-8: {error}") from error
