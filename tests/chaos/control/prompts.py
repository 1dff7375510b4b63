"""Prompts: some begin alike, and in each there is a token that says whose it is."""

from __future__ import annotations

from collections.abc import Sequence

from tests.chaos.schedule import Dice

FIRST_MARK = 40_000
MARKS = range(FIRST_MARK, FIRST_MARK + 64)
LEADS = (0, 4, 8)
"""How long a beginning is that others have too."""

FAMILIES = 2


def prompt_of(dice: Dice, number: int) -> list[int]:
    """What client `number` asks."""
    lead, family = dice.choose(LEADS, "lead", number), dice.below(FAMILIES, "family", number)
    length = 2 + dice.below(13, "length", number)
    rest = [1000 + dice.below(9000, "p", number, i) for i in range(max(2, length - lead) - 1)]
    return [*(10_000 + 100 * family + i for i in range(lead)), FIRST_MARK + number, *rest]


def number_of(prompt: Sequence[int]) -> int | None:
    """Whose prompt begins so; None where that is not to be seen yet."""
    return next((token - FIRST_MARK for token in prompt if token in MARKS), None)
