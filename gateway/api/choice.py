"""One choice of an answer: what of its sequence can be told, and has not been told yet."""

from __future__ import annotations

from collections.abc import Sequence

from backends.protocol import FinishReason, Logprob
from gateway.api.shapes import (
    ChatLogprobs,
    CompletionLogprobs,
    Logged,
    chat_logprobs,
    completion_logprobs,
)
from gateway.api.wishes import Style, Wish
from gateway.life.job import Job
from gateway.text import Continuation, Vocabulary


class Echo:
    """A prompt that is told before its continuations, with its log probabilities if asked for."""

    def __init__(self, vocabulary: Vocabulary, style: Style, job: Job, text: str) -> None:
        self._vocabulary = vocabulary
        self._style = style
        self._prompt = job.prompt
        self.text = text
        self.logged: list[Logged] = []
        self.log(())

    def log(self, logprobs: Sequence[Logprob]) -> None:
        """Take the log probabilities of the prompt's tokens from the second on."""
        if self._style.logprobs is None:
            return
        skip = self._style.skip_special_tokens
        detokenizer = self._vocabulary.detokenizer(skip_special_tokens=skip)
        offset = 0
        self.logged = []
        for place, token in enumerate(self._prompt):
            logprob = logprobs[place - 1] if 0 < place <= len(logprobs) else None
            self.logged.append(Logged(token, logprob, offset))
            offset += len(detokenizer.push(token))


class Choice:
    """Takes one sequence's tokens. `index` is its place in the answer, over all prompts."""

    __slots__ = ("_echo", "_style", "_vocabulary", "continuation", "ids", "index", "job", "logged",
                 "parts")  # fmt: skip

    def __init__(
        self, vocabulary: Vocabulary, wish: Wish, job: Job, echo: Echo | None, index: int
    ) -> None:
        style = wish.style
        self._vocabulary = vocabulary
        self._style = style
        self._echo = echo
        self.job = job
        self.index = index
        self.continuation = Continuation(
            vocabulary.detokenizer(skip_special_tokens=style.skip_special_tokens),
            stops=style.stops,
            include_stop=style.include_stop,
            min_tokens=style.min_tokens,
        )
        self.parts: list[str] = []
        self.ids: list[int] = []
        self.logged: list[Logged] = []

    def take(self, token: int, finish: FinishReason | None, logprob: Logprob | None) -> bool:
        """The next token. True: a stop string ends the sequence here."""
        continuation = self.continuation
        offset = continuation.characters
        text = continuation.push(token, finish)
        if text:
            self.parts.append(text)
        if self._style.token_ids:
            self.ids.append(token)
        if self._style.logprobs is not None:
            before = len(self._echo.text) if self._echo else 0
            self.logged.append(Logged(token, logprob, before + offset))
        return continuation.stopped

    def begin(self) -> None:
        """Tell the prompt first, where it is to be told."""
        if self._echo is not None:
            self.parts.insert(0, self._echo.text)
            self.logged[:0] = self._echo.logged

    def score(self) -> None:
        """End without having generated anything."""
        self.continuation.finish = "length"

    def text(self) -> str:
        """What can be told now; the next call begins after it."""
        text = "".join(self.parts)
        self.parts.clear()
        return text

    def logprobs(self) -> ChatLogprobs | CompletionLogprobs | None:
        """Those of the tokens taken since the last call, in the endpoint's shape."""
        style = self._style
        if style.logprobs is None:
            return None
        logged, self.logged = self.logged, []
        if style.chat:
            return chat_logprobs(self._vocabulary, logged, style.logprobs)
        return completion_logprobs(self._vocabulary, logged, style.logprobs)

    def token_ids(self) -> list[int] | None:
        """The tokens taken since the last call, if asked for."""
        if not self._style.token_ids:
            return None
        ids, self.ids = self.ids, []
        return ids
