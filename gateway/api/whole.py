"""Answer in one piece, when all of it is there."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from backends.protocol import FinishReason, Logprob
from gateway.api.carrying import carry_all, check_finished
from gateway.api.choice import Choice, Echo
from gateway.api.service import Service
from gateway.api.shapes import (
    AnswerMessage,
    ChatAnswer,
    ChatChoice,
    ChatLogprobs,
    CompletionAnswer,
    CompletionChoice,
    CompletionLogprobs,
    Usage,
    usage_of,
)
from gateway.api.tally import Tally
from gateway.api.wishes import Wish
from gateway.life.job import Take


class WholeListener:
    """Collects what one prompt's sequences say."""

    def __init__(
        self, wish: Wish, choices: Sequence[Choice], echo: Echo | None, tally: Tally
    ) -> None:
        self._score_only = wish.score_only
        self._choices = choices
        self._echo = echo
        self._tally = tally

    def sequence(self, index: int) -> Take:
        choice = self._choices[index]

        def take(token: int, finish: FinishReason | None, logprob: Logprob | None) -> bool:
            self._tally.first()
            if self._score_only:
                choice.score()
                return True
            return choice.take(token, finish, logprob)

        return take

    def prompt_logprobs(self, logprobs: tuple[Logprob, ...]) -> None:
        if self._echo is not None:
            self._echo.log(logprobs)


async def answer_whole(service: Service, wish: Wish, tally: Tally) -> bytes:
    """The body of the answer.

    Raises:
        GatewayError: it could not be made.
    """
    choices: list[Choice] = []
    listeners = []
    for number, job in enumerate(wish.jobs):
        echo = Echo(service.text, wish.style, job, wish.texts[number]) if wish.texts else None
        own = [
            Choice(service.text, wish, job, echo, number * wish.n + place)
            for place in range(wish.n)
        ]
        choices += own
        listeners.append((job, WholeListener(wish, own, echo, tally)))
    tally.count = lambda: sum(choice.continuation.count for choice in choices)
    await carry_all(service.carrier, listeners, tally)
    check_finished(choices, tally)
    for choice in choices:
        choice.begin()
    usage = usage_of(wish.prompt_tokens, tally.count(), tally.cached_tokens)
    make = _chat if wish.style.chat else _completion
    return make(wish, choices, usage)


def _completion(wish: Wish, choices: Sequence[Choice], usage: Usage) -> bytes:
    told = []
    for choice in choices:
        logprobs = choice.logprobs()
        assert logprobs is None or isinstance(logprobs, CompletionLogprobs)
        told.append(
            CompletionChoice(
                index=choice.index,
                text=choice.text(),
                logprobs=logprobs,
                finish_reason=choice.continuation.finish or "",
                token_ids=choice.token_ids(),
                prompt_token_ids=choice.job.prompt if wish.style.token_ids else None,
            )
        )
    return msgspec.json.encode(
        CompletionAnswer(
            id=wish.id,
            object="text_completion",
            created=wish.created,
            model=wish.model,
            choices=told,
            usage=usage,
        )
    )


def _chat(wish: Wish, choices: Sequence[Choice], usage: Usage) -> bytes:
    told = []
    for choice in choices:
        logprobs = choice.logprobs()
        assert logprobs is None or isinstance(logprobs, ChatLogprobs)
        told.append(
            ChatChoice(
                index=choice.index,
                message=AnswerMessage(role="assistant", content=choice.text(), refusal=None),
                logprobs=logprobs,
                finish_reason=choice.continuation.finish or "",
                token_ids=choice.token_ids(),
            )
        )
    return msgspec.json.encode(
        ChatAnswer(
            id=wish.id,
            object="chat.completion",
            created=wish.created,
            model=wish.model,
            choices=told,
            usage=usage,
            prompt_token_ids=wish.jobs[0].prompt if wish.style.token_ids else None,
        )
    )
