"""One end of a control connection: bytes in pieces, messages whole."""

import time
from typing import Any

import pytest

from backends.protocol import (
    LENGTH,
    MAX_FRAME_BYTES,
    Inspect,
    Link,
    Load,
    Message,
    Refused,
    ToGateway,
    Token,
    Tokens,
    frame,
)

MESSAGES: list[Message] = [
    Tokens(step=1, rows=(Token(1, 0, 0, 5),)),
    Load(free_blocks=1, pool_blocks=2, running=0, waiting=0, waiting_tokens=0),
    Tokens(step=2, rows=tuple(Token(handle, 0, 1, 6) for handle in range(300))),
    Tokens(step=3, rows=()),
]
STREAM = b"".join(frame(message) for message in MESSAGES)
TOO_LONG = LENGTH.pack(MAX_FRAME_BYTES + 1)


class Wires:
    """A transport that only notes its end."""

    aborted = False

    def abort(self) -> None:
        self.aborted = True


class End:
    """A link, and what it has heard."""

    def __init__(self) -> None:
        self.heard: list[Message] = []
        self.transport = Wires()
        self.link = Link(ToGateway, self.hear, lambda *_: None)
        self.link.connection_made(self.transport)

    def hear(self, _: Link, message: Any) -> None:
        self.heard.append(message)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 64, 1000, len(STREAM) - 1, len(STREAM)])
def test_messages_are_whole_however_the_bytes_are_cut(size: int) -> None:
    end = End()
    for at in range(0, len(STREAM), size):
        end.link.data_received(STREAM[at : at + size])
    assert end.heard == MESSAGES


def test_a_long_frame_in_many_pieces_is_not_copied_again_with_each() -> None:
    """Copying 16 MiB whenever another KiB has come takes most of a minute; once, a moment."""
    end = End()
    end.link.trust()
    wanted = Refused(handle=1, kind="full", detail="x" * (MAX_FRAME_BYTES - 100))
    stream = frame(wanted) + STREAM
    begun = time.process_time()
    for at in range(0, len(stream), 1024):
        end.link.data_received(stream[at : at + 1024])
    assert time.process_time() - begun < 5.0
    assert end.heard == [wanted, *MESSAGES]


@pytest.mark.parametrize("garbage", [TOO_LONG, frame(Inspect(ticket=1)), LENGTH.pack(1) + b"\xc1"])
def test_what_came_before_garbage_is_heard_and_nothing_after_it(garbage: bytes) -> None:
    end = End()
    end.link.data_received(STREAM + garbage + STREAM)
    end.link.data_received(STREAM)
    assert end.heard == MESSAGES
    assert end.transport.aborted


def test_nothing_is_heard_once_the_hearer_has_ended_the_connection() -> None:
    end = End()
    end.link.message = lambda link, message: (end.hear(link, message), link.abort("enough"))
    end.link.data_received(STREAM)
    end.link.data_received(STREAM)
    assert end.heard == MESSAGES[:1]


def test_a_new_hearer_hears_from_the_next_message_on() -> None:
    end, later = End(), End()

    def greeted(link: Link, message: Any) -> None:
        end.hear(link, message)
        link.message = later.hear

    end.link.message = greeted
    end.link.data_received(STREAM)
    assert end.heard + later.heard == MESSAGES
    assert len(end.heard) == 1
