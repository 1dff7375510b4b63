"""Counting events and ends of responses, wherever the reads cut the bytes."""

import random

import pytest

from loadtest.bench.upstream import ANSWER, LAST_CHUNK, START, TOKEN_CHUNK, WHOLE
from loadtest.bench.wire import DONE, TOKEN, BadResponse, Head, Occurrences, Reply

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (
    len(ANSWER),
    ANSWER,
)


def cut(data, sizes):
    while data:
        size = next(sizes)
        yield data[:size]
        data = data[size:]


def random_sizes(seed, largest):
    rng = random.Random(seed)
    while True:
        yield rng.randint(1, largest)


@pytest.mark.parametrize("largest", [1, 3, 8, 40, 700])
def test_events_are_counted_however_the_stream_is_cut(largest):
    body = TOKEN_CHUNK * 30 + LAST_CHUNK
    for seed in range(20):
        counters = [Occurrences(needle) for needle in (b"\ndata: ", TOKEN, DONE)]
        head, started = Head(), False
        for piece in cut(START + body, random_sizes(seed, largest)):
            data = piece
            if not started:
                parts = head.feed(piece)
                if parts is None:
                    continue
                started, data = True, parts[1]
            for counter in counters:
                counter.feed(data)
        assert [counter.count for counter in counters] == [32, 31, 1]


def test_overlapping_borders_count_nothing_twice():
    counter = Occurrences(b"aba")
    for piece in (b"a", b"b", b"a", b"xab", b"a"):
        counter.feed(piece)
    assert counter.count == 2


@pytest.mark.parametrize("response", [WHOLE, CHUNKED])
@pytest.mark.parametrize("largest", [1, 7, 60, 2000])
def test_a_response_is_complete_with_its_last_byte_and_not_before(response, largest):
    reply = Reply()
    pieces = list(cut(response, random_sizes(largest, largest)))
    assert not any(reply.feed(piece) for piece in pieces[:-1])
    assert reply.feed(pieces[-1])


def test_an_error_response_is_no_answer():
    with pytest.raises(BadResponse, match=r"503(.|\n)*queue_full"):
        Reply().feed(b"HTTP/1.1 503 Busy\r\nContent-Length: 12\r\n\r\n queue_full ")


def test_garbage_is_no_response():
    with pytest.raises(BadResponse, match="not an HTTP response"):
        Reply().feed(b"SSH-2.0-OpenSSH\r\n\r\n")
