"""What the right answers are."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path

from backends.api import Row, Sampling
from backends.api import Sequence as Line
from backends.emulation import EmulationBackend
from backends.emulation.synthetic import SyntheticBackend
from gateway.api.wishes import derive_seed
from gateway.cli.model import find_model
from gateway.text import load_text
from tests.emulation.desk import Desk
from tests.storm.clients import Answer, Ask, Ordinary
from tests.support.margin import assert_same_or_near_tie


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
    """The answers while nothing happens."""
    answers = await asyncio.gather(*map(client.ask, questions))
    assert {answer.end for answer in answers} == {"whole"}, answers
    return dict(zip(questions, answers, strict=True))


def questions() -> list[Ask]:
    """Requests for the real model."""
    text = load_text(Path(find_model("bundled")))
    starts = ("The capital of France is", "Once upon a time", "def add(a, b):", "Water boils at")
    return [
        Ask(
            prompt=tuple(text.encode(start, add_special_tokens=False)),
            max_tokens=length,
            seed=length,
        )
        for start in starts
        for length in (24, 48)
    ]


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


def confirm(right: dict[Ask, Answer]) -> None:
    """Make sure that what was learned is what the formula says."""
    formula = Formula()
    for ask, answer in right.items():
        for index in range(ask.n):
            assert answer.tokens[index] == formula.tokens(ask, derive_seed(ask.seed, index)), ask


def wrong(_: Ask, answer: Answer, right: Answer) -> str:
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


class NearTies:
    """The judge of a float engine's answers."""

    def __init__(self) -> None:
        model = str(find_model("bundled"))
        self._desk = Desk(
            EmulationBackend(model=model, dtype="float32", threads=1, pool_tokens=2048)
        )
        self._text = load_text(Path(model))

    def __call__(self, ask: Ask, answer: Answer, right: Answer) -> str:
        """Another token is wrong where it was not as likely as the right one."""
        if not wrong(ask, answer, right):
            return ""
        try:
            for index, tokens in answer.tokens.items():
                assert_same_or_near_tie(
                    tokens,
                    right.tokens[index][: len(tokens)],
                    prompt=ask.prompt,
                    logits_after=self._desk.logprobs_after,
                )
        except AssertionError as error:
            return str(error)
        return self._incomplete(answer, right) if answer.end == "whole" else ""

    def _incomplete(self, answer: Answer, right: Answer) -> str:
        if (lengths(answer), answer.finish) != (lengths(right), right.finish):
            return f"it ended at {lengths(answer)} of {lengths(right)}, {answer.finish}"
        for index, tokens in answer.tokens.items():
            if self._text.decode(tokens) != answer.text[index]:
                return f"choice {index}: {answer.text[index]!r} is not the text of its tokens"
        return ""


def same(answer: Answer, right: Answer) -> bool:
    """Whether it is the whole right answer."""
    return (answer.tokens, answer.text, answer.finish) == (right.tokens, right.text, right.finish)


def lengths(answer: Answer) -> Sequence[int]:
    """How many tokens each choice has."""
    return [len(tokens) for _, tokens in sorted(answer.tokens.items())]
