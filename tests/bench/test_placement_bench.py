"""The simulation of placement: it repeats itself, ends, and tells policies apart."""

import random

from tests.bench.placement.fleet import fleet_for
from tests.bench.placement.policies import BATON, PEERS, Policy
from tests.bench.placement.shapes import AZURE_CONVERSATION, SHAPES
from tests.bench.placement.site import Site


def play(policy: Policy, load: float, seed: int = 0) -> Site:
    fleet = fleet_for(AZURE_CONVERSATION)
    rate = load * fleet.capacity(AZURE_CONVERSATION, random.Random(0))
    site = Site(fleet, AZURE_CONVERSATION, policy, rate, 800, seed)
    site.run()
    return site


def in_time(site: Site) -> int:
    return sum(request.in_time for request in site.requests)


def test_a_seed_plays_the_same_again() -> None:
    one, same, other = (play(BATON, 1.5, seed) for seed in (1, 1, 2))
    assert [it.ended for it in one.requests] == [it.ended for it in same.requests]
    assert [it.ended for it in one.requests] != [it.ended for it in other.requests]


def test_everything_ends_and_nothing_stays_booked() -> None:
    site = play(BATON, 1.5)
    assert all((it.ended is None) == bool(it.refused) for it in site.requests)
    assert (site._prefilling, site._decoding, site._queued_tokens) == (0, 0, 0)
    for worker in site._snapshot().workers:
        assert (worker.queued_tokens, worker.running, worker.context) == (0, 0, 0)
    assert all(machine.used_blocks == machine.running == 0 for machine in site._machines.values())


def test_all_are_in_time_at_half_load_and_more_with_placement_in_overload() -> None:
    first_come = PEERS[0]
    assert in_time(play(BATON, 0.5)) == in_time(play(first_come, 0.5)) == 800
    assert in_time(play(BATON, 1.5)) > 1.1 * in_time(play(first_come, 1.5))


def test_drawn_lengths_are_those_of_the_trace() -> None:
    """Means of the traces themselves, in tokens."""
    known = {"Azure conversation": (1155, 211), "Azure code": (2048, 28),
             "Mooncake conversation": (12035, 343)}  # fmt: skip
    for shape in SHAPES:
        rng = random.Random(0)
        drawn = [shape.lengths(rng) for _ in range(20_000)]
        for place, mean in enumerate(known[shape.name]):
            assert 0.9 < sum(it[place] for it in drawn) / len(drawn) / mean < 1.1
