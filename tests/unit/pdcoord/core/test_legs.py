"""What a request costs each endpoint, against the formulas written out."""

from collections.abc import Container, Mapping
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdcoord.core.costs import SpeedFigures
from pdcoord.core.filters import PoolFit
from pdcoord.core.fleet import (
    Endpoint,
    EndpointId,
    EndpointState,
    EngineKind,
    Health,
    ModelName,
    Pool,
    PoolName,
    Role,
    Sample,
)
from pdcoord.core.harm import Surroundings, crowding_s, others_s, slowing_s
from pdcoord.core.inuse import PromptsInUse
from pdcoord.core.ledger import Load
from pdcoord.core.legs import OUTPUT_TOKENS_COUNTED_MAX, OUTPUT_TOKENS_GUESS, Conditions, Leg, LegMaker
from pdcoord.core.request import BlockKey, Request, RequestId
from pdcoord.core.speed import SeededSpeed
from pdcoord.protocol.headers import HostPort
from transfer.layout import KvLayout
from transfer.verdict import Connector, Side

SPEED = SpeedFigures(0.01, 1e-4, 0.02, 1e-8, 1e-6, 1e-3)
REQUEST = Request(RequestId("r"), ModelName("m"), prompt_tokens=1_000, output_tokens_max=100)
NOW_S = 5.0


def pool(role: Role) -> Pool:
    side = Side(Connector.PDCOORD, KvLayout(16))
    return Pool(
        PoolName("p"), ModelName("m"), role, "v", EngineKind.VLLM, side, SPEED, 1_000, 1e9, cost_per_hour=3.6
    )


def state(ordinal: int, of: Pool) -> EndpointState:
    endpoint = Endpoint(EndpointId(f"e{ordinal}"), of, HostPort(f"h:{ordinal + 1}"))
    return EndpointState(endpoint, ordinal, Health.READY)


def maker(
    cached: Mapping[int, int],
    troubled: Container[EndpointId] = (),
    room: int = 4,
    request: Request = REQUEST,
    in_use: PromptsInUse | None = None,
) -> LegMaker:
    return LegMaker(
        request,
        cached,
        SeededSpeed(),
        room=room,
        troubled=troubled,
        conditions=Conditions(NOW_S),
        in_use=in_use or PromptsInUse(),
    )


def leg(role: Role, load: Load, others: int = 0, cached: int = 0, request: Request = REQUEST) -> Leg:
    of = pool(role)
    fit = PoolFit(of, [(state(0, of), load, others)], 1)
    (made,) = maker({0: cached}, request=request).legs(fit).legs
    return made


def test_an_idle_prefill_endpoint() -> None:
    made = leg(Role.PREFILL, Load())
    assert (made.cached_tokens, made.uncached_tokens) == (0, 1_000)
    assert made.prefill_s == SPEED.prefill_s(1_000)
    assert (made.queue_s, made.stall_s, made.step_s, made.output_price) == (0.0, 0.0, 0.0, 0.0)
    assert made.prefill_price == pytest.approx(made.prefill_s * 0.001)


def test_cached_tokens_are_not_computed_again() -> None:
    made = leg(Role.PREFILL, Load(), cached=960)
    assert (made.cached_tokens, made.uncached_tokens) == (960, 40)
    assert made.prefill_s == SPEED.prefill_s(40)


def test_a_busy_prefill_endpoint_makes_wait_for_ours_and_for_what_others_sent() -> None:
    load = Load(
        prefills={RequestId("x"): 300_000}, prefill_us=300_000, request_count=1, progress_since_s=NOW_S - 0.1
    )
    made = leg(Role.PREFILL, load, others=2)
    assert made.queue_s == pytest.approx(0.2 + 2 * SPEED.prefill_s(1_000))
    assert made.stall_s == 0.0


def test_a_busy_decode_endpoint_steps_slower_and_is_stalled_by_a_prefill() -> None:
    load = Load(request_count=5, decode_count=5, streaming_count=3, context_tokens=9_000)
    made = leg(Role.DECODE, load, others=2)
    assert made.step_s == SPEED.step_s(8, 10_000)
    assert made.stall_s == pytest.approx(made.prefill_s * 5)
    assert made.queue_s == 0.0
    assert made.output_price == pytest.approx(100 * 0.001 * made.step_s / 256)


@pytest.mark.parametrize(
    ("tokens_max", "counted"),
    [(None, OUTPUT_TOKENS_GUESS), (0, 0), (7, 7), (10**9, OUTPUT_TOKENS_COUNTED_MAX)],
)
def test_the_price_counts_output_within_bounds(tokens_max: int | None, counted: int) -> None:
    made = leg(Role.DECODE, Load(), request=replace(REQUEST, output_tokens_max=tokens_max))
    assert made.output_price == pytest.approx(counted * 0.001 * made.step_s / 256)


def test_what_generates_nothing_prefills_nothing() -> None:
    made = leg(
        Role.BOTH, Load(streaming_count=3, request_count=3), request=replace(REQUEST, is_generative=False)
    )
    assert (made.prefill_s, made.stall_s) == (0.0, 0.0)


loads = st.builds(
    lambda count, turn: Load(request_count=count, decode_count=count, begun_ordinal=turn),
    st.sampled_from([0, 0, 0, 1]),
    st.integers(0, 50),
)


@given(
    st.lists(st.tuples(loads, st.sampled_from([0, 0, 1]), st.sampled_from([0, 64, 128])), max_size=30),
    st.sets(st.integers(0, 29)),
    st.integers(1, 6),
)
def test_of_idle_twins_those_whose_turn_it_is_stay_and_only_what_they_beat_is_left_out(
    endpoints: list[tuple[Load, int, int]], troubled: set[int], room: int
) -> None:
    of = pool(Role.BOTH)
    fits = [(state(index, of), load, others) for index, (load, others, _) in enumerate(endpoints)]
    cached = [tokens for _, _, tokens in endpoints]
    troubled_ids = {EndpointId(f"e{index}") for index in troubled}
    made = maker(dict(enumerate(cached)), troubled_ids, room).legs(PoolFit(of, fits, len(fits)))
    kept = {found.endpoint.id for found in made.legs}
    assert made.endpoint_count == len(endpoints)
    assert len(kept) == len(made.legs)

    idle = {
        s.ordinal: load.begun_ordinal
        for s, load, others in fits
        if not others and not load.request_count and s.ordinal not in troubled
    }
    for ordinal in range(len(endpoints)):
        name = f"e{ordinal}"
        if ordinal in idle:
            place = sorted((turn, twin) for twin, turn in idle.items() if cached[twin] == cached[ordinal])
            assert (name in kept) == (place.index((idle[ordinal], ordinal)) < room)
        else:
            depths = [cached[twin] for twin in idle if cached[twin] >= cached[ordinal]]
            is_beaten = any(depths.count(depth) >= room for depth in depths)
            assert (name in kept) == (not is_beaten)


def test_a_cached_prefix_that_nobody_holds_takes_room_of_a_full_pool() -> None:
    of = pool(Role.DECODE)
    full = replace(state(0, of), sample=Sample(3, 0, 1.0, 0.0, 10_000))
    keys = tuple(BlockKey(key) for key in range(15))
    asked = replace(REQUEST, block_keys=keys, block_tokens=64)
    in_use = PromptsInUse()
    fit = PoolFit(of, [(full, Load(request_count=3, decode_count=3), 0)], 1)
    (idle,) = maker({0: 960}, request=asked, in_use=in_use).legs(fit).legs
    in_use.hold(0, replace(asked, id=RequestId("other")))
    (held,) = maker({0: 960}, request=asked, in_use=in_use).legs(fit).legs
    assert held.cached_tokens == idle.cached_tokens == 960
    # One stride of eight blocks is known to be shared; the rest of what is cached may be anybody's.
    assert held.prefill_others_s == pytest.approx(idle.prefill_others_s * (1_000 - 512) / 1_000)
    assert held.room_s < idle.room_s


def test_what_others_pay_is_counted_for_each_part_that_may_be_here() -> None:
    of = pool(Role.BOTH)
    full = replace(state(0, of), sample=Sample(3, 0, 0.9, 0.0, 10_000))
    load = Load(request_count=3, decode_count=3, streaming_count=2, own_at_sample=3)
    (made,) = maker({}).legs(PoolFit(of, [(full, load, 0)], 1)).legs
    prefill = others_s(made.prefill_s, Surroundings(0.0, 2, made.step_s), 0.0)
    kv = crowding_s(0.1, 0.9, 100 * made.step_s)
    answer = slowing_s(3, 100 * (SPEED.step_s(1, 1_000) - SPEED.step_s(0, 0)))
    assert min(prefill, kv, answer) > 0.0
    assert made.prefill_others_s == pytest.approx(prefill + kv)
    assert made.answer_others_s == pytest.approx(kv + answer)
    assert made.others_s == pytest.approx(prefill + kv + answer)
    assert leg(Role.PREFILL, load).answer_others_s == 0.0
