"""The plain client of the load test, against real sockets that answer by the book or not."""

import random
import socket
import threading
from contextlib import closing, contextmanager, suppress

import pytest

from loadtest.chat import RequestRefused, Server, StreamCut, StreamFailed, deltas
from loadtest.lengths import Lengths
from loadtest.sse import BadStream, Events

TEXT = 'data: {"choices":[{"index":0,"delta":{"content":"%s"},"finish_reason":%s}]}\n\n'
OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"


@contextmanager
def answering(response, hold_open=None):
    """A server that gives one prepared answer, and keeps the connection until `hold_open`."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:

        def serve():
            connection, _ = listener.accept()
            with closing(connection):
                connection.recv(65536)
                connection.sendall(response)
                if hold_open is not None:
                    hold_open.wait(10)
                # A request that was not read to its end would make this close a reset.
                connection.shutdown(socket.SHUT_WR)
                connection.settimeout(10)
                with suppress(ConnectionError):
                    while connection.recv(65536):
                        pass

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield Server(f"http://127.0.0.1:{listener.getsockname()[1]}", "", 5.0)
        finally:
            thread.join(10)


def chat(server):
    with closing(server.connect()) as connection:
        yield from deltas(server.ask(connection, "POST", "/v1/chat/completions", {}))


def test_text_comes_out_in_order_and_ends_with_done():
    body = TEXT % ("a", "null") + ": comment\n\n" + TEXT % ("é", '"stop"') + "data: [DONE]\n\n"
    with answering(OK + body.encode()) as server:
        assert list(chat(server)) == ["a", "é"]


def test_the_first_token_is_seen_while_the_stream_is_open():
    seen = threading.Event()
    with answering(OK + (TEXT % ("a", "null")).encode(), hold_open=seen) as server:
        pieces = chat(server)
        try:
            assert next(pieces) == "a"
        finally:
            seen.set()
            pieces.close()


def test_a_stream_without_its_end_was_cut():
    with answering(OK + (TEXT % ("a", "null")).encode()) as server, pytest.raises(StreamCut):
        list(chat(server))


def test_an_end_without_a_finish_reason_was_cut():
    body = TEXT % ("a", "null") + "data: [DONE]\n\n"
    with answering(OK + body.encode()) as server, pytest.raises(StreamCut, match="finish_reason"):
        list(chat(server))


def test_an_error_inside_the_stream_has_its_code():
    body = 'data: {"error":{"message":"gone","code":"worker_failed"}}\n\n'
    with answering(OK + body.encode()) as server, pytest.raises(StreamFailed, match="worker_fail"):
        list(chat(server))


def test_a_refused_request_has_its_status_and_code():
    body = b'{"error":{"message":"wait","code":"queue_full"}}'
    head = b"HTTP/1.1 503 Busy\r\nContent-Length: %d\r\n\r\n" % len(body)
    with answering(head + body) as server, pytest.raises(RequestRefused, match="503 queue_full"):
        list(chat(server))


def test_events_may_be_cut_anywhere():
    text = "id: 1\r\ndata: one\r\n\r\n: note\n\ndata: two\ndata: lines\n\ndata: ü\n\n".encode()
    for size in range(1, len(text)):
        parser = Events()
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        assert [e for piece in pieces for e in parser.feed(piece)] == ["one", "two\nlines", "ü"]


def test_an_endless_event_is_refused():
    pieces = [b"data: ", *([b"x" * 1000] * 2000)]
    parser = Events()
    with pytest.raises(BadStream, match="exceeds"):
        [list(parser.feed(piece)) for piece in pieces]


@pytest.mark.parametrize(
    ("text", "low", "high", "mean"),
    [
        ("fixed:7", 7, 7, 7),
        ("uniform:10:20", 10, 20, 15),
        ("exponential:50", 1, 2000, 50),
        ("lognormal:100:0.5", 1, 3000, 113),
    ],
)
def test_lengths_follow_their_distribution(text, low, high, mean):
    rng = random.Random(3)
    lengths = Lengths(text)
    drawn = [lengths.draw(rng) for _ in range(4000)]
    assert low <= min(drawn)
    assert max(drawn) <= high
    assert sum(drawn) / len(drawn) == pytest.approx(mean, rel=0.1)
    again = random.Random(3)
    assert drawn[:50] == [lengths.draw(again) for _ in range(50)]


@pytest.mark.parametrize(
    "text", ["", "fixed", "fixed:x", "fixed:0", "uniform:3", "zipf:2", "fixed:nan"]
)
def test_a_distribution_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match=r"expected|number|float"):
        Lengths(text)
