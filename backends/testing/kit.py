"""One examination from beginning to end: the plug-in by its name, beside its reference engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec

from backends.errors import BackendMisconfigured, BackendNotFound
from backends.testing.bench import MODEST
from backends.testing.engine import ENGINE, engine_core
from backends.testing.engine.bench import EngineBench
from backends.testing.form import Bench, Promise, Verdict, described, examine
from backends.testing.making import Maker
from backends.testing.report import Report
from backends.testing.stepped import STEPPED, STEPPED_CORE
from backends.testing.stepped.bench import SteppedBench
from transfer.warming import warm_up

REFERENCE = "emulation"
"""The engine that a plug-in with a `model` is measured by, where nobody names another."""

EXACTLY = {"dtype": "float32", "kv_dtype": "float32"}


def conformance(
    name: str,
    options: Mapping[str, Any],
    *,
    reference: tuple[str, Mapping[str, Any]] | None = None,
    only: str = "",
    tell: Callable[[Verdict], None] | None = None,
) -> Report:
    """Look at every promise of the backend `name` (an entry point, or `module:Class`).

    `reference` is another backend for the same model (by its option `model`, if it has one and is
    given none, that of the plug-in) with its options; without it, the one that
    comes along in float32, where the plug-in has an option `model`. Of the promises, those
    whose names contain `only`. `tell` hears each verdict.

    Raises:
        BackendNotFound: there is no such backend.
        Exception: what importing or constructing it raised.
    """
    maker = Maker.of(name, options)
    maker.options.update(_modest(maker))
    measure, absent = _reference(maker, reference)
    warm_up()  # what is compiled at the first handoff is not the plug-in's time
    made = maker.make()
    states = msgspec.to_builtins(made.info)
    if made.info.kind == "engine":
        core = engine_core(made.info)
        engine = EngineBench(maker, measure, absent, made=made)
        verdicts, beside = _gone_through(ENGINE, engine, only, tell)
    else:
        core = STEPPED_CORE
        stepped = SteppedBench(maker, measure, absent, made=made)
        verdicts, beside = _gone_through(STEPPED, stepped, only, tell)
    return Report(
        backend=name,
        contract=made.info.kind,
        options=maker.options,
        states=states,
        reference=beside,
        verdicts=verdicts,
        core=core,
    )


class Closing(Bench, Protocol):
    """A bench that holds things, and may have a reference beside it."""

    @property
    def measure(self) -> str:
        """The reference in a line, or why there is none."""

    def close(self) -> None:
        """Give everything back."""


C = TypeVar("C", bound=Closing)


def _gone_through(
    promises: Sequence[Promise[C]], bench: C, only: str, tell: Callable[[Verdict], None] | None
) -> tuple[tuple[Verdict, ...], str]:
    """What became of the promises whose names contain `only`, and beside which reference."""
    try:
        wanted = [it for it in promises if only in it.__name__]
        if not wanted:
            raise BackendMisconfigured(f"no promise has {only!r} in its name")
        return examine(wanted, bench, tell), bench.measure
    finally:
        bench.close()


def _modest(maker: Maker) -> dict[str, int]:
    """Options that keep it small, where nobody has said how large it is to be."""
    given = {*maker.options, *(("pool_tokens",) if "pool_blocks" in maker.options else ())}
    return {key: value for key, value in MODEST.items() if maker.takes(key) and key not in given}


def _reference(
    maker: Maker, asked: tuple[str, Mapping[str, Any]] | None
) -> tuple[Maker | None, str]:
    """What makes the reference engine, or why there is none."""
    model = maker.options.get("model")
    if asked is None:
        advice = "name one for the same model with --reference"
        if maker.name == REFERENCE or not isinstance(model, str):
            return None, advice
        if not Path(model).exists():
            return None, f"{model!r} is no checkpoint; {advice}"
        same = {key: maker.options[key] for key in ("context_tokens",) if key in maker.options}
        asked = REFERENCE, {**EXACTLY, **MODEST, **same, "model": model}
    try:
        measure = Maker.of(*asked)
        if isinstance(model, str) and measure.takes("model"):
            measure.options.setdefault("model", model)
        return measure, ""
    except (BackendNotFound, ImportError) as error:
        return None, described(error)
