"""Learned speed: how soon it is right, whom it drags along, and that nonsense leaves it as it was."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdcoord.core import learned
from pdcoord.core.costs import SpeedFigures
from pdcoord.core.fleet import (
    Endpoint,
    EndpointId,
    EndpointSeen,
    EngineKind,
    Fleet,
    ModelName,
    Pool,
    PoolName,
    Role,
    Sample,
    SampleTaken,
)
from pdcoord.core.learned import LearnedSpeed
from pdcoord.core.ledger import Ledger
from pdcoord.core.model import Disaggregation, Model
from pdcoord.core.observations import (
    Observation,
    ObservationKind,
    OutputSeen,
    PrefillSeen,
    StepsSeen,
    TransferSeen,
)
from pdcoord.core.paths import PathTable
from pdcoord.core.plan import Why
from pdcoord.core.prefixes import Prefixes
from pdcoord.core.request import Request, RequestId
from pdcoord.core.scheduler import Choice, Scheduler
from pdcoord.core.speed import PATH_LATENCY_S
from pdcoord.protocol.headers import HostPort
from transfer.layout import KvLayout
from transfer.verdict import Connector, Side

M = ModelName("m")
SEED = SpeedFigures(0.01, 1e-4, 0.01, 0.0, 2e-8, 3e-5)
TRUE = SpeedFigures(0.02, 2.5e-4, 0.014, 2e-9, 4e-8, 8e-5)
TOKENS = (300, 1_000, 2_000, 4_000, 8_000, 16_000)


def pool(name: str = "p", role: Role = Role.BOTH, speed: SpeedFigures = SEED, link: float = 1e10) -> Pool:
    side = Side(Connector.PDCOORD, KvLayout(16))
    return Pool(PoolName(name), M, role, "v", EngineKind.VLLM, side, speed, 1_000, link)


POOL = pool()


def endpoint(index: int = 0, of: Pool = POOL) -> Endpoint:
    return Endpoint(EndpointId(f"{of.name}/{index}"), of, HostPort(f"{of.name}-{index}:80"))


def told(rng: random.Random, true_s: float, noise: float = 0.1, outlier_share: float = 0.05) -> float:
    """A time with some noise, and now and then one that is quite wrong."""
    seen_s = true_s * math.exp(rng.gauss(0.0, noise))
    return seen_s * rng.choice([0.1, 5.0, 10.0]) if rng.random() < outlier_share else seen_s


def prefills(
    speed: LearnedSpeed, rng: random.Random, at: Endpoint, count: int, factor: float = 1.0, **more: float
) -> None:
    """As the seed says, times a factor."""
    for _ in range(count):
        tokens = rng.choice(TOKENS)
        took_s = told(rng, factor * SEED.prefill_s(tokens), **more)
        speed.learn(PrefillSeen(at, tokens, took_s, is_alone=True))


def true_prefills(speed: LearnedSpeed, rng: random.Random, at: Endpoint, count: int) -> None:
    """As TRUE says, unlike the seed in level and shape."""
    for _ in range(count):
        tokens = rng.choice(TOKENS)
        speed.learn(PrefillSeen(at, tokens, told(rng, TRUE.prefill_s(tokens)), is_alone=True))


def test_before_anything_was_seen_it_is_the_policys() -> None:
    speed, at = LearnedSpeed(), endpoint()
    assert speed.prefill_s(at, 1_000) == SEED.prefill_s(1_000)
    assert speed.prefill_s(at, 0) == 0.0
    assert speed.step_s(at, 3, 5_000) == SEED.step_s(3, 5_000)
    assert speed.prefill_spread_s(at, 1_000) == 0.0
    assert speed.output_tokens(M, "t") is None
    assert speed.path(at, endpoint(1)).latency_s == PATH_LATENCY_S
    assert at.id not in speed.unlike


@given(
    st.integers(0, 1 << 32),
    st.sampled_from([0.25, 0.5, 1.0, 2.0, 4.0]),
    st.integers(0, 19),
    st.floats(0.01, 100),
)
def test_twenty_prefills_are_enough_though_one_is_quite_wrong(
    seed: int, wrong: float, outlier_index: int, outlier: float
) -> None:
    rng, speed = random.Random(seed), LearnedSpeed()
    true = SpeedFigures(0.02 * wrong, 1e-4 * wrong, 0.01, 1e-9 * wrong)
    for index in range(20):
        tokens = TOKENS[index % len(TOKENS)]
        took_s = told(rng, true.prefill_s(tokens), outlier_share=0.0) * (
            outlier if index == outlier_index else 1
        )
        speed.learn(PrefillSeen(endpoint(index % 4), tokens, took_s, is_alone=True))
    for tokens in (1_000, 4_000, 10_000):
        assert speed.prefill_s(endpoint(9), tokens) == pytest.approx(true.prefill_s(tokens), rel=0.25)


def test_twenty_prefills_are_most_often_right_within_a_tenth() -> None:
    good = 0
    for seed in range(100):
        rng, speed = random.Random(seed), LearnedSpeed()
        true_prefills(speed, rng, endpoint(), 20)
        good += abs(speed.prefill_s(endpoint(), 4_000) / TRUE.prefill_s(4_000) - 1.0) < 0.1
    assert good >= 93


def test_steps_are_learned_by_batch_and_context() -> None:
    rng, speed = random.Random(3), LearnedSpeed()
    for index in range(60):
        batch, context = rng.uniform(1, 60), rng.uniform(500, 100_000)
        true_s = TRUE.step_base_s + 4e-8 * context + 8e-5 * batch
        took_s = told(rng, true_s) * 100
        speed.learn(StepsSeen(endpoint(index % 3), 100, took_s, batch, context))
    for batch, tokens in ((1, 1_000), (20, 30_000), (50, 90_000)):
        assert speed.step_s(endpoint(), batch, tokens) == pytest.approx(TRUE.step_s(batch, tokens), rel=0.12)


@settings(max_examples=40)
@given(st.integers(0, 1 << 32), st.sampled_from([2.0, 0.5]), st.integers(2, 6))
def test_a_pod_that_changes_is_followed_and_drags_nobody_along(seed: int, factor: float, count: int) -> None:
    changed, steady = LearnedSpeed(), LearnedSpeed()
    for speed, now in ((changed, factor), (steady, 1.0)):
        rng = random.Random(seed)
        for index in range(40 * count):
            prefills(speed, rng, endpoint(index % count), 1, outlier_share=0.0)
        for _ in range(20):
            prefills(speed, rng, endpoint(0), 1, now, outlier_share=0.0)
            for index in range(1, count):
                prefills(speed, rng, endpoint(index), 1, outlier_share=0.0)
    assert endpoint(0).id in changed.unlike
    slow = changed.prefill_s(endpoint(0), 4_000) / steady.prefill_s(endpoint(1), 4_000)
    assert slow == pytest.approx(factor, rel=0.25)
    for index in range(1, count):
        moved = changed.prefill_s(endpoint(index), 4_000) / steady.prefill_s(endpoint(index), 4_000)
        assert moved == pytest.approx(1.0, abs=0.05)


def test_a_pod_that_recovers_is_like_its_pool_again() -> None:
    rng, speed = random.Random(5), LearnedSpeed()
    for factor in (1.0, 2.0, 1.0):
        for _ in range(40):
            prefills(speed, rng, endpoint(0), 1, factor)
            prefills(speed, rng, endpoint(1), 2)
        assert (endpoint(0).id in speed.unlike) == (factor > 1.0)


def test_a_slow_pod_that_gets_no_work_is_tried_again() -> None:
    rng, speed = random.Random(6), LearnedSpeed()
    for _ in range(30):
        prefills(speed, rng, endpoint(0), 1, 2.0)
        prefills(speed, rng, endpoint(1), 2)
    assert endpoint(0).id in speed.unlike
    prefills(speed, rng, endpoint(1), 900)
    assert endpoint(0).id not in speed.unlike


def test_what_changes_everywhere_is_the_pools() -> None:
    rng, speed = random.Random(7), LearnedSpeed()
    for factor in (1.0, 2.0):
        for index in range(400):
            prefills(speed, rng, endpoint(index % 4), 1, factor)
    assert speed.prefill_s(endpoint(9), 4_000) == pytest.approx(2 * SEED.prefill_s(4_000), rel=0.1)
    assert not any(endpoint(index).id in speed.unlike for index in range(4))


def test_pools_with_other_seeds_learn_apart_and_converge() -> None:
    rng, speed = random.Random(8), LearnedSpeed()
    slow = pool("q", speed=SpeedFigures(0.5, 1e-3, 0.1))
    for _ in range(25):
        true_prefills(speed, rng, endpoint(), 1)
        true_prefills(speed, rng, endpoint(0, slow), 1)
    one, other = speed.prefill_s(endpoint(), 4_000), speed.prefill_s(endpoint(0, slow), 4_000)
    assert one == pytest.approx(TRUE.prefill_s(4_000), rel=0.12)
    assert other == pytest.approx(TRUE.prefill_s(4_000), rel=0.2)
    assert speed.step_s(endpoint(), 1, 0) == SEED.step_s(1, 0)


def test_a_policy_with_new_figures_starts_anew_and_one_with_other_prices_does_not() -> None:
    rng, speed = random.Random(9), LearnedSpeed()
    true_prefills(speed, rng, endpoint(), 30)
    same = pool(link=2e10)
    assert speed.prefill_s(endpoint(0, same), 4_000) == speed.prefill_s(endpoint(), 4_000)
    new = pool(speed=TRUE)
    assert speed.prefill_s(endpoint(0, new), 4_000) == TRUE.prefill_s(4_000)


def test_the_spread_is_that_of_the_times() -> None:
    rng, speed = random.Random(10), LearnedSpeed()
    prefills(speed, rng, endpoint(), 200)
    share = speed.prefill_spread_s(endpoint(), 4_000) / speed.prefill_s(endpoint(), 4_000)
    assert 0.06 < share < 0.25


def test_a_way_between_pools_learns_its_latency_and_spread_and_keeps_its_bandwidth() -> None:
    speed, one, other = LearnedSpeed(), endpoint(), endpoint(0, pool("q", link=5e9))
    rng = random.Random(11)
    for _ in range(100):
        took_s = (0.01 + 1e8 / 5e9) * math.exp(rng.gauss(0.0, 0.1))
        speed.learn(TransferSeen(one, other, 90_000_000, 10_000_000, took_s))
    figures = speed.path(one, other)
    assert figures.bandwidth_bytes_per_s == 5e9
    assert figures.latency_s == pytest.approx(0.01, rel=0.3)
    assert 0.04 < figures.spread_share < 0.3
    assert speed.path(other, one).latency_s == PATH_LATENCY_S


def test_output_lengths_are_by_model_and_tenant() -> None:
    speed = LearnedSpeed()
    for _ in range(20):
        speed.learn(OutputSeen(M, "long", 1_000))
        speed.learn(OutputSeen(M, "short", 10))
    of_model = speed.output_tokens(M, "nobody")
    assert of_model == pytest.approx(505, rel=0.2)
    assert speed.output_tokens(M, "long") > 800  # type: ignore[operator]
    assert speed.output_tokens(M, "short") < 250  # type: ignore[operator]
    assert speed.output_tokens(ModelName("other"), "long") is None


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("POOLS_MAX", "PATHS_MAX", "MODELS_MAX", "TENANTS_MAX"):
        monkeypatch.setattr(learned, name, 5)
    speed = LearnedSpeed()
    for index in range(20):
        of = pool(f"p{index}")
        for _ in range(30):
            speed.learn(PrefillSeen(endpoint(0, of), 1_000, 1.0, is_alone=True))
            speed.learn(PrefillSeen(endpoint(1, of), 1_000, 0.1, is_alone=True))
        speed.learn(TransferSeen(endpoint(0, of), endpoint(1, POOL), 1_000, 0, 0.1))
        speed.learn(OutputSeen(ModelName(f"m{index}"), f"t{index}", 10))
        speed.validate()
    assert speed.prefill_s(endpoint(0, pool("p0")), 1_000) == SEED.prefill_s(1_000)


def test_an_endpoint_that_is_gone_is_forgotten() -> None:
    rng, speed = random.Random(12), LearnedSpeed()
    for _ in range(30):
        prefills(speed, rng, endpoint(0), 1, 3.0)
        prefills(speed, rng, endpoint(1), 3)
    assert endpoint(0).id in speed.unlike
    speed.forget(endpoint(0).id)
    assert endpoint(0).id not in speed.unlike
    assert speed.prefill_s(endpoint(0), 4_000) == speed.prefill_s(endpoint(1), 4_000)
    speed.validate()


NONSENSE: list[tuple[ObservationKind, Observation]] = [
    *(
        (ObservationKind.PREFILL, PrefillSeen(endpoint(), 100, t, True))
        for t in (0.0, -1.0, math.nan, math.inf, 1e9)
    ),  # a table
    *((ObservationKind.PREFILL, PrefillSeen(endpoint(), n, 1.0, False)) for n in (0, -5, 10**12)),  # a table
    *(
        (ObservationKind.STEPS, StepsSeen(endpoint(), 10, t, 1.0, 1.0))
        for t in (0.0, -1.0, math.nan, math.inf)
    ),
    (ObservationKind.STEPS, StepsSeen(endpoint(), 0, 1.0, 1.0, 1.0)),
    (ObservationKind.STEPS, StepsSeen(endpoint(), 10, 1.0, math.nan, 1.0)),
    (ObservationKind.STEPS, StepsSeen(endpoint(), 10, 1.0, 0.0, 1.0)),
    (ObservationKind.STEPS, StepsSeen(endpoint(), 10, 1.0, 1.0, -math.inf)),
    (ObservationKind.TRANSFER, TransferSeen(endpoint(), endpoint(1), 0, 0, 1.0)),
    (ObservationKind.TRANSFER, TransferSeen(endpoint(), endpoint(1), 10, -1, 1.0)),
    (ObservationKind.TRANSFER, TransferSeen(endpoint(), endpoint(1), 10, 0, math.nan)),
    (ObservationKind.TRANSFER, TransferSeen(endpoint(), endpoint(1, pool("z", link=0.0)), 10, 0, 1.0)),
    (ObservationKind.OUTPUT, OutputSeen(M, "t", 0)),
    (ObservationKind.OUTPUT, OutputSeen(M, "t", 10**9)),
]


@pytest.mark.parametrize(("kind", "observation"), NONSENSE)
def test_nonsense_is_counted_and_left_out(kind: ObservationKind, observation: Observation) -> None:
    speed = LearnedSpeed()
    for _ in range(10):
        speed.learn(observation)
    assert speed.left_out == {kind: 10}
    assert speed.prefill_s(endpoint(), 1_000) == SEED.prefill_s(1_000)
    assert speed.step_s(endpoint(), 2, 1_000) == SEED.step_s(2, 1_000)
    assert speed.output_tokens(M, "t") is None


any_float = st.floats(allow_nan=True, allow_infinity=True)
any_count = st.integers(-10, 1 << 60)
ends = st.integers(0, 3).map(endpoint)
observations = st.one_of(
    st.builds(PrefillSeen, ends, any_count, any_float | st.floats(1e-6, 10), st.booleans()),
    st.builds(PrefillSeen, ends, st.integers(1, 20_000), st.floats(1e-6, 3_000), st.booleans()),
    st.builds(StepsSeen, ends, any_count, any_float, any_float, any_float),
    st.builds(StepsSeen, ends, st.integers(1, 50), st.floats(1e-6, 50), st.floats(1, 99), st.floats(0, 1e6)),
    st.builds(TransferSeen, ends, ends, any_count, any_count, any_float),
    st.builds(TransferSeen, ends, ends, st.integers(1, 1 << 40), st.just(0), st.floats(1e-6, 100)),
    st.builds(OutputSeen, st.just(M), st.sampled_from(["", "a"]), any_count),
)


@settings(max_examples=150)
@given(st.lists(observations, max_size=120))
def test_predictions_are_finite_never_negative_and_grow_whatever_is_seen(seen: list[Observation]) -> None:
    speed = LearnedSpeed()
    for observation in seen:
        speed.learn(observation)
    speed.validate()
    for index in range(5):
        at = endpoint(index)
        times = [speed.prefill_s(at, u) for u in (0, 1, 100, 10_000, 1_000_000)]
        steps = [speed.step_s(at, b, c) for b, c in ((0, 0), (1, 0), (1, 1_000), (50, 1_000), (50, 10**6))]
        for figures in (times, steps):
            assert all(math.isfinite(f) and f >= 0.0 for f in figures)
            assert figures == sorted(figures)
        assert math.isfinite(speed.prefill_spread_s(at, 1_000))
        path = speed.path(at, endpoint(0))
        assert 0.0 <= path.latency_s < 1.0
        assert 0.0 <= path.spread_share <= 1.0
    tokens = speed.output_tokens(M, "a")
    assert tokens is None or 0.0 < tokens <= 10_000_000


PREFILL, DECODE = pool("fast", Role.PREFILL), pool("wide", Role.DECODE, SpeedFigures(0.01, 4e-4, 0.01))
MODEL = Model(M, (PREFILL, DECODE), disaggregation=Disaggregation(saving_s_min=0.0))


def choose(speed: LearnedSpeed) -> Choice:
    """A request of 4,000 tokens on an idle fleet of three prefill and two decode endpoints."""
    fleet = Fleet()
    for of, count in ((PREFILL, 3), (DECODE, 2)):
        for index in range(count):
            fleet.handle(EndpointSeen(endpoint(index, of)))
            fleet.handle(SampleTaken(endpoint(index, of).id, Sample(0, 0, 0.0, 0.0)))
    found = Scheduler(fleet, Ledger(), Prefixes(), PathTable(), speed).choose(
        Request(RequestId("r"), M, prompt_tokens=4_000), MODEL, frozenset(), 1.0
    )
    assert isinstance(found, Choice)
    return found


def test_a_slow_pod_is_routed_around() -> None:
    speed, rng = LearnedSpeed(), random.Random(13)
    assert choose(speed).best.prefill == endpoint(0, PREFILL)
    for _ in range(20):
        prefills(speed, rng, endpoint(0, PREFILL), 1, 2.0)
        for index in (1, 2):
            prefills(speed, rng, endpoint(index, PREFILL), 1)
    found = choose(speed)
    assert found.best.prefill == endpoint(1, PREFILL)
    assert endpoint(0, PREFILL) in found.other_prefills


def test_a_fast_pod_is_preferred_though_its_turn_was_last() -> None:
    speed, rng = LearnedSpeed(), random.Random(14)
    for _ in range(20):
        prefills(speed, rng, endpoint(2, PREFILL), 1, 0.5)
        for index in (0, 1):
            prefills(speed, rng, endpoint(index, PREFILL), 1)
    assert choose(speed).best.prefill == endpoint(2, PREFILL)


def test_a_saving_below_the_spread_does_not_split() -> None:
    assert choose(LearnedSpeed()).why is Why.SPLIT_FASTER
    speed = LearnedSpeed()
    for index in range(60):
        noise = math.exp(0.7 if index % 4 < 2 else -0.7)
        speed.learn(PrefillSeen(endpoint(index % 2, DECODE), 4_000, 0.6 * noise, is_alone=True))
    found = choose(speed)
    assert found.runner_up is not None
    assert found.why is Why.SAVING_BELOW_NOISE
    assert 0.0 < found.best.figures.ttft_s - found.runner_up.figures.ttft_s < found.best.figures.spread_s
