"""Transcripts of one publisher's numbers, and random losses against what the publisher has."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdcoord.feeds.kvsequence import (
    WHOLE_REPLAYS_MAX,
    Action,
    Batch,
    BatchSequence,
    Clear,
    Count,
    Deliver,
    Lose,
    Replay,
)


def batch(number: int, process: str = "a") -> Batch:
    return Batch(number, f"{process}{number}".encode())


def batches(first: int, end: int, process: str = "a") -> list[Batch]:
    return [batch(number, process) for number in range(first, end)]


def shown(actions: list[Action]) -> list[str]:
    """Actions in short: what is delivered by its payload, the rest by name."""
    words = []
    for action in actions:
        match action:
            case Deliver(payload):
                words.append(payload.decode())
            case Clear():
                words.append("clear")
            case Lose():
                words.append("lose")
            case Count(trouble):
                words.append(f"({trouble})")
            case Replay(first):
                words.append(f"from {first}")
    return words


def test_without_replay_numbers_alone_tell() -> None:
    own = BatchSequence(has_replay=False)
    assert shown(own.connected()) == []
    assert shown(own.check()) == []
    assert shown(own.received(batch(0))) == ["clear", "a0"]
    assert shown(own.received(batch(1))) == ["a1"]
    assert shown(own.received(batch(3))) == ["(gap)", "(lost)", "lose", "a3"]
    # After a break it may be another process, whatever the number.
    assert shown(own.connected()) == []
    assert shown(own.received(batch(4))) == ["(lost)", "lose", "a4"]
    assert shown(own.received(batch(5))) == ["a5"]
    assert shown(own.connected()) == []
    assert shown(own.received(batch(0, "b"))) == ["(restart)", "clear", "b0"]
    assert shown(own.received(batch(1, "b"))) == ["b1"]
    assert shown(own.received(batch(9, "b"))) == ["(gap)", "(lost)", "lose", "b9"]
    assert shown(own.received(batch(4, "c"))) == ["(restart)", "(lost)", "lose", "c4"]
    assert own.next_number == 5


def test_a_late_subscriber_without_replay_lacks_the_beginning() -> None:
    own = BatchSequence(has_replay=False)
    assert shown(own.received(batch(7))) == ["(lost)", "lose", "a7"]
    assert shown(own.received(batch(8))) == ["a8"]


def test_a_replay_gives_the_beginning_and_what_it_covers_is_not_taken_twice() -> None:
    own = BatchSequence(has_replay=True)
    assert shown(own.connected()) == ["(replay)", "from 0"]
    assert shown(own.replayed(batches(0, 3))) == ["clear", "a0", "a1", "a2"]
    # Published while the replay ran.
    assert shown(own.received(batch(1))) == []
    assert shown(own.received(batch(2))) == []
    assert shown(own.received(batch(3))) == ["a3"]
    assert shown(own.received(batch(0, "b"))) == ["(restart)", "clear", "b0"]


def test_a_publisher_that_said_nothing_yet_is_empty() -> None:
    own = BatchSequence(has_replay=True)
    own.connected()
    assert shown(own.replayed([])) == ["clear"]
    assert shown(own.received(batch(0))) == ["a0"]


def test_a_gap_is_filled() -> None:
    own = BatchSequence(has_replay=True)
    own.received(batch(0))
    assert shown(own.received(batch(4))) == ["(gap)", "(replay)", "from 0"]
    assert shown(own.replayed(batches(0, 6))) == ["a1", "a2", "a3", "a4", "a5"]
    assert shown(own.received(batch(5))) == []
    assert shown(own.received(batch(6))) == ["a6"]


def test_a_replay_that_ends_before_what_was_heard_goes_on_with_it() -> None:
    own = BatchSequence(has_replay=True)
    own.received(batch(0))
    own.received(batch(2))
    assert shown(own.replayed(batches(0, 2))) == ["a1", "a2"]


def test_a_gap_past_what_is_kept_loses_and_takes_what_there_is() -> None:
    own = BatchSequence(has_replay=True)
    own.received(batch(0))
    own.received(batch(50))
    assert shown(own.replayed(batches(40, 51))) == ["(replay)", "from 0"]
    assert shown(own.replayed(batches(40, 51)))[:3] == ["(lost)", "lose", "a40"]
    assert own.next_number == 51
    # The beginning is gone: nobody asks for it again.
    assert shown(own.check()) == ["(replay)", "from 50"]
    assert shown(own.replayed(batches(50, 51))) == []


def test_another_process_is_known_by_its_last_batch() -> None:
    own = BatchSequence(has_replay=True)
    for number in range(3):
        own.received(batch(number))
    assert shown(own.connected()) == ["(replay)", "from 2"]
    assert shown(own.replayed(batches(2, 9, "b"))) == ["(restart)", "(replay)", "from 0"]
    assert shown(own.replayed(batches(0, 2, "b"))) == ["clear", "b0", "b1"]
    # And where it has not come so far.
    assert shown(own.connected()) == ["(replay)", "from 1"]
    assert shown(own.replayed([])) == ["(restart)", "(replay)", "from 0"]
    assert shown(own.replayed([])) == ["clear"]


def test_after_a_break_the_next_number_alone_proves_nothing() -> None:
    own = BatchSequence(has_replay=True)
    own.received(batch(0))
    own.connected()
    assert shown(own.replay_failed()) == ["(replay-failed)"]
    assert shown(own.received(batch(1, "b"))) == ["(replay)", "from 0"]
    assert shown(own.replayed(batches(0, 2, "b"))) == ["(restart)", "(replay)", "from 0"]
    assert shown(own.replayed(batches(0, 2, "b"))) == ["clear", "b0", "b1"]
    own.connected()
    own.replay_failed()
    own.received(batch(2, "c"))
    assert shown(own.replay_failed()) == ["(replay-failed)", "(lost)", "lose", "c2"]


def test_a_failed_replay_loses_and_is_tried_again_a_few_times() -> None:
    own = BatchSequence(has_replay=True)
    own.received(batch(0))
    own.received(batch(2))
    assert shown(own.replay_failed()) == ["(replay-failed)", "(lost)", "lose", "a2"]
    for _ in range(WHOLE_REPLAYS_MAX):
        assert shown(own.check()) == ["(replay)", "from 0"]
        assert shown(own.replay_failed()) == ["(replay-failed)"]
    assert shown(own.check()) == ["(replay)", "from 2"]


def test_replays_with_holes_are_tried_a_few_times() -> None:
    own = BatchSequence(has_replay=True)
    own.received(batch(0))
    own.received(batch(2))
    own.replay_failed()
    for _ in range(WHOLE_REPLAYS_MAX):
        assert shown(own.check()) == ["(replay)", "from 0"]
        own.replayed([batch(0), batch(2)])
    assert shown(own.check()) == ["(replay)", "from 2"]


def test_a_later_replay_makes_it_whole_again() -> None:
    own = BatchSequence(has_replay=True)
    own.received(batch(0))
    own.received(batch(2))
    own.replay_failed()
    own.check()
    assert shown(own.replayed([batch(0), batch(2)])) == ["clear", "a0", "(lost)", "lose", "a2"]
    own.check()
    assert shown(own.replayed(batches(0, 3))) == ["clear", "a0", "a1", "a2"]
    assert shown(own.check()) == ["(replay)", "from 2"]
    assert shown(own.replayed(batches(2, 3))) == []


def test_a_failed_first_replay_waits_for_what_comes() -> None:
    own = BatchSequence(has_replay=True)
    own.connected()
    assert shown(own.replay_failed()) == ["(replay-failed)"]
    assert shown(own.received(batch(5))) == ["(replay)", "from 0"]
    assert shown(own.replay_failed()) == ["(replay-failed)", "(lost)", "lose", "a5"]


@pytest.mark.parametrize("has_replay", [False, True])
@given(
    heard=st.lists(st.booleans(), max_size=40),
    kept=st.integers(1, 50),
    restarts=st.sets(st.integers(0, 39), max_size=2),
    fails=st.lists(st.booleans(), max_size=10),
)
def test_what_is_known_is_what_was_published_since_the_last_forgetting(
    *, has_replay: bool, heard: list[bool], kept: int, restarts: set[int], fails: list[bool]
) -> None:
    """Whatever is lost on the way: after a Clear everything is known in order, after a Lose a run of it."""
    own = BatchSequence(has_replay=has_replay)
    process, published = 0, list[Batch]()
    known: list[bytes] = []
    is_whole = False
    failures = iter(fails)

    def follow(actions: list[Action]) -> None:
        nonlocal is_whole
        for action in actions:
            match action:
                case Deliver(payload):
                    known.append(payload)
                case Clear() | Lose():
                    known.clear()
                    is_whole = isinstance(action, Clear)
                case Replay(first):
                    if next(failures, False):
                        follow(own.replay_failed())
                    else:
                        follow(own.replayed([each for each in published[-kept:] if each.number >= first]))
                case Count():
                    pass

    for step, is_heard in enumerate(heard):
        if step in restarts:
            process += 1
            published = []
            follow(own.connected())
        one = batch(len(published), f"p{process}-")
        published.append(one)
        if not is_heard:
            continue
        follow(own.received(one))
        payloads = [each.payload for each in published]
        assert known[-1] == one.payload
        if is_whole:
            assert known == payloads
        else:
            assert known == payloads[-len(known) :]
