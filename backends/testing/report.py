"""What the kit found, as a table for people and as JSON for machines."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from backends.testing.form import Outcome, Promise, Verdict, says

WIDTH = 100
_MARK: dict[Outcome, str] = {"kept": "ok", "broken": "BROKEN", "unproven": "unproven"}


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One examination. `reference` says beside which engine, or why beside none.

    `core` names the promises without which nobody should hand it KV, or take KV from it.
    """

    backend: str
    contract: str
    options: dict[str, Any]
    states: dict[str, Any]
    reference: str
    verdicts: tuple[Verdict, ...]
    core: tuple[str, ...] = ()

    @property
    def broken(self) -> tuple[Verdict, ...]:
        """The promises that are not kept."""
        return tuple(it for it in self.verdicts if it.outcome == "broken")

    @property
    def unproven(self) -> tuple[Verdict, ...]:
        """The promises of which nobody can say."""
        return tuple(it for it in self.verdicts if it.outcome == "unproven")

    @property
    def ok(self) -> bool:
        """Whether nothing is broken."""
        return not self.broken

    @property
    def lacking(self) -> tuple[str, ...]:
        """The promises at its core that could not be proven."""
        return tuple(it.promise for it in self.unproven if it.promise in self.core)

    @property
    def proven(self) -> bool:
        """Whether nothing is broken, and all that is at its core is kept."""
        return self.ok and not self.lacking

    def json(self) -> bytes:
        """For machines: the fields, `ok`, `proven` and what is `lacking` for that."""
        found = {"ok": self.ok, "proven": self.proven, "lacking": self.lacking}
        return msgspec.json.format(msgspec.json.encode({**found, **msgspec.to_builtins(self)}))


def line(verdict: Verdict) -> str:
    """One verdict in one line, as it falls."""
    return f"{_MARK[verdict.outcome]:<9}{verdict.promise:<55}{verdict.seconds:7.2f} s"


def summary(report: Report) -> str:
    """What is to be done: every broken promise, then what could not be proven, then the count."""
    return "\n".join(_summary(report))


def _summary(report: Report) -> Iterator[str]:
    if report.broken:
        yield "\nbroken:"
    for verdicts in _alike(report.broken):
        for verdict in verdicts:
            yield f"  {verdict.promise}"
            yield _paragraph(verdict.says)
        yield _paragraph("-> " + verdicts[0].detail)
    if report.unproven:
        yield "\ncould not be proven:"
    for verdicts in _alike(report.unproven):
        yield from (f"  {it.promise}" for it in verdicts)
        yield _paragraph("-> " + verdicts[0].detail)
    kept = sum(1 for it in report.verdicts if it.outcome == "kept")
    yield (
        f"\n{report.backend}: {kept} promises kept, {len(report.broken)} broken, "
        f"{len(report.unproven)} not proven; reference: {report.reference}"
    )
    if report.lacking:
        yield f"NOT PROVEN AT ITS CORE: {', '.join(report.lacking)}"


def _alike(verdicts: Iterable[Verdict]) -> list[list[Verdict]]:
    """Those of which the same is to be said, together."""
    found: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        found.setdefault(verdict.detail, []).append(verdict)
    return list(found.values())


def _paragraph(text: str) -> str:
    return textwrap.indent(textwrap.fill(text, WIDTH), "      ")


def promise_list(promises: Iterable[Promise[Any]]) -> str:
    """Markdown: what is promised, in order."""
    return "\n".join(f"- `{it.__name__}`: {says(it)}" for it in promises)
