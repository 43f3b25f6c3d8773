"""Parts by themselves: what each kind of traffic shares, and that a turn depends on its place alone."""

from collections import Counter
from pathlib import Path

from pdcoord.sim.workload.amounts import Amount, SecondsSpec, TokensSpec
from pdcoord.sim.workload.arrivals import LoadSpec, StagedTimes, StageSpec
from pdcoord.sim.workload.draws import Shares
from pdcoord.sim.workload.parts import Documents, Recorded, Sessions, SharedPrefix
from pdcoord.sim.workload.traces import Row

KEY = 16


def times(count: int, gap_s: float = 1.0) -> StagedTimes:
    stage = StageSpec(rate=1 / gap_s, duration=count * gap_s)
    return StagedTimes(LoadSpec(type="constant", stages=(stage,)), 0)


def tokens(value: float) -> Amount:
    return TokensSpec(type="fixed", value=value).compiled(Path())


def drawn(low: int, high: int) -> Amount:
    return TokensSpec(type="uniform", min=low, max=high).compiled(Path())


def shared_prefix(*, is_multi_turn: bool = False, context_tokens_max: int = 10_000) -> SharedPrefix:
    return SharedPrefix(
        times=times(30),
        seed=5,
        key_tokens=KEY,
        groups=3,
        prompts_per_group=2,
        system_len=tokens(64),
        question_len=drawn(20, 60),
        output_len=drawn(5, 9),
        is_multi_turn=is_multi_turn,
        context_tokens_max=context_tokens_max,
    )


def sessions(context_tokens_max: int = 100_000, turns: Amount | None = None) -> Sessions:
    return Sessions(
        times=times(40),
        seed=5,
        key_tokens=KEY,
        openings=Shares([1.0] * 2),
        opening_count=2,
        opening_len=tokens(100),
        first_len=drawn(20, 60),
        next_len=drawn(1, 30),
        output_len=drawn(5, 50),
        turn_count=turns or drawn(1, 6),
        pause_s=SecondsSpec(type="uniform", min=1, max=2).compiled(Path()),
        context_tokens_max=context_tokens_max,
    )


def test_a_pool_of_shared_prefixes_is_asked_round_and_round() -> None:
    turns = list(shared_prefix().turns())
    assert len(turns) == shared_prefix().call_count == 30
    assert [turn.keys for turn in turns[:6]] == [turn.keys for turn in turns[6:12]]
    assert len({turn.keys for turn in turns}) == 6
    by_group = Counter(turn.keys[:4] for turn in turns[:6])
    assert sorted(by_group.values()) == [2, 2, 2]  # 64 tokens of system prompt are four keys.


def test_users_of_a_shared_prefix_keep_to_the_schedule_or_wait_for_the_answer() -> None:
    part = shared_prefix(is_multi_turn=True)
    first = list(part.turns())
    assert [turn.at_s for turn in first] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    quick = part.after(first[2], first[2].at_s + 0.5)
    slow = part.after(first[2], first[2].at_s + 9.0)
    assert quick is not None
    assert slow is not None
    assert (quick.at_s, slow.at_s) == (8.0, 11.0)
    assert quick.keys == slow.keys
    assert quick.keys[: len(first[2].keys_after)] == first[2].keys_after
    assert quick.prompt_tokens > first[2].prompt_tokens + first[2].output_tokens
    turn, count = first[2], 1
    while (following := part.after(turn, turn.at_s)) is not None:
        turn, count = following, count + 1
    assert count == 5
    assert turn.keys_after == ()


def test_a_conversation_that_would_not_fit_begins_anew() -> None:
    part = shared_prefix(is_multi_turn=True, context_tokens_max=200)
    turn = next(part.turns())
    prompts = [turn.prompt_tokens]
    while (following := part.after(turn, turn.at_s)) is not None:
        turn = following
        prompts.append(turn.prompt_tokens)
    assert len(prompts) == 5
    assert max(prompts) <= 200
    assert prompts.count(prompts[0]) > 1


def test_sessions_grow_turn_by_turn_and_pause_between() -> None:
    part = sessions()
    count = 0
    for turn in part.turns():
        count += 1
        while (following := part.after(turn, 100.0)) is not None:
            assert following.keys[: len(turn.keys_after)] == turn.keys_after
            assert turn.keys_after[: len(turn.keys)] == turn.keys
            assert len(turn.keys_after) == (turn.prompt_tokens + turn.output_tokens) // KEY
            assert 1 <= following.prompt_tokens - turn.prompt_tokens - turn.output_tokens <= 30
            assert 101.0 <= following.at_s <= 102.0
            assert part.after(turn, 100.0) == following
            turn = following  # noqa: PLW2901  # walks along the session
            count += 1
        assert turn.keys_after == ()
    assert count == part.call_count > 40


def test_sessions_share_their_beginnings_and_nothing_else() -> None:
    turns = list(sessions().turns())
    assert len({turn.keys[:6] for turn in turns}) == 2  # 100 tokens are six full keys.
    later = [key for turn in turns for key in turn.keys[6:]]
    assert len(later) == len(set(later)) > 0


def test_a_session_ends_before_it_is_too_long() -> None:
    part = sessions(context_tokens_max=250, turns=tokens(100))
    lengths = []
    for turn in part.turns():
        while (following := part.after(turn, 0.0)) is not None:
            turn = following  # noqa: PLW2901  # walks along the session
        lengths.append(turn.prompt_tokens + turn.output_tokens)
    assert max(lengths) <= 250
    assert min(lengths) > 150  # A turn adds 80 at most, so each went on until the next might not fit.


def test_popular_documents_are_asked_about_more_often() -> None:
    part = Documents(
        times=times(3_000, 0.01),
        seed=5,
        key_tokens=KEY,
        document_count=50,
        popularity=1.0,
        per_question=1,
        system_tokens=32,
        document_len=drawn(100, 300),
        question_len=drawn(16, 40),
        output_len=tokens(10),
    )
    turns = list(part.turns())
    assert len({turn.keys[:2] for turn in turns}) == 1
    asked = Counter(turn.keys[2:8] for turn in turns)
    (_, most), (_, second) = asked.most_common(2)
    assert len(asked) == 50
    assert 1.5 < most / second < 2.6  # 2 by Zipf's law.
    assert all(32 + 100 + 16 <= turn.prompt_tokens <= 32 + 300 + 40 for turn in turns)
    assert len({turn.keys for turn in turns}) == len(turns)


def test_a_recorded_row_shares_what_its_ids_say() -> None:
    rows = [Row(0.0, 1_000, 5, (1, 2)), Row(3.0, 1_500, 5, (1, 2, 3)), Row(6.0, 700, 5, (9, 2))]
    first, second, third = Recorded(rows, 0, 64, rate_factor=2.0).turns()
    assert [turn.at_s for turn in (first, second, third)] == [0.0, 1.5, 3.0]
    assert [len(turn.keys) for turn in (first, second, third)] == [15, 23, 10]
    assert second.keys[:15] == first.keys
    assert not set(third.keys) & set(second.keys)
    unknown = list(Recorded([Row(0.0, 640, 5), Row(0.0, 640, 5)], 0, 64, 1.0).turns())
    assert len({key for turn in unknown for key in turn.keys}) == 20
