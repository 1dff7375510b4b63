"""Where a prefix goes, and what is said when it goes nowhere."""

import pytest

from backends.api import Sampling
from backends.protocol import chain, mark
from gateway.placement import Placement, Snapshot, Unplaceable, Wish, least_seconds, place
from gateway.placement.costs import LinkCost, PrefillCost, StepCost
from gateway.placement.views import LinkView
from tests.placement.desk import PREFILL, info, snapshot, wish, worker


def chosen(seen: Snapshot, wanted: Wish) -> tuple[str, str | None]:
    answer = place(seen, wanted)
    assert isinstance(answer, Placement), answer
    return answer.prefill, answer.decode


def refused(seen: Snapshot, wanted: Wish) -> Unplaceable:
    answer = place(seen, wanted)
    assert isinstance(answer, Unplaceable), answer
    return answer


def test_the_shorter_queue_is_taken() -> None:
    busy = worker("p1", "prefill", queued_tokens=500, queued_seconds=0.5)
    seen = snapshot(busy, worker("p2", "prefill"), worker("d", "decode"))
    assert chosen(seen, wish()) == ("p2", "d")


def test_a_longer_queue_on_a_faster_worker_is_taken_when_it_is_sooner() -> None:
    fast = PrefillCost(base=0.01, linear=1e-5, known=True)
    quick = worker("quick", "prefill", queued_seconds=0.2, queued_tokens=20000, prefill=fast)
    seen = snapshot(quick, worker("slow", "prefill"), worker("d", "decode"))
    assert chosen(seen, wish(tokens=10000)) == ("quick", "d")
    assert chosen(seen, wish(tokens=100)) == ("slow", "d")


def test_sequences_are_spread_over_decode_workers() -> None:
    seen = snapshot(
        worker("p", "prefill"), worker("d1", "decode", running=4), worker("d2", "decode", running=3)
    )
    assert chosen(seen, wish()) == ("p", "d2")


def test_a_slow_link_is_avoided() -> None:
    links = {
        ("p", "near"): LinkView(cost=LinkCost(base=0.001, byte=1e-10)),
        ("p", "far"): LinkView(cost=LinkCost(base=0.001, byte=1e-5)),
    }
    seen = snapshot(
        worker("p", "prefill"),
        worker("near", "decode", running=2),
        worker("far", "decode"),
        links=links,
    )
    assert chosen(seen, wish()) == ("p", "near")


def test_a_link_with_much_booked_on_it_is_avoided() -> None:
    links = {("p", "a"): LinkView(queued_seconds=9.0), ("p", "b"): LinkView()}
    seen = snapshot(
        worker("p", "prefill"), worker("a", "decode"), worker("b", "decode", running=3), links=links
    )
    assert chosen(seen, wish()) == ("p", "b")


def test_an_idle_worker_that_does_both_needs_no_handoff() -> None:
    seen = snapshot(worker("p", "prefill"), worker("d", "decode"), worker("b", "both"))
    assert chosen(seen, wish()) == ("b", None)


def test_a_worker_that_does_both_is_left_to_those_who_decode_there() -> None:
    """It would be sooner there, but each of them would lose the time of the prefill."""
    seen = snapshot(
        worker("p", "prefill", queued_seconds=0.3, queued_tokens=3000),
        worker("d", "decode", running=4),
        worker("b", "both", running=4),
    )
    answer = place(seen, wish(tokens=4000))
    assert isinstance(answer, Placement)
    assert answer.prefill == "p"
    (there,) = [it for it in answer.reason.candidates if it.decode is None]
    assert there.forecast.first_token < answer.forecast.first_token
    assert there.forecast.delay == pytest.approx(4 * there.forecast.first_token)


def test_prefill_stays_where_it_is_decoded_when_the_prefill_workers_are_busy() -> None:
    seen = snapshot(
        worker("p", "prefill", queued_seconds=30.0, queued_tokens=300_000),
        worker("d", "decode", running=4),
        worker("b", "both", running=4),
    )
    assert chosen(seen, wish(tokens=4000)) == ("b", None)


def test_equal_ways_go_to_the_pair() -> None:
    free = {("p", "d"): LinkView(cost=LinkCost(base=0.0, byte=0.0))}
    seen = Snapshot((worker("b", "both"), worker("p", "prefill"), worker("d", "decode")),
                    frozenset(free), free)  # fmt: skip
    assert chosen(seen, wish()) == ("p", "d")


def test_a_first_token_that_would_be_late_is_had_elsewhere() -> None:
    """The pair would be done sooner in all, but its first token would come too late."""
    crawling = StepCost(base=0.05, row=0, known=True)
    seen = Snapshot(
        (
            worker("p1", "prefill", queued_seconds=1.0, queued_tokens=9),
            worker("p2", "prefill"),
            worker("d1", "decode"),
            worker("d2", "decode", step=crawling),
        ),
        frozenset({("p1", "d1"), ("p2", "d2")}),
    )
    assert chosen(seen, wish(expected=1000)) == ("p1", "d1")
    assert chosen(seen, wish(expected=1000, first_token_seconds=0.5)) == ("p2", "d2")


def test_what_is_late_everywhere_is_said_to_be() -> None:
    queue = {"queued_seconds": 3.0, "queued_tokens": 30_000}
    seen = snapshot(worker("p", "prefill", **queue), worker("d", "decode"))
    answer = refused(seen, wish(first_token_seconds=1.0))
    assert answer.kind == "late"
    assert "3.11 s" in answer.reason
    assert chosen(seen, wish(first_token_seconds=3.5)) == ("p", "d")


def test_an_idle_worker_is_tried_however_late_it_is_thought_to_be() -> None:
    wrong = PrefillCost(base=1000.0, known=True)
    seen = snapshot(worker("p", "prefill", prefill=wrong), worker("d", "decode"))
    assert chosen(seen, wish(first_token_seconds=1.0)) == ("p", "d")
    busy = snapshot(worker("p", "prefill", prefill=wrong), worker("d", "decode", running=1))
    assert refused(busy, wish(first_token_seconds=1.0)).kind == "late"
    assert refused(seen, wish(first_token_seconds=0.0)).kind == "late"


def test_a_batch_that_would_become_too_slow_takes_no_more() -> None:
    seen = snapshot(worker("p", "prefill"), worker("d", "decode", running=20))
    assert chosen(seen, wish(gap_seconds=0.0456)) == ("p", "d")
    answer = refused(seen, wish(gap_seconds=0.0455))
    assert (answer.kind, answer.field) == ("full", None)


def test_nobody_waits_for_a_gap_that_an_empty_worker_cannot_give() -> None:
    seen = snapshot(worker("p", "prefill"), worker("d", "decode"))
    assert chosen(seen, wish(gap_seconds=0.001)) == ("p", "d")


def test_sequences_beyond_the_largest_batch_take_turns() -> None:
    """Two for each row of a step of 0.03 s: each has to wait for two of them."""
    seen = snapshot(
        worker("p", "prefill"), worker("d", "decode", running=19, backend={"max_batch": 10})
    )
    answer = place(seen, wish())
    assert isinstance(answer, Placement)
    assert answer.forecast.gap == pytest.approx(0.06)


def test_an_unmeasured_worker_is_never_full_because_of_its_gap() -> None:
    guess = StepCost(base=1.0)
    seen = snapshot(worker("p", "prefill"), worker("d", "decode", running=3, step=guess))
    assert chosen(seen, wish(gap_seconds=0.1)) == ("p", "d")


def test_chunks_of_prefill_count_as_gaps_of_those_who_decode_there() -> None:
    both = worker("b", "both", running=2, step_tokens=1000)
    assert chosen(snapshot(both), wish(gap_seconds=0.148)) == ("b", None)
    assert refused(snapshot(both), wish(gap_seconds=0.147)).kind == "full"


def test_a_pool_without_room_for_the_prompt_is_full() -> None:
    seen = snapshot(worker("p", "prefill"), worker("d", "decode", running=1, free_blocks=63))
    assert refused(seen, wish(tokens=1000)).kind == "full"
    assert chosen(seen, wish(tokens=62 * 16)) == ("p", "d")


def test_a_kept_prefix_need_not_be_computed() -> None:
    tokens = list(range(1000))
    layout = info().layout
    links = chain(layout, b"salt", tokens)
    kept = frozenset(mark(link) for link in links[:40])
    seen = snapshot(
        worker("p1", "prefill"),
        worker("p2", "prefill", kept=kept, queued_seconds=0.03, queued_tokens=300),
        worker("d", "decode"),
    )
    marks = {layout.fingerprint: tuple(mark(link) for link in links)}
    assert chosen(seen, wish(marks=marks)) == ("p2", "d")
    answer = place(seen, wish(marks=marks))
    assert isinstance(answer, Placement)
    assert answer.forecast.cached == 640
    assert answer.forecast.first_token == pytest.approx(0.03 + 0.01 + 360e-4)
    others = {layout.fingerprint: tuple(mark(it) for it in chain(layout, b"another", tokens))}
    assert chosen(seen, wish(marks=others)) == ("p1", "d")


def test_a_prefix_that_is_kept_whole_is_computed_at_its_end() -> None:
    tokens = list(range(64))
    layout = info().layout
    marks = tuple(mark(link) for link in chain(layout, b"", tokens))
    seen = snapshot(worker("p", "prefill", kept=frozenset(marks)), worker("d", "decode"))
    answer = place(seen, wish(tokens=64, marks={layout.fingerprint: marks}))
    assert isinstance(answer, Placement)
    assert answer.forecast.cached == 63


def test_what_the_decode_worker_has_does_not_travel() -> None:
    tokens = list(range(1000))
    layout = info().layout
    marks = tuple(mark(link) for link in chain(layout, b"", tokens))
    seen = snapshot(worker("p", "prefill"), worker("d", "decode", kept=frozenset(marks[:10])))
    answer = place(seen, wish(marks={layout.fingerprint: marks}))
    assert isinstance(answer, Placement)
    assert answer.forecast.moved == 840 * layout.block_bytes // 16


def test_an_avoided_worker_is_the_last_choice() -> None:
    seen = snapshot(worker("p1", "prefill"), worker("p2", "prefill", queued_seconds=5.0),
                    worker("d", "decode"))  # fmt: skip
    assert chosen(seen, wish(avoid=frozenset({"p1"}))) == ("p2", "d")
    alone = snapshot(worker("p1", "prefill"), worker("d", "decode"))
    assert chosen(alone, wish(avoid=frozenset({"p1"}))) == ("p1", "d")


def test_one_token_needs_no_decode_worker() -> None:
    assert chosen(snapshot(worker("p", "prefill")), wish(decodes=False)) == ("p", None)


def test_a_draining_worker_gets_nothing() -> None:
    seen = snapshot(worker("p", "prefill"), worker("d", "decode", draining=True))
    assert refused(seen, wish()).reason == "no decode worker is connected; d is draining"


@pytest.mark.parametrize(
    ("backend", "wanted", "field"),
    [
        ({"sampling": frozenset()}, wish(sampling=Sampling(top_k=3)), "top_k"),
        ({"context_tokens": 1000}, wish(tokens=1000), "messages"),
        ({"pool_blocks": 60}, wish(tokens=1000), "messages"),
    ],
)
def test_what_no_worker_can_do_names_the_field(backend: dict, wanted: Wish, field: str) -> None:
    seen = snapshot(worker("p", "prefill", backend=backend), worker("d", "decode", backend=backend))
    answer = refused(seen, wanted)
    assert (answer.field, answer.kind) == (field, "absent")


def test_who_is_missing_is_named() -> None:
    assert "no decode worker" in refused(snapshot(worker("p", "prefill")), wish()).reason
    strangers = Snapshot((worker("p", "prefill"), worker("d", "decode")), frozenset())
    assert "met" in refused(strangers, wish()).reason


def test_the_reason_tells_the_others_and_their_forecasts() -> None:
    seen = snapshot(
        worker("p1", "prefill", queued_seconds=0.5),
        worker("p2", "prefill"),
        worker("p3", "prefill", draining=True),
        worker("d", "decode"),
    )
    answer = place(seen, wish(first_token_seconds=0.3))
    assert isinstance(answer, Placement)
    first, second = answer.reason.candidates
    assert (first.prefill, second.prefill) == ("p2", "p1")
    assert first.forecast == answer.forecast
    assert second.forecast.wait == 0.5
    assert second.short == "first token"
    assert answer.reason.left_out == (("p3", "p3 is draining"),)
    assert "first token in 110 ms (0 waiting)" in answer.reason.summary


def test_a_reason_of_a_large_fleet_is_short() -> None:
    many = [worker(f"p{i}", "prefill") for i in range(40)]
    gone = [worker(f"x{i}", "prefill", draining=True) for i in range(40)]
    answer = place(snapshot(*many, *gone, worker("d", "decode")), wish())
    assert isinstance(answer, Placement)
    assert (len(answer.reason.candidates), len(answer.reason.left_out)) == (8, 8)


def test_the_least_time_is_that_of_an_idle_fleet() -> None:
    fast = PrefillCost(base=0.01, linear=1e-5, known=True)
    seen = snapshot(
        worker("a", "prefill", queued_seconds=9.0, prefill=fast),
        worker("b", "prefill"),
        worker("d", "decode"),
    )
    assert least_seconds(seen, wish(tokens=1000)) == pytest.approx(0.02)
    unknown = snapshot(worker("a", "prefill", prefill=PrefillCost()), worker("d", "decode"))
    assert least_seconds(unknown, wish()) == 0.0
    assert least_seconds(snapshot(), wish()) == 0.0
    assert PREFILL.seconds(1000) == pytest.approx(0.11)


def test_what_cannot_score_a_prompt_is_not_asked_to() -> None:
    silent = {"prompt_logprobs": False}
    engine = worker("engine", "prefill", backend=silent)
    decode = worker("d", "decode", backend=silent)
    answer = refused(snapshot(engine, decode), wish(prompt_logprobs=True))
    assert answer.field == "echo"
    scoring = worker("scoring", "prefill", queued_tokens=5000, queued_seconds=5.0)
    assert chosen(snapshot(engine, scoring, decode), wish(prompt_logprobs=True))[0] == "scoring"
    assert chosen(snapshot(engine, scoring, decode), wish())[0] == "engine"


def test_an_engine_has_as_much_room_as_its_own_memory() -> None:
    sizes = {"kind": "engine", "engine_blocks": 64, "pool_blocks": 4096}
    engine = worker("engine", "both", backend=sizes)
    assert refused(snapshot(engine), wish(tokens=64 * 16)).field == "messages"
    assert chosen(snapshot(engine), wish(tokens=60 * 16)) == ("engine", None)
