"""What sequences hold: all of a prompt's room or none of it, and what they leave behind."""

from collections.abc import Callable

from pdcoord.sim.coarse.holdings import Holdings
from pdcoord.sim.coarse.pool import TokenPool
from pdcoord.sim.coarse.sequences import Sequence, Stage
from pdcoord.sim.workload.call import Call


def computed(holdings: Holdings, sequence: Sequence, tokens: int) -> None:
    """Let a sequence compute up to so many tokens."""
    needed = holdings.missing(sequence, tokens - sequence.computed)
    holdings.pool.take(needed)
    sequence.allocated += needed
    sequence.computed = tokens
    holdings.store(sequence)


def test_a_prompt_finds_what_one_before_it_left(call_of: Callable[..., Call]) -> None:
    holdings = Holdings(TokenPool(256, 16, 16))
    first = Sequence(call_of(1, 40, 5, keys=(1, 2)), None)
    assert holdings.take_beginning(first)
    assert (first.cached_tokens, first.allocated) == (0, 0)
    computed(holdings, first, 40)
    assert (first.allocated, first.named, first.stored_keys) == (48, [1, 2], 2)
    holdings.drop(first)
    assert first.stage is Stage.OVER
    assert (holdings.pool.held_tokens, holdings.pool.idle_tokens) == (0, 32)
    second = Sequence(call_of(2, 50, 5, keys=(1, 2, 3)), None)
    assert holdings.take_beginning(second)
    assert (second.cached_tokens, second.computed, second.allocated) == (32, 32, 32)
    holdings.validate([(second, 32)])


def test_the_last_token_is_always_computed(call_of: Callable[..., Call]) -> None:
    holdings = Holdings(TokenPool(256, 16, 16))
    first = Sequence(call_of(1, 32, 5, keys=(1, 2)), None)
    assert holdings.take_beginning(first)
    computed(holdings, first, 32)
    holdings.drop(first)
    same = Sequence(call_of(2, 32, 5, keys=(1, 2)), None)
    assert holdings.take_beginning(same)
    assert same.cached_tokens == 16


def test_what_does_not_fit_takes_nothing(call_of: Callable[..., Call]) -> None:
    holdings = Holdings(TokenPool(64, 16, 16))
    first = Sequence(call_of(1, 40, 5, keys=(1, 2)), None)
    assert holdings.take_beginning(first)
    computed(holdings, first, 40)
    second = Sequence(call_of(2, 60, 5, keys=(1, 2, 3)), None)
    assert not holdings.take_beginning(second)
    assert (second.allocated, second.named, second.cached_tokens) == (0, [], None)
    holdings.validate([(first, 48)])


def test_a_fetch_takes_room_for_all_of_its_prompt(call_of: Callable[..., Call]) -> None:
    holdings = Holdings(TokenPool(64, 16, 16))
    pull = Sequence(call_of(1, 40, 5), None, awaits_fetch=True)
    assert holdings.take_beginning(pull)
    assert (pull.allocated, holdings.pool.held_tokens) == (48, 48)
    holdings.drop(pull)
    assert (holdings.pool.held_tokens, holdings.pool.idle_tokens) == (0, 0)


def test_one_that_was_preempted_finds_its_own_answer_again(call_of: Callable[..., Call]) -> None:
    holdings = Holdings(TokenPool(256, 16, 16))
    sequence = Sequence(call_of(1, 40, 60, keys=(1, 2)), None)
    assert holdings.take_beginning(sequence)
    computed(holdings, sequence, 70)
    sequence.output = 31
    holdings.drop(sequence)
    assert sequence.run is not None
    # Of 70 tokens 4 full blocks stay: two by their keys, two as a run; a stranger takes the last of them.
    holdings.pool.take(256 - 48)
    sequence.computed = 0
    assert not holdings.take_beginning(sequence)
    holdings.pool.held_tokens -= 256 - 48
    assert holdings.take_beginning(sequence)
    assert (sequence.computed, sequence.allocated, sequence.cached_tokens) == (48, 48, 0)
