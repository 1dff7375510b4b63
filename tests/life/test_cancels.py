"""A cancel in any state frees all blocks on both sides."""

from tests.life.cancels import AIM_SECONDS, STATES, measure, shown


async def test_a_cancel_in_any_state_frees_all_blocks_on_both_sides(redis_url: str) -> None:
    """That it takes no longer than it should is printed; a busy machine is no fault."""
    times = await measure(redis_url, count=100, seed=5)
    assert {state for state, _ in times} == set(STATES)
    late = [took for found in times.values() for took in found if took > AIM_SECONDS]
    print(shown(times), f"over {AIM_SECONDS} s: {len(late)}", sep="\n")
