"""What `generate_async` gives: an answer that may be awaited, iterated, waited for, or aborted."""

import asyncio
import queue
from dataclasses import dataclass, field


@dataclass(slots=True)
class Logprob:
    logprob: float
    rank: int | None = None


@dataclass(slots=True)
class CompletionOutput:
    index: int
    text: str = ""
    token_ids: list = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list = field(default_factory=list)
    prompt_logprobs: list = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    generation_logits: object = None
    disaggregated_params: object = None

    @property
    def length(self):
        return len(self.token_ids)


class GenerationResult:
    """Made inside a running event loop it can be awaited there, otherwise only waited for."""

    def __init__(self, request_id, prompt_token_ids, abort):
        self.request_id = request_id
        self.prompt_token_ids = prompt_token_ids
        self.prompt = None
        self.outputs = [CompletionOutput(0)]
        self.context_logits = None
        self.finished = False
        self._abort, self._aborted = abort, False
        self._queue = queue.SimpleQueue()
        try:
            self._loop = asyncio.get_running_loop()
        except RuntimeError:
            self._loop = None
        self._event = asyncio.Event() if self._loop else None

    def put(self, answer):
        """Called from another thread, once."""
        self._queue.put(answer)
        if self._loop is not None:
            try:
                self._loop.call_soon_threadsafe(self._event.set)
            except RuntimeError:  # its loop has ended
                return

    def abort(self):
        self._abort(self.request_id)
        self._aborted = True

    def aborted(self):
        return self._aborted

    def result(self, timeout=None):
        if not self.finished:
            self._take(self._queue.get(timeout=timeout))
        return self

    async def aresult(self):
        if self._loop is None:
            raise RuntimeError("made outside of an event loop")
        await self._event.wait()
        if not self.finished:
            self._take(self._queue.get_nowait())
        return self

    def __await__(self):
        return self.aresult().__await__()

    def __aiter__(self):
        return self

    async def __anext__(self):
        if self.finished:
            raise StopAsyncIteration
        return await self.aresult()

    def _take(self, answer):
        self.finished = True
        if isinstance(answer, BaseException):
            raise answer
        tokens, reason = answer
        self.outputs[0].token_ids = tokens
        self.outputs[0].finish_reason = reason


class RequestOutput(GenerationResult):
    pass
