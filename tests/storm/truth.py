"""What the right answers are."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

from backends.api import Row, Sampling
from backends.api import Sequence as Line
from backends.emulation.synthetic import SyntheticBackend
from tests.storm.clients import Answer, Ask, Ordinary

VOCABULARY = 49152


def asks(seed: int, count: int, *, tokens: tuple[int, int] = (20, 120)) -> list[Ask]:
    """Requests of many shapes."""
    dice = random.Random(seed)
    return [
        Ask(
            prompt=tuple(dice.choices(range(100, 40000), k=int(2 ** dice.uniform(1, 9)))),
            max_tokens=dice.randint(*tokens),
            seed=dice.randrange(1 << 30),
            n=dice.choice([1, 1, 1, 2, 3]),
        )
        for _ in range(count)
    ]


async def learn(client: Ordinary, questions: list[Ask]) -> dict[Ask, Answer]:
    """The answers while nothing happens; of the synthetic backend they are known beforehand."""
    answers = await asyncio.gather(*map(client.ask, questions))
    assert {answer.end for answer in answers} == {"whole"}, answers
    return dict(zip(questions, answers, strict=True))


class Formula:
    """The synthetic backend's tokens, without a pool or a step."""

    def __init__(self) -> None:
        self._backend = SyntheticBackend(layers=1, kv_heads=1, head_dim=8, pool_tokens=16384)

    def tokens(self, ask: Ask, seed: int) -> list[int]:
        """One sequence."""
        line = Line(prompt=list(ask.prompt), generated=[], sampling=Sampling(), seed=seed)
        blocks = list(range(self._backend.info.pool_blocks))
        said: list[int] = []
        row = Row(tokens=list(ask.prompt), start=0, blocks=blocks, sequences=(line,))
        while len(said) < ask.max_tokens:
            (output,) = self._backend.step([row], lambda *_: None)
            said.append(output.sampled[0].token)
            line.generated.append(said[-1])
            start = len(ask.prompt) + len(said) - 1
            row = Row(tokens=said[-1:], start=start, blocks=blocks, sequences=(line,))
        return said


def wrong(answer: Answer, right: Answer) -> str:
    """What `answer` says that is not so; empty when all that it says is right so far."""
    for index, tokens in answer.tokens.items():
        if tokens != right.tokens[index][: len(tokens)]:
            return f"choice {index}: {tokens} is not the beginning of {right.tokens[index]}"
    for index, text in answer.text.items():
        if not right.text[index].startswith(text):
            return f"choice {index}: {text!r} is not the beginning of {right.text[index]!r}"
    if answer.end == "whole" and not same(answer, right):
        return f"it ended at {lengths(answer)} of {lengths(right)}, {answer.finish}"
    return ""


def same(answer: Answer, right: Answer) -> bool:
    """Whether it is the whole right answer."""
    return (answer.tokens, answer.text, answer.finish) == (right.tokens, right.text, right.finish)


def lengths(answer: Answer) -> Sequence[int]:
    """How many tokens each choice has."""
    return [len(tokens) for _, tokens in sorted(answer.tokens.items())]
