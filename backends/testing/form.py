"""What a promise is, and how a list of them is gone through. Knows no contract.

A promise is a function that is named after what it promises and takes the *bench* of its contract:
whatever holds the plug-in. It returns when it found the promise kept, raises `Broken` when not, and
`Unproven` when it cannot be shown here.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol, TypeVar

import msgspec

Outcome = Literal["kept", "broken", "unproven"]


class Broken(Exception):
    """The plug-in does not keep the promise. The message says what was found and what to fix."""


class Unproven(Exception):
    """Whether the promise is kept cannot be shown here. The message says what that would take."""


class Hangs(Broken):
    """A call never returned. The plug-in is of no more use, so no other promise is looked at."""


class Bench(Protocol):
    """What holds the plug-in while it is examined."""

    def tidy(self, *, broken: bool) -> None:
        """Make ready for the next promise; after a broken one, with a plug-in made anew.

        Raises:
            Exception: it cannot be made again.
        """


B = TypeVar("B", bound=Bench)
B_contra = TypeVar("B_contra", bound=Bench, contravariant=True)


class Promise(Protocol[B_contra]):
    """A function; its name is the promise, its docstring's first line says it in words."""

    __name__: str

    def __call__(self, bench: B_contra, /) -> None:
        """Look.

        Raises:
            Broken: it is not kept.
            Unproven: nobody can say.
        """


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one promise. `detail` says what to fix, or what would prove it."""

    promise: str
    says: str
    outcome: Outcome
    detail: str = ""
    seconds: float = 0.0


def require(condition: object, otherwise: str) -> None:
    """Break the promise unless `condition`.

    Raises:
        Broken: it does not hold.
    """
    if not condition:
        raise Broken(otherwise)


def examine(
    promises: Sequence[Promise[B]], bench: B, tell: Callable[[Verdict], None] | None = None
) -> tuple[Verdict, ...]:
    """Look at every promise in turn; `tell` hears each verdict as it falls."""
    verdicts = []
    for verdict in _verdicts(promises, bench):
        verdicts.append(verdict)
        if tell is not None:
            tell(verdict)
    return tuple(verdicts)


def _verdicts(promises: Sequence[Promise[B]], bench: B) -> Iterator[Verdict]:
    lost = ""
    for promise in promises:
        began = time.monotonic()
        outcome: Outcome = "unproven"
        detail = lost
        try:
            if not lost:
                outcome, detail = _look(promise, bench)
                lost = _tidy(bench, promise.__name__, broken=outcome == "broken")
        except Hangs as error:
            outcome, detail = "broken", str(error)
            lost = f"nothing can be asked of it since {promise.__name__}, where it hung"
        yield Verdict(
            promise=promise.__name__,
            says=says(promise),
            outcome=outcome,
            detail=detail,
            seconds=round(time.monotonic() - began, 3),
        )


def says(promise: Promise[Any]) -> str:
    """What is promised, in one line."""
    return (promise.__doc__ or "").strip().partition("\n")[0]


def _look(promise: Promise[B], bench: B) -> tuple[Outcome, str]:
    try:
        promise(bench)
    except Hangs:
        raise
    except Unproven as error:
        return "unproven", str(error)
    except Broken as error:
        return "broken", str(error)
    except Exception as error:  # foreign code
        where = traceback.extract_tb(error.__traceback__)[-1]
        return "broken", f"it raised {described(error)} ({where.filename}:{where.lineno})"
    return "kept", ""


def described(error: BaseException) -> str:
    """What it is and what it says."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _tidy(bench: Bench, promise: str, *, broken: bool) -> str:
    """Why nothing more can be looked at; empty when it can."""
    try:
        bench.tidy(broken=broken)
    except Hangs:
        raise
    except Exception as error:  # foreign code
        return f"after {promise} it could not be made again: {described(error)}"
    return ""
