"""The client that comes back, against sockets that refuse, break, fall silent and go on."""

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest

from loadtest.chat import RequestRefused, StreamFailed
from loadtest.resuming import GaveUp, Resuming
from tests.support.patience import PATIENCE_SECONDS

OK = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
DONE = "data: [DONE]\n\n"
SILENCE = "silence"


def event(number: int) -> str:
    return f'id: r/{number}\ndata: {{"choices":[{{"text":"{number}"}}]}}\n\n'


def status(code: int, *headers: str) -> str:
    lines = "".join(f"{header}\r\n" for header in headers)
    return f"HTTP/1.1 {code} X\r\n{lines}Connection: close\r\nContent-Length: 0\r\n\r\n"


@contextmanager
def scripted(*answers: str) -> Iterator[tuple[str, list[str]]]:
    """A server that gives these answers in order; what it was sent goes into the list."""
    asked: list[str] = []
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:

        def serve() -> None:
            for answer in answers:
                connection, _ = listener.accept()
                with closing(connection):
                    asked.append(whole_request(connection))
                    connection.sendall(answer.removesuffix(SILENCE).encode())
                    if answer.endswith(SILENCE):
                        connection.settimeout(PATIENCE_SECONDS)
                        assert connection.recv(1) == b"", "it must hang up"

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", asked
        thread.join(PATIENCE_SECONDS)


def whole_request(connection: socket.socket) -> str:
    """Headers and body: what is left unread would reset the connection."""
    said = ""
    while "\r\n\r\n" not in said:
        said += connection.recv(65536).decode()
    end = said.index("\r\n\r\n") + 4 + int(header(said, "Content-Length") or 0)
    while len(said) < end:
        said += connection.recv(65536).decode()
    return said


def header(request: str, name: str) -> str | None:
    found = [line for line in request.split("\r\n") if line.lower().startswith(name.lower())]
    return found[0].partition(": ")[2] if found else None


def texts(client: Resuming) -> list[str]:
    return [chunk["choices"][0]["text"] for chunk in client.stream("/v1/completions", {"n": 1})]


def test_the_rest_is_asked_for_after_the_last_whole_event() -> None:
    answers = [
        status(503, "Retry-After: 0"),
        OK + event(0) + event(1) + event(2)[:20],
        OK + event(2) + SILENCE,
        OK + event(3) + 'data: {"error":{"code":"draining","message":"m"}}\n\n',
        OK + event(4) + DONE,
    ]
    with scripted(*answers) as (url, asked):
        client = Resuming([url], silence_seconds=1.0)
        assert texts(client) == ["0", "1", "2", "3", "4"]
    assert client.reconnects == 4
    last = [header(request, "Last-Event-ID") for request in asked]
    assert last == [None, None, "r/1", "r/2", "r/3"]
    assert len({header(request, "Idempotency-Key") for request in asked}) == 1


def test_a_gateway_that_is_not_there_is_passed_over() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        nowhere = f"http://127.0.0.1:{free.getsockname()[1]}"
    with scripted(OK + event(0) + DONE) as (url, _):
        assert texts(Resuming([nowhere, url])) == ["0"]


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (status(404), RequestRefused),
        (status(410), RequestRefused),
        (status(503, "x-should-retry: false"), RequestRefused),
        (OK + 'data: {"error":{"code":"taken_over","message":"m"}}\n\n', StreamFailed),
    ],
)
def test_what_asking_again_cannot_help_is_told_at_once(answer: str, error: type[Exception]) -> None:
    with scripted(answer) as (url, asked), pytest.raises(error):
        texts(Resuming([url]))
    assert len(asked) == 1


def test_it_hopes_only_so_long() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        nowhere = f"http://127.0.0.1:{free.getsockname()[1]}"
    client = Resuming([nowhere], patience_seconds=0.3)
    with pytest.raises(GaveUp, match="refused"):
        texts(client)
    assert client.reconnects > 0


def test_the_command_prints_the_text() -> None:
    chunk = 'id: r/1\ndata: {"choices":[{"delta":{"content":"Hello"}}]}\n\n'
    with scripted(status(503), OK + chunk + DONE) as (url, _):
        done = subprocess.run(
            [sys.executable, "-m", "loadtest.resuming", "--url", url, "Hi"],
            capture_output=True,
            text=True,
            timeout=2 * PATIENCE_SECONDS,
            check=True,
        )
    assert (done.stdout, done.stderr) == ("Hello\n", "(1 reconnects)\n")
