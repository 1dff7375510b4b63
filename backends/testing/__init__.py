"""The conformance kit: proves that a plug-in keeps the promises of its contract.

    report = conformance("acme", {"model": "/models/tiny"})
    print(summary(report))

`baton conformance NAME` does the same from the command line. A promise is a function named after
what it promises; `STEPPED` lists those of a stepped backend, `ENGINE` those of an engine. Needs no
test framework, no network and no hardware but the plug-in's own; a library is imported only when
its backend was named.

Start with `form.py` (what a promise is), then `bench.py` (what it is given).
"""

from __future__ import annotations

from backends.testing.engine import ENGINE
from backends.testing.engine.bench import EngineBench
from backends.testing.form import (
    Bench,
    Broken,
    Hangs,
    Outcome,
    Promise,
    Unproven,
    Verdict,
    examine,
    require,
)
from backends.testing.kit import conformance
from backends.testing.making import Maker
from backends.testing.report import Report, line, summary
from backends.testing.stepped import STEPPED
from backends.testing.stepped.bench import SteppedBench

__all__ = [
    "ENGINE",
    "STEPPED",
    "Bench",
    "Broken",
    "EngineBench",
    "Hangs",
    "Maker",
    "Outcome",
    "Promise",
    "Report",
    "SteppedBench",
    "Unproven",
    "Verdict",
    "conformance",
    "examine",
    "line",
    "require",
    "summary",
]
