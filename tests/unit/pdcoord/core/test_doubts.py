"""Samples held against the account: what is believed, what is not, and what stands in for it."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from pdcoord.core.doubts import ENDED_MIN, SAMPLES_MIN, Doubt, Doubts
from pdcoord.core.fleet import EndpointId, Sample
from pdcoord.core.ledger import Load

A = EndpointId("a")


def sample(running: int = 0, computed: int | None = None, usage: float = 0.1, at_s: float = 0.0) -> Sample:
    return Sample(running, 0, usage, at_s, kv_tokens=1_000, computed_tokens=computed)


def load(streaming: int = 0, ended: int = 0, waiting: int = 0, context: int = 0) -> Load:
    return Load(
        request_count=streaming + waiting,
        streaming_count=streaming,
        ended_count=ended,
        context_tokens=context,
    )


class Story:
    def __init__(self) -> None:
        self.doubts = Doubts()
        self.now_s = 0.0

    def take(self, taken: Sample, account: Load) -> Sample:
        self.now_s += 0.2
        found = self.doubts.sampled(A, replace(taken, at_s=self.now_s), account)
        self.doubts.validate({A})
        return found

    @property
    def doubt(self) -> Doubt | None:
        return self.doubts.doubt(A)


def test_an_engine_that_counts_nothing_where_streams_go_on_is_not_believed() -> None:
    story, account = Story(), load(streaming=3, waiting=2, context=400)
    story.take(sample(), account)
    for _ in range(SAMPLES_MIN - 1):
        assert story.take(sample(), account).running == 0
    believed = story.take(sample(usage=0.0), account)
    assert story.doubt is Doubt.DENIES
    assert (believed.running, believed.waiting, believed.kv_usage) == (3, 2, 0.4)
    assert (believed.at_s, believed.kv_tokens) == (story.now_s, 1_000)
    assert (believed.failed_pulls, believed.computed_tokens) == (None, None)


def test_it_is_believed_again_once_it_counts() -> None:
    story, account = Story(), load(streaming=1)
    for _ in range(SAMPLES_MIN + 1):
        story.take(sample(), account)
    assert story.doubt is Doubt.DENIES
    assert story.take(sample(running=1), account).running == 1
    assert story.doubt is None


def test_streams_that_come_and_go_between_samples_contradict_nothing() -> None:
    story = Story()
    for ended in range(50):
        story.take(sample(usage=ended / 100), load(streaming=1, ended=ended))
    assert story.doubt is None


def test_figures_that_stay_the_same_while_requests_end_are_stale() -> None:
    story = Story()
    for ended in range(10):
        story.take(sample(running=4, computed=77), load(ended=ended))
    assert story.doubt is Doubt.STALE
    believed = story.take(sample(running=4, computed=77), load(streaming=1, ended=11))
    assert (believed.running, believed.waiting) == (1, 0)
    assert story.take(sample(running=4, computed=78), load(ended=12)).running == 4
    assert story.doubt is None


def test_an_idle_engine_may_say_the_same_for_ever() -> None:
    story = Story()
    for _ in range(100):
        story.take(sample(computed=77), load())
    assert story.doubt is None
    for ended in range(100):
        story.take(sample(), load(ended=ended))
    assert story.doubt is None, "it has no counter that could have moved"


def test_another_process_starts_without_doubt() -> None:
    story = Story()
    for _ in range(SAMPLES_MIN + 1):
        story.take(sample(), load(streaming=1))
    story.doubts.forget(A)
    assert story.doubt is None
    assert story.take(sample(), load(streaming=1)).running == 0


@given(
    st.lists(
        st.tuples(st.integers(0, 4), st.integers(0, 3), st.integers(0, 2), st.integers(0, 3)), max_size=60
    )
)
def test_an_engine_that_counts_what_is_there_is_always_believed(
    steps: list[tuple[int, int, int, int]],
) -> None:
    """Whatever streams, ends and is computed: a true sample stays as it is."""
    story, ended, computed = Story(), 0, 0
    for streaming, newly_ended, others, tokens in steps:
        ended += newly_ended
        computed += newly_ended + tokens
        taken = replace(sample(running=streaming + others, computed=computed), at_s=story.now_s + 0.2)
        assert story.take(taken, load(streaming=streaming, ended=ended)) == replace(taken, at_s=story.now_s)
    assert story.doubt is None
    assert ENDED_MIN > 1
