"""What is placed is booked until it ends, so that requests placed at once see each other."""

import msgspec
import pytest

from backends.protocol import Role
from gateway.placement import Booking, Books, Placement, Snapshot, Wish, WorkerView, place
from tests.placement.desk import info, wish

ROLES: dict[str, Role] = {"p1": "prefill", "p2": "prefill", "d1": "decode", "d2": "decode"}


class Site:
    """Books of four workers, and a clock."""

    def __init__(self, roles: dict[str, Role] = ROLES) -> None:
        self.now = 100.0
        self.roles = roles
        self.freed = 0
        self.books = Books(self._on_freed)

    def _on_freed(self) -> None:
        self.freed += 1

    def view(self, name: str) -> WorkerView:
        return self.books.view(name, self.roles[name], info(), self.now)

    def snapshot(self) -> Snapshot:
        pairs = frozenset(
            (one, other)
            for one in self.roles
            for other in self.roles
            if one != other and self.roles[one] != "decode" and self.roles[other] != "prefill"
        )
        return self.books.snapshot(map(self.view, self.roles), pairs)

    def place(self, wanted: Wish) -> Booking:
        answer = place(self.snapshot(), wanted)
        assert isinstance(answer, Placement), answer
        return self.books.place(answer, wanted, 16, self.now)


def test_requests_placed_in_the_same_instant_go_different_ways() -> None:
    site = Site()
    first, second = site.place(wish()), site.place(wish())
    assert {first.prefill, second.prefill} == {"p1", "p2"}
    assert {first.decode, second.decode} == {"d1", "d2"}


def test_a_third_sees_both_and_goes_behind_the_shorter() -> None:
    site = Site()
    long, short = site.place(wish(tokens=8000)), site.place(wish(tokens=500))
    third = site.place(wish())
    assert third.prefill == short.prefill != long.prefill
    assert site.view(long.prefill).queued_tokens == 8000
    assert site.view(short.prefill).queued_tokens == 1500


def test_waiting_ends_with_time_and_with_first_tokens() -> None:
    site = Site()
    bookings = [site.place(wish(tokens=2000)) for _ in range(4)]
    on_p1 = [it for it in bookings if it.prefill == "p1"]
    seconds = on_p1[0].prefill_seconds
    assert site.view("p1").queued_seconds == pytest.approx(2 * seconds)
    site.now += seconds / 2
    assert site.view("p1").queued_seconds == pytest.approx(1.5 * seconds)
    on_p1[0].prefilled(seconds / 2, site.now)
    assert site.view("p1").queued_seconds == pytest.approx(seconds)
    on_p1[0].prefilled(seconds / 2, site.now)  # told twice
    on_p1[1].prefilled(seconds, site.now)
    assert site.view("p1").queued_seconds == 0.0
    assert site.view("p1").queued_tokens == 0


def test_a_prefill_that_takes_too_long_still_has_all_others_behind_it() -> None:
    site = Site({"p1": "prefill", "d1": "decode"})
    one, other = site.place(wish(tokens=2000)), site.place(wish(tokens=2000))
    site.now += 100.0
    assert site.view("p1").queued_seconds == pytest.approx(other.prefill_seconds)
    one.prefilled(100.0, site.now)
    assert site.view("p1").queued_seconds == pytest.approx(other.prefill_seconds)


def test_one_that_leaves_from_the_middle_leaves_the_others_their_places() -> None:
    site = Site({"p1": "prefill", "d1": "decode"})
    one, middle, last = (site.place(wish(tokens=2000)) for _ in range(3))
    site.now += one.prefill_seconds / 2
    middle.end(site.now)
    left = one.prefill_seconds / 2 + last.prefill_seconds
    assert site.view("p1").queued_seconds == pytest.approx(left)


def test_decode_room_is_booked_from_the_placement_to_the_end() -> None:
    site = Site({"p1": "prefill", "d1": "decode"})
    booking = site.place(wish(tokens=1000, sequences=3, expected=100))
    seen = site.view("d1")
    assert seen.running == 3
    assert seen.context == 3 * 1050
    assert seen.free_blocks == 4096 - 69 - 2 * 7
    booking.prefilled(0.1, site.now)
    booking.landed()
    assert site.view("d1") == seen
    booking.end(site.now)
    booking.end(site.now)  # told twice
    assert (site.view("d1").running, site.view("d1").free_blocks) == (0, 4096)
    assert site.freed == 1


def test_a_link_is_booked_until_the_landing() -> None:
    site = Site({"p1": "prefill", "d1": "decode"})
    booking = site.place(wish())
    pair = "p1", "d1"
    assert site.snapshot().links[pair].queued_seconds == pytest.approx(booking.link_seconds)
    booking.prefilled(0.1, site.now)
    assert site.snapshot().links[pair].queued_seconds > 0
    booking.landed()
    assert site.snapshot().links[pair].queued_seconds == 0
    site.place(wish()).end(site.now)
    assert site.snapshot().links[pair].queued_seconds == 0


def test_the_work_of_other_gateways_shows_in_what_workers_say() -> None:
    site = Site({"p1": "prefill", "d1": "decode"})
    site.place(wish(tokens=1000))
    site.books.told("p1", waiting_tokens=5000, running=0, free_blocks=4096)
    site.books.told("d1", waiting_tokens=0, running=10, free_blocks=3000)
    assert site.view("p1").queued_tokens == 5000
    assert site.view("d1").running == 10
    assert site.view("d1").free_blocks == 3000
    site.place(wish(tokens=1600, expected=160))
    assert site.view("p1").queued_tokens == 6600
    assert site.view("d1").running == 11
    assert site.view("d1").free_blocks == 3000 - 110


def test_ones_own_work_is_not_taken_for_that_of_others_when_it_ends() -> None:
    site = Site({"p1": "prefill", "d1": "decode"})
    booking = site.place(wish(tokens=1000))
    site.books.told("p1", waiting_tokens=1000, running=0, free_blocks=4096)
    booking.prefilled(0.1, site.now)
    assert site.view("p1").queued_tokens == 0


def test_prefill_teaches_what_prefill_takes() -> None:
    site = Site({"p1": "prefill", "d1": "decode"})
    site.books.told("p1", waiting_tokens=0, running=0, free_blocks=4096)
    for _ in range(30):
        booking = site.place(wish(tokens=1000))
        site.now += 0.5
        booking.prefilled(0.5, site.now)
        booking.handed_over(1 << 20, 0.25)
        booking.landed()
        booking.end(site.now)
    assert site.view("p1").prefill.seconds(1000) == pytest.approx(0.5, rel=0.1)
    assert site.snapshot().links["p1", "d1"].cost.seconds(1 << 20) == pytest.approx(0.25, rel=0.1)


def test_prompts_that_share_a_step_are_not_each_taken_to_last_as_long_as_it() -> None:
    site = Site({"p1": "prefill", "d1": "decode"})
    site.books.told("p1", waiting_tokens=0, running=0, free_blocks=4096)
    for _ in range(30):
        together = [site.place(wish(tokens=100)) for _ in range(5)]
        site.now += 0.5
        for booking in together:
            booking.prefilled(0.5, site.now)
            booking.end(site.now)
    for _ in range(5):
        site.place(wish(tokens=100))
    assert site.view("p1").queued_seconds == pytest.approx(0.5, rel=0.1)


def test_steps_teach_while_sequences_are_decoded_and_not_over_a_rest() -> None:
    site = Site({"p1": "prefill", "d1": "decode"})

    def decoding() -> Booking:
        booking = site.place(wish(tokens=1000, expected=0))
        booking.prefilled(0.1, site.now)
        booking.landed()
        return booking

    booking = decoding()
    site.books.stepped("d1", 256, 7.0)  # it was idle before
    assert site.view("d1").step.seconds(1, 1000) == pytest.approx(0.02, rel=0.1)
    for _ in range(10):
        site.books.stepped("d1", 256, 0.08)
    assert site.view("d1").step.seconds(1, 1000) == pytest.approx(0.08, rel=0.1)
    booking.end(site.now)
    decoding()
    for _ in range(3):
        site.books.stepped("d1", 256, 0.08)
    assert site.view("d1").step.seconds(1, 1000) == pytest.approx(0.08, rel=0.1)


def test_sequences_beyond_the_largest_batch_are_not_taken_for_part_of_a_step() -> None:
    site = Site({"p1": "prefill", "d1": "decode"})
    site.books.told("d1", waiting_tokens=0, running=0, free_blocks=4096)
    many = [site.place(wish(tokens=100, expected=0)) for _ in range(20)]
    for booking in many:
        booking.prefilled(0.1, site.now)
        booking.landed()
    for _ in range(40):
        site.books.stepped("d1", 10, 0.05)
    assert site.view("d1").step.seconds(10, 1000) == pytest.approx(0.05, rel=0.1)


def test_a_worker_that_is_gone_leaves_nothing_behind() -> None:
    site = Site({"p1": "prefill", "d1": "decode"})
    booking = site.place(wish())
    site.books.told("d1", waiting_tokens=0, running=5, free_blocks=10)
    site.books.forget("p1")
    site.books.forget("d1")
    booking.end(site.now)
    assert site.books._accounts == {}
    assert site.books._links == {}


def test_handoffs_that_take_no_time_end_beside_each_other() -> None:
    """A rounding error is no booking: what is left of a pair's time may be none before the last."""
    site = Site({"p1": "prefill", "d1": "decode"})
    wanted = wish(tokens=16)
    answer = place(site.snapshot(), wanted)
    assert isinstance(answer, Placement)
    quick = msgspec.structs.replace(
        answer, forecast=msgspec.structs.replace(answer.forecast, handoff=0.0)
    )
    bookings = [site.books.place(quick, wanted, 16, site.now) for _ in range(3)]
    for booking in bookings:
        booking.end(site.now)
    assert site.freed == 3
