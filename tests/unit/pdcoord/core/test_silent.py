"""Counters of engines held against what sidecars tell."""

from hypothesis import given
from hypothesis import strategies as st

from pdcoord.core.fleet import EndpointId, Sample
from pdcoord.core.paths import OPEN_S_MAX, BreakerState, PathTable
from pdcoord.core.request import RequestId
from pdcoord.core.silent import JUDGED_MIN, Judgement, SilentFailures

P, Q, D = EndpointId("p"), EndpointId("q"), EndpointId("d")


def sample(
    failed: int | None = None,
    pulled: int | None = None,
    computed: int | None = None,
    arrived: int | None = None,
) -> Sample:
    return Sample(
        0,
        0,
        0.0,
        0.0,
        failed_pulls=failed,
        arrived_pulls=arrived,
        pulled_tokens=pulled,
        computed_tokens=computed,
    )


def begun(failed: int | None = 0, pulled: int | None = 0) -> SilentFailures:
    silent = SilentFailures()
    assert silent.sampled(D, sample(failed, pulled, 0)) == Judgement()
    return silent


def answer(silent: SilentFailures, *prefills: EndpointId) -> None:
    for prefill in prefills:
        silent.answered(prefill, D, 1_000)


def test_failed_pulls_speak_against_the_one_path_that_was_used_meanwhile() -> None:
    silent = begun()
    answer(silent, P, P, P)
    assert silent.sampled(D, sample(2, 1_000)) == Judgement(bad=((P, D),))
    assert silent.sampled(D, sample(2, 1_000)) == Judgement()


def test_pulls_that_others_asked_for_and_that_failed_are_not_held_against_a_path_that_works() -> None:
    silent = SilentFailures()
    silent.sampled(D, sample(0, arrived=0))
    answer(silent, P, P, P)
    assert silent.sampled(D, sample(8, arrived=3)) == Judgement()
    answer(silent, P, P, P)
    assert silent.sampled(D, sample(11, arrived=4)) == Judgement(bad=((P, D),))


def test_of_several_paths_none_is_blamed_unless_nearly_all_failed() -> None:
    silent = begun()
    answer(silent, P, P, Q, Q)
    assert silent.sampled(D, sample(2, 2_000)) == Judgement()
    answer(silent, P, P, Q, Q)
    assert silent.sampled(D, sample(6, 2_000)) == Judgement(bad=((P, D), (Q, D)))


def test_a_smaller_share_of_failures_is_chance() -> None:
    silent = begun()
    answer(silent, P, P, P, P)
    assert silent.sampled(D, sample(1, 3_000)) == Judgement()
    answer(silent, P, P, P, Q)
    assert silent.sampled(D, sample(1, 6_000)) == Judgement(good=((P, D), (Q, D)))


def test_tokens_that_never_came_and_were_computed_speak_against_a_path_without_a_counted_failure() -> None:
    silent = begun(failed=None)
    answer(silent, P, P, P)
    assert silent.sampled(D, sample(None, 0, 3_000)) == Judgement(bad=((P, D),))
    answer(silent, P, P, P)
    assert silent.sampled(D, sample(None, 10, 9_000)) == Judgement(good=((P, D),))


def test_tokens_that_were_cached_unknown_to_us_do_not() -> None:
    silent = begun(failed=None)
    answer(silent, P, P, P)
    assert silent.sampled(D, sample(None, 0, 40)) == Judgement(good=((P, D),))


def test_too_few_legs_are_kept_for_the_next_sample() -> None:
    silent = begun()
    answer(silent, *[P] * (JUDGED_MIN - 1))
    assert silent.sampled(D, sample(2, 0)) == Judgement()
    answer(silent, P)
    assert silent.sampled(D, sample(3, 0)) == Judgement(bad=((P, D),))


def test_an_engine_that_counts_nothing_is_not_judged() -> None:
    silent = SilentFailures()
    answer(silent, P, P, P)
    assert silent.sampled(D, sample()) == Judgement()


def test_counters_that_go_back_begin_anew() -> None:
    silent = begun(failed=50, pulled=9_000)
    answer(silent, P, P, P)
    assert silent.sampled(D, sample(3, 0)) == Judgement()
    answer(silent, P, P, P)
    assert silent.sampled(D, sample(6, 0)) == Judgement(bad=((P, D),))


def test_what_is_gone_is_forgotten() -> None:
    silent = begun()
    answer(silent, P, P, Q)
    silent.forget(P)
    silent.validate({Q, D})
    assert silent.sampled(D, sample(3, 0)) == Judgement(bad=((Q, D),))
    silent.forget(D)
    silent.validate(set())


@given(
    st.lists(
        st.one_of(
            st.sampled_from([P, Q]),
            st.tuples(*[st.none() | st.integers(0, 1 << 60)] * 4),
        ),
        max_size=60,
    )
)
def test_whatever_an_engine_counts_the_account_stays_whole(story: list[object]) -> None:
    silent = SilentFailures()
    for part in story:
        if isinstance(part, tuple):
            judged = silent.sampled(D, sample(*part))
            assert not (judged.bad and judged.good)
        else:
            answer(silent, EndpointId(str(part)))
        silent.validate({P, Q, D})


def test_a_path_that_fails_silently_stays_open_for_longer_each_time() -> None:
    paths, now_s, lengths = PathTable(), 0.0, []
    for _ in range(9):
        paths.fail_silently((P, D), now_s)
        assert paths.state(P, D, now_s) is BreakerState.OPEN
        begin_s = now_s
        while not paths.lets_pass(P, D, now_s):
            now_s += 0.5
        lengths.append(now_s - begin_s)
        # The sidecar of the request that tries it sees a good answer: the engine computed the prompt anew.
        paths.begin(P, D, RequestId("try"))
        assert not paths.lets_pass(P, D, now_s)
        paths.succeed(P, D)
        assert paths.state(P, D, now_s) is BreakerState.HALF_OPEN
        paths.validate({P, D}, set())
    assert lengths == [1, 2, 4, 8, 16, 32, OPEN_S_MAX, OPEN_S_MAX, OPEN_S_MAX]
    paths.work_silently((P, D))
    assert paths.state(P, D, now_s) is BreakerState.CLOSED
    paths.fail_silently((P, D), now_s)
    assert paths.lets_pass(P, D, now_s + 1.0)
    paths.forget(P)
    paths.validate({D}, set())
