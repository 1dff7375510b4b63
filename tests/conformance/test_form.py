"""How promises are gone through, and what is printed of them."""

import msgspec
import pytest

from backends.testing import Broken, Hangs, Report, Unproven, examine, line, summary


class Bench:
    def __init__(self):
        self.tidied = []

    def tidy(self, *, broken):
        self.tidied.append(broken)
        if len(self.tidied) == 6:
            raise RuntimeError("no device left")


def it_holds(bench):
    """It does."""


def it_is_broken(bench):
    """It should."""
    raise Broken("mend the thing")


def it_raises(bench):
    """It should not."""
    raise ValueError("of its own")


def nobody_knows(bench):
    """Perhaps."""
    raise Unproven("bring a reference")


def it_hangs(bench):
    """It should end."""
    raise Hangs("step did not return")


def outcomes(*promises):
    return [(it.outcome, it.detail) for it in examine(promises, Bench())]


def test_every_promise_has_a_verdict_and_what_it_raises_is_its_own_fault():
    kept, broken, raised, unproven = outcomes(it_holds, it_is_broken, it_raises, nobody_knows)
    assert kept == ("kept", "")
    assert broken == ("broken", "mend the thing")
    assert raised[0] == "broken"
    assert "ValueError: of its own" in raised[1]
    assert __file__ in raised[1]
    assert unproven == ("unproven", "bring a reference")


def test_after_a_broken_promise_the_plug_in_is_made_anew():
    bench = Bench()
    examine([it_holds, it_is_broken, it_raises, nobody_knows], bench)
    assert bench.tidied == [False, True, True, False]


@pytest.mark.parametrize("last", [[it_hangs], [it_holds] * 5 + [it_is_broken]])
def test_nothing_more_is_asked_of_a_plug_in_that_is_of_no_more_use(last):
    found = outcomes(*last, it_is_broken)
    assert [outcome for outcome, _ in found[-2:]] == ["broken", "unproven"]
    assert last[-1].__name__ in found[-1][1]


def so_is_this(bench):
    """It should, too."""
    raise Broken("mend the thing")


def report(*promises, core=()):
    return Report(
        backend="acme",
        contract="stepped",
        options={},
        states={},
        reference="none",
        verdicts=examine(promises, Bench()),
        core=core,
    )


def test_a_person_reads_what_to_fix_and_a_machine_reads_all():
    found = report(it_holds, it_is_broken, nobody_knows)
    assert [line(it).split()[:2] for it in found.verdicts] == [
        ["ok", "it_holds"],
        ["BROKEN", "it_is_broken"],
        ["unproven", "nobody_knows"],
    ]
    text = summary(found)
    assert "it_is_broken\n      It should.\n      -> mend the thing" in text
    assert "acme: 1 promises kept, 1 broken, 1 not proven; reference: none" in text
    parsed = msgspec.json.decode(found.json())
    assert parsed["ok"] is False
    assert [it["outcome"] for it in parsed["verdicts"]] == ["kept", "broken", "unproven"]
    assert report(it_holds, nobody_knows).ok


def test_what_is_broken_for_one_reason_is_said_once():
    text = summary(report(it_is_broken, it_raises, so_is_this))
    alike = "  it_is_broken\n      It should.\n  so_is_this\n      It should, too.\n"
    assert f"{alike}      -> mend the thing\n  it_raises\n" in text


def test_whoever_keeps_all_that_could_be_looked_at_has_not_proven_the_rest():
    found = report(it_holds, nobody_knows, core=("it_holds", "nobody_knows"))
    assert (found.ok, found.proven, found.lacking) == (True, False, ("nobody_knows",))
    assert summary(found).splitlines()[-1] == "NOT PROVEN AT ITS CORE: nobody_knows"
    parsed = msgspec.json.decode(found.json())
    assert (parsed["ok"], parsed["proven"], parsed["lacking"]) == (True, False, ["nobody_knows"])
    kept = report(it_holds, nobody_knows, core=("it_holds",))
    assert kept.proven
    assert "CORE" not in summary(kept)
