"""What is kept of a request: its states, why it was placed where, and what it took."""

import json
from itertools import pairwise

import msgspec

from backends.protocol import Sampling
from gateway.life.history import MOST_EVENTS, MOST_PLACEMENTS, History, Record
from gateway.life.job import Job, Timeline
from gateway.life.states import State
from gateway.placement import Placement
from gateway.placement.views import Forecast, Reason
from tests.life.cluster import DECODE, PREFILL, Heard, cluster

FORECAST = Forecast(first_token=0.1, wait=0.0, beside=0.0, handoff=0.0, gap=0.0, delay=0.0)


def job(name: str = "j") -> Job:
    return Job(
        id=name, model="m", tenant="t", prompt=[1, 2], seeds=(1,), sampling=Sampling(),
        max_tokens=3, deadline=1e9, decode_estimate=3,
    )  # fmt: skip


async def test_a_request_tells_its_states_and_why_it_was_placed(redis_url: str) -> None:
    async with cluster(redis_url) as made:
        await made.start("p", "prefill", **PREFILL)
        await made.start("d", "decode", **DECODE)
        await made.paired()
        wanted = made.job(list(range(50)), max_tokens=5)
        await made.carry(wanted, Heard())
        found = made.relay.history.find(f"chatcmpl-{wanted.id}")
    shown = json.loads(msgspec.json.encode(found))
    assert (shown["tenant"], shown["prompt_tokens"], shown["state"]) == ("t", 50, "done")
    states = [it["state"] for it in shown["states"]]
    assert states[0] == "queued"
    assert states[1] == "placed"
    assert states[-1] == "done"
    assert all(one["at"] <= two["at"] for one, two in pairwise(shown["states"]))
    (placement,) = shown["placements"]
    assert (placement["prefill"], placement["decode"]) == ("p", "d")
    assert placement["reason"]["summary"].startswith("the pair is done soonest of 1")
    assert placement["reason"]["candidates"][0]["forecast"]["first_token"] > 0
    assert shown["timeline"]["prefill_worker"] == "p"
    assert "prompt" not in shown


async def test_what_is_kept_is_bounded() -> None:
    history = History(recent=3)
    for number in range(10):
        one = job(str(number))
        history.begin(one, Record(one, Timeline()))
        history.end(one)
    assert history.find("6") is None
    assert history.find("7") is not None
    assert history.find("9") is not None
    assert history.find("unheard of") is None


async def test_a_request_under_way_is_not_forgotten_for_others_that_end() -> None:
    history, long = History(recent=1), job("long")
    history.begin(long, Record(long, Timeline()))
    for number in range(5):
        one = job(str(number))
        history.begin(one, Record(one, Timeline()))
        history.end(one)
    assert history.find("long") is not None


async def test_a_record_keeps_the_first_and_the_last_of_too_many_events() -> None:
    record = Record(job(), Timeline())
    for number in range(50):
        record.placed(Placement(f"p{number}", None, FORECAST, Reason("")))
        record.failed(f"cause {number}")
    for _ in range(200):
        record.became(State.PLACED)
    shown = record.shown()
    assert len(shown["placements"]) == MOST_PLACEMENTS
    assert shown["placements"][0]["prefill"] == "p0"
    assert shown["placements"][-1]["prefill"] == "p49"
    assert len(shown["states"]) == MOST_EVENTS
    assert shown["failures"][-1]["cause"] == "cause 49"
    assert shown["events_dropped"] == 42 + 136
