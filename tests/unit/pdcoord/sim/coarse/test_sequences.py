"""The set of those that decode: its sums are those of its members, step by step."""

from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from pdcoord.sim.coarse.sequences import Decoders, Sequence, Stage
from pdcoord.sim.workload.call import Call, CallId


def member(prompt: int, goal: int) -> Sequence:
    """A sequence whose prompt is computed and whose first token is out."""
    sequence = Sequence(Call(CallId(0), 0.0, prompt, goal), None)
    sequence.computed, sequence.output = prompt, 1
    return sequence


def test_who_joins_late_ends_in_its_own_time() -> None:
    decoders = Decoders(4)
    first, second = member(5, 6), member(7, 3)
    decoders.join(first)
    assert (decoders.steps_left(), decoders.context_tokens) == (5, 5)
    decoders.advance(2)
    decoders.join(second)
    assert (decoders.steps_left(), decoders.count, decoders.context_tokens) == (2, 2, 14)
    decoders.advance(2)
    assert decoders.pop_ended() is second
    decoders.leave(second)
    assert (second.computed, second.output, second.known) == (9, 3, 10)
    assert decoders.pop_ended() is None
    decoders.leave(first)
    assert (first.computed, first.output) == (9, 5)
    # One that left before its end may join again, and ends once.
    decoders.join(first)
    decoders.advance(1)
    assert decoders.pop_ended() is first
    decoders.leave(first)
    assert (decoders.count, decoders.context_tokens, decoders.steps_left()) == (0, 0, 0)
    decoders.validate([])
    assert first.stage is Stage.DECODING


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(2, 50)), min_size=1, max_size=12),
    st.integers(1, 9),
    st.integers(0, 30),
    st.integers(0, 40),
)
def test_blocks_of_many_steps_are_those_of_each_member(
    prompts: list[tuple[int, int]], block_tokens: int, first: int, step_count: int
) -> None:
    decoders = Decoders(block_tokens)
    members = []
    for prompt, goal in prompts:
        members.append(member(prompt, goal))
        decoders.join(members[-1])
        decoders.advance(1)
    decoders.validate(members)
    computed = [one.computed + decoders.step for one in members]
    expected = sum(
        (tokens + step) % block_tokens == 0
        for tokens in computed
        for step in range(first, first + step_count)
    )
    assert decoders.new_blocks(first, step_count) == expected
    assert sum(map(decoders.needs_block, members)) == decoders.new_blocks(0, 1)


def test_what_a_sequence_is_told_of_a_call(call_of: Callable[..., Call]) -> None:
    call = call_of(1, 100, 20, keys=(1, 2))
    whole, leg = Sequence(call, None), Sequence(call, None, 3, is_prefill_leg=True)
    assert (whole.goal, whole.known, whole.stage) == (20, 100, Stage.WAITING)
    assert (leg.goal, leg.place, leg.keys) == (1, 3, (1, 2))
