"""Answer as it comes: a token, a chunk, a write.

The path of a token is synchronous: the carrier calls `StreamedChoice.token`, which usually finds
the token's text as ready JSON and writes one chunk of three prebuilt parts. Whatever is not
usual (the first token, half characters, stop strings, log probabilities, a client that is
behind, the end) goes through `StreamedChoice.take`, which then decides whether the next token may
take the short way.

A companion task of each stream sends the headers, at the first token or when it takes long, and
waits for clients that are behind. Such a client's text is first held and sent as one chunk once
it has caught up, then its sequences are paused, then it is disconnected.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import structlog
from aiohttp import web

from backends.protocol import FinishReason, Logprob
from gateway.api.carrying import carry_all, check_finished, first_failure
from gateway.api.choice import Choice, Echo
from gateway.api.chunks import DONE, Chunks, encode, error_event
from gateway.api.errors import answer_for, error_json, internal_error
from gateway.api.progress import Marks, Told
from gateway.api.service import Service
from gateway.api.shapes import usage_of
from gateway.api.tally import CLIENT_LEFT, Tally
from gateway.api.wire import COMMENT, Wire
from gateway.api.wishes import Wish
from gateway.errors import GatewayError, SlowClient
from gateway.life.job import Job, Take

log = structlog.get_logger()

HELD_TOKENS = 64
NOTHING: Mapping[int, bytes] = {}


class SizeLines(dict[int, bytes]):
    """What HTTP wants before a chunk of so many bytes. There are as many as lengths of chunks."""

    def __missing__(self, size: int) -> bytes:
        self[size] = line = b"%x\r\n" % size
        return line


SIZE_LINES = SizeLines()


class StreamedChoice(Choice):
    """A choice whose text leaves as soon as it may.

    `_fast` has the JSON of the tokens that may take the short way now: all that stand for
    themselves, or none. A chunk on that way is the line with its size, what comes before the text,
    that JSON, and what comes after it; only the JSON is not known before.
    """

    __slots__ = (
        "_around",
        "_begun",
        "_ending",
        "_fast",
        "_opening",
        "_plain",
        "_protocol",
        "_quoted",
        "_stream",
        "_told",
        "_write",
        "place",
    )

    def __init__(self, stream: Stream, job: Job, echo: Echo | None, place: int, index: int) -> None:
        super().__init__(stream.vocabulary, stream.wish, job, echo, index)
        style = stream.wish.style
        self._stream = stream
        self._protocol = stream.wire.protocol
        self._write = stream.wire.write
        self._begun = False
        self._told = False
        self._quoted = stream.vocabulary.quoted(skip_special_tokens=style.skip_special_tokens)
        self._plain = stream.wire.chunked and not (
            style.stops or style.logprobs is not None or style.token_ids or style.running_usage
        )
        opening, closing = stream.chunks.opening(index), stream.chunks.closing
        self._opening, self._ending = opening, closing + b"\r\n"
        self._around = len(opening) + len(closing)
        self.place = place
        self._fast = NOTHING

    @property
    def finished(self) -> bool:
        """Whether its last chunk was written."""
        return self._told

    @property
    def mark(self) -> Told:
        """How much of it is told, up to the event that is about to be sent."""
        return Told(self.continuation.count, self._begun, self._told)

    def token(self, token: int, finish: FinishReason | None, logprob: Logprob | None) -> bool:
        """The next token, the short way if it may."""
        quoted = self._fast.get(token)
        if quoted is None or finish is not None or self._protocol.writing_paused:
            return self.take(token, finish, logprob)
        self.continuation.count += 1
        size = SIZE_LINES[self._around + len(quoted)]
        self._write(b"".join((size, self._opening, quoted, self._ending)))
        return False

    def take(self, token: int, finish: FinishReason | None, logprob: Logprob | None) -> bool:
        stream = self._stream
        if stream.wish.score_only:
            self.score()
            stopped = True
        else:
            stopped = super().take(token, finish, logprob)
        if stream.wire.congested:
            self._fast = NOTHING
            stream.hold()
        else:
            self.flush()
        return stopped

    def flush(self) -> None:
        """Write what there is as one piece, and see whether the next token may be short."""
        if self._told:
            return
        events = b"" if self._begun else self._marked(self._beginning(), 0)
        stream, text, finish = self._stream, self.text(), self.continuation.finish
        if text:
            usage = stream.usage_field()
            chunk = stream.chunks.text(self.index, text, self._extra(), usage)
            events += self._marked(chunk, self.continuation.count)
        if finish is not None:
            self._told = True
            usage = stream.usage_field()
            chunk = stream.chunks.finish(self.index, finish, self._extra(), usage)
            events += self._marked(chunk, self.continuation.count)
        if events:
            stream.send(events)
        self._write = stream.wire.write
        short = self._plain and stream.wire.opened and not self._told
        whole = not self.continuation.detokenizer.pending
        self._fast = self._quoted if short and whole else NOTHING

    def _marked(self, event: bytes, tokens: int) -> bytes:
        """`event`, which tells of `tokens` tokens all that can be told, as it is sent."""
        return event

    def _beginning(self) -> bytes:
        self._begun = True
        self.begin()
        style = self._stream.wish.style
        prompt = self.job.prompt if style.token_ids else None
        if style.chat:
            return self._stream.chunks.role(self.index, prompt, self._stream.usage_field())
        if prompt is None:
            return b""
        extra = b',"prompt_token_ids":' + encode(prompt)
        return self._stream.chunks.text(self.index, "", extra, self._stream.usage_field())

    def _extra(self) -> bytes:
        """Members of the choice beside its text: what came with the tokens since the last chunk."""
        extra = b""
        if self.logged:
            extra += b',"logprobs":' + encode(self.logprobs())
        if self.ids:
            extra += b',"token_ids":' + encode(self.token_ids())
        return extra


class ResumableChoice(StreamedChoice):
    """A choice whose events bear ids. What its client has already is taken in silence."""

    __slots__ = ("_tokens", "_until")

    def __init__(self, stream: Stream, job: Job, echo: Echo | None, place: int, index: int) -> None:
        super().__init__(stream, job, echo, place, index)
        told = stream.wish.progress.of(index)
        self._until = self._tokens = told.tokens
        self._begun, self._told = told.begun, told.ended
        self._plain = False

    @property
    def mark(self) -> Told:
        return Told(self._tokens, self._begun, self._told)

    def take(self, token: int, finish: FinishReason | None, logprob: Logprob | None) -> bool:
        if self.continuation.count >= self._until:
            return super().take(token, finish, logprob)
        stopped = Choice.take(self, token, finish, logprob)
        self.text()
        self.logged.clear()
        self.ids.clear()
        if self.continuation.finish is not None:
            self.flush()
        return stopped

    def _marked(self, event: bytes, tokens: int) -> bytes:
        if not event:
            return event
        self._tokens = max(self._tokens, tokens)
        return self._stream.marks.line() + event


class StreamListener:
    """Takes one prompt's tokens to the wire."""

    __slots__ = ("_choices", "_echo")

    def __init__(self, choices: Sequence[StreamedChoice], echo: Echo | None) -> None:
        self._choices = choices
        self._echo = echo

    def sequence(self, index: int) -> Take:
        return self._choices[index].token

    def prompt_logprobs(self, logprobs: tuple[Logprob, ...]) -> None:
        if self._echo is not None:
            self._echo.log(logprobs)


class Stream:
    """One streamed answer, from its first event to its last."""

    def __init__(self, service: Service, wish: Wish, request: web.Request, tally: Tally) -> None:
        self._service = service
        self._tally = tally
        self._first = asyncio.Event()
        self._behind = asyncio.Event()
        self._held = 0
        self._paused = False
        self._over = False
        self.vocabulary = service.text
        self.wish = wish
        self.wire = Wire(request)
        self.chunks = Chunks(wish)
        self.choices: list[StreamedChoice] = []
        self.marks = Marks(wish.claim.id if wish.claim is not None else "", self.choices)
        tally.count = self._count

    async def run(self) -> web.StreamResponse:
        """Stream the answer.

        Raises:
            GatewayError: it failed before the headers were out; afterwards the stream tells.
        """
        failure: GatewayError | None = None
        left = False
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._accompany())
                await carry_all(self._service.carrier, self._listeners(), self._tally)
                check_finished(self.choices, self._tally)
                self._over = True
                self._first.set()
                self._behind.set()
        except* ConnectionError:
            left = True
        except* GatewayError as group:
            failure = first_failure(group)
        except* Exception:  # a bug: it belongs to the edge, unless only this stream can tell of it
            if not self.wire.opened:
                raise
            log.exception("request.broke")
            failure = internal_error()
        if left:
            return self.wire.response
        if failure is None:
            return await self._finish()
        if not self.wire.opened:
            raise failure
        return await self._break_off(failure)

    def hold(self) -> None:
        """A token waits because the client is behind."""
        self._held += 1
        self._behind.set()
        if self._held >= HELD_TOKENS and not self._paused:
            self._pause(True)

    def send(self, events: bytes) -> None:
        """Write events; the first one has the headers sent."""
        if not self._first.is_set():
            self._tally.first()
            self._first.set()
        self.wire.send(events)

    def usage_field(self) -> bytes:
        """The end of a chunk, with the usage so far if that was asked for."""
        if not self.wish.style.running_usage:
            return self.chunks.usage
        return b',"usage":' + encode(usage_of(self.wish.prompt_tokens, self._count())) + b"}\n\n"

    def _listeners(self) -> list[tuple[Job, StreamListener]]:
        wish, listeners = self.wish, []
        make = StreamedChoice if wish.claim is None else ResumableChoice
        for number, job in enumerate(wish.jobs):
            echo = (
                Echo(self.vocabulary, wish.style, job, wish.texts[number]) if wish.texts else None
            )
            first = number * wish.n
            own = [make(self, job, echo, place, first + place) for place in range(wish.n)]
            self.choices += own
            listeners.append((job, StreamListener(own, echo)))
        return listeners

    async def _accompany(self) -> None:
        await self._open_in_time()
        while self._held or not self._over:
            await self._behind.wait()
            self._behind.clear()
            if self.wire.congested:
                await self.wire.drained(self._service.slow_client_seconds)
            self._release()

    async def _open_in_time(self) -> None:
        """Send the headers at the first event, or when it is late; then show signs of life."""
        await self._first_within(self._service.keep_alive_seconds)
        await self.wire.open()
        while not await self._first_within(self._service.keep_alive_seconds):
            self.wire.send(COMMENT)

    async def _first_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await self._first.wait()
        except TimeoutError:
            return False
        return True

    def _release(self) -> None:
        """The client has caught up: it gets what was held, and its sequences go on."""
        self._held = 0
        for choice in self.choices:
            choice.flush()
        if self._paused:
            self._pause(False)

    def _pause(self, paused: bool) -> None:
        self._paused = paused
        for choice in self.choices:
            if not choice.finished:
                self._service.carrier.pause(choice.job, choice.place, paused)

    def _count(self) -> int:
        return sum(choice.continuation.count for choice in self.choices)

    async def _finish(self) -> web.StreamResponse:
        tail = DONE
        if self.wish.style.usage and not self.wish.progress.usage:
            cached = self._tally.cached_tokens
            usage = usage_of(self.wish.prompt_tokens, self._count(), cached)
            tail = self.chunks.summary(usage) + DONE
            if self.wish.claim is not None:
                tail = self.marks.line("+\n") + tail
        self._tally.status = 200
        return await self._close(tail)

    async def _break_off(self, failure: GatewayError) -> web.StreamResponse:
        """The headers are out: the failure is the last event, and no finish was told."""
        answer = answer_for(failure)
        self._tally.status = answer.status
        if self.wish.claim is not None:
            self.wish.claim.failed(failure, told=True)
        log.warning("request.failed", code=answer.code, error=str(failure))
        if isinstance(failure, SlowClient):
            return self.wire.response
        self.wire.response.force_close()
        return await self._close(error_event(error_json(failure)))

    async def _close(self, tail: bytes) -> web.StreamResponse:
        self.wire.send(tail)
        try:
            await self.wire.close(self._service.slow_client_seconds)
        except SlowClient as error:
            self._tally.status = answer_for(error).status
            log.warning("request.failed", code="slow_client", error=str(error))
        except ConnectionError:
            self._tally.status = CLIENT_LEFT
        return self.wire.response
