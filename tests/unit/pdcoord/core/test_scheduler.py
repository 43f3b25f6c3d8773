"""The choice against all pairs weighed one by one on random fleets: the short lists lose nothing."""

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdcoord.core.costs import SpeedFigures
from pdcoord.core.disagg import MUST_STAY_TOGETHER, weigh, why_together
from pdcoord.core.fleet import (
    Endpoint,
    EndpointDraining,
    EndpointId,
    EndpointSeen,
    EndpointState,
    EngineKind,
    Fleet,
    Health,
    ModelName,
    Pool,
    PoolLimits,
    PoolName,
    Role,
    Sample,
    SampleTaken,
)
from pdcoord.core.harm import Surroundings, crowding_s, harm, others_s, slowing_s
from pdcoord.core.ledger import Entry, Ledger
from pdcoord.core.model import Disaggregation, Fallback, Model, Slo, SplitMode
from pdcoord.core.objective import Objective
from pdcoord.core.paths import BreakerState, PathTable
from pdcoord.core.plan import Candidate, DropReason, Figures, Why
from pdcoord.core.prefixes import Prefixes
from pdcoord.core.request import BlockKey, Request, RequestId
from pdcoord.core.room import room_wait_s
from pdcoord.core.scheduler import Choice, NoChoice, Scheduler
from pdcoord.core.speed import SeededSpeed
from pdcoord.protocol.errors import RungReason
from pdcoord.protocol.headers import HostPort
from transfer.layout import KvLayout
from transfer.verdict import Connector, Side

M = ModelName("m")
KEYS = tuple(BlockKey(index) for index in range(40))
REFUSED = RungReason.PREFILL_UNREACHABLE


@dataclass
class World:
    """A fleet in some state, and one request to it."""

    model: Model
    request: Request
    excluded: frozenset[EndpointId]
    now_s: float
    fleet: Fleet
    ledger: Ledger
    prefixes: Prefixes
    paths: PathTable
    speed: SeededSpeed

    def choose(self) -> Choice | NoChoice:
        scheduler = Scheduler(self.fleet, self.ledger, self.prefixes, self.paths, self.speed)
        return scheduler.choose(self.request, self.model, self.excluded, self.now_s)


def random_pool(rng: random.Random, index: int, engine: EngineKind) -> Pool:
    speed = SpeedFigures(
        prefill_base_s=rng.choice([0.0, 0.01]),
        prefill_s_per_token=rng.choice([5e-5, 1e-4, 4e-4]),
        step_base_s=rng.choice([0.008, 0.02]),
        prefill_s_per_token_squared=rng.choice([0.0, 1e-8]),
        step_s_per_context_token=rng.choice([0.0, 2e-7]),
        step_s_per_sequence=rng.choice([0.0, 1e-3]),
    )
    connector = rng.choice([Connector.PDCOORD] * 6 + [Connector.NIXL])
    return Pool(
        name=PoolName(f"pool{index}"),
        model=M,
        role=[Role.DECODE, Role.PREFILL][index]
        if index < 2 and rng.random() < 0.8
        else rng.choice(list(Role)),
        vendor="v",
        engine=engine if rng.random() < 0.9 else EngineKind.SGLANG,
        side=Side(connector, rng.choice([KvLayout(16), KvLayout(16), KvLayout(64), KvLayout(64), None])),
        speed=speed,
        kv_bytes_per_token=rng.choice([1 << 15, 1 << 17]),
        link_bytes_per_s=rng.choice([1e9, *[1.25e10] * 5, 0.0]),
        cost_per_hour=rng.choice([0.0, 1.0, 4.0]),
        limits=PoolLimits(in_flight_max=rng.choice([4, 256, 256])),
        priority_max=rng.choice([None, None, None, 0]),
    )


def random_model(rng: random.Random, pools: tuple[Pool, ...]) -> Model:
    return Model(
        M,
        pools,
        disaggregation=Disaggregation(
            mode=rng.choice([*[SplitMode.AUTO] * 7, SplitMode.ALWAYS, SplitMode.ALWAYS, SplitMode.NEVER]),
            uncached_tokens_min=rng.choice([0, 256, 1_500]),
            saving_s_min=rng.choice([0.0, 0.005, 0.05, 3.0]),
            bandwidth_bytes_per_s_min=rng.choice([0.0, 5e9]),
        ),
        fallback=Fallback(other_prefill_max=rng.choice([0, 1, 2, 3, 5])),
        slo=Slo(rng.choice([None, None, 0.2]), rng.choice([None, None, 0.015])),
    )


def random_world(seed: int) -> World:
    rng = random.Random(seed)
    engine = EngineKind.SGLANG if rng.random() < 0.15 else EngineKind.VLLM
    pools = tuple(random_pool(rng, index, engine) for index in range(rng.choice([1, 2, 2, 2, 3, 4])))
    fleet, ledger, prefixes, paths = Fleet(), Ledger(), Prefixes(), PathTable()
    endpoints = []
    for pool in pools:
        busy_share = rng.choice([0.0, 0.5, 1.0])
        for index in range(rng.choice([1, 2, 5, 9, 14])):
            name = EndpointId(f"{pool.name}/{index}")
            endpoints.append(Endpoint(name, pool, HostPort(f"{pool.name}-{index}:80")))
            fleet.handle(EndpointSeen(endpoints[-1]))
            others = rng.choice([0, 1, 3]) if rng.random() < busy_share / 2 else 0
            if rng.random() < 0.95:
                usage, kv_tokens = rng.choice([0.5, 0.97, 1.0]), rng.choice([0, 100_000, 400_000])
                fleet.handle(SampleTaken(name, Sample(others, 0, usage, 0.0, kv_tokens)))
            if rng.random() < 0.05:
                fleet.handle(EndpointDraining(name))
            if rng.random() < 0.3:
                ordinal, keys = index if index % 2 else len(endpoints) - 1, KEYS[: rng.choice([2, 20, 40])]
                prefixes.approximate.record(ordinal, keys, 100)
                if rng.random() < 0.5:
                    user = Request(RequestId(f"user of {name}"), M, prompt_tokens=4_000, block_keys=keys)
                    prefixes.in_use.hold(ordinal, user)
    fill_ledger(rng, ledger, endpoints)
    fill_paths(rng, paths, endpoints)
    request = Request(
        RequestId("asked"),
        M,
        prompt_tokens=rng.choice([0, 10, 500, 2_560, 2_561, 2_900, 8_000, 8_000, 20_000]),
        block_keys=rng.choice([(), KEYS]),
        output_tokens_max=rng.choice([None, 1, 5_000]),
        choice_count=2 if rng.random() < 0.05 else 1,
        is_splittable=rng.random() < 0.95,
        is_generative=rng.random() < 0.95,
    )
    excluded = frozenset(e.id for e in endpoints if rng.random() < 0.05)
    speed = SeededSpeed()
    return World(random_model(rng, pools), request, excluded, 1.0, fleet, ledger, prefixes, paths, speed)


def fill_ledger(rng: random.Random, ledger: Ledger, endpoints: list[Endpoint]) -> None:
    workers = [e.id for e in endpoints if e.pool.can_prefill and rng.random() < 0.7]
    decodes = [e.id for e in endpoints if e.pool.can_decode and rng.random() < 0.7]
    for index in range(rng.choice([0, 0, 5, 60]) if decodes else 0):
        decode = rng.choice(decodes)
        worker = rng.choice(workers) if workers and rng.random() < 0.7 else decode
        # Few different sizes, so that figures tie.
        sizes = rng.choice([10_000, 200_000]), rng.choice([100, 4_000])
        moved = 0 if worker == decode else rng.choice([1 << 20, 1 << 28, 1 << 31])
        request_id = RequestId(f"r{index}")
        ledger.begin(Entry(request_id, decode, worker, *sizes, moved), rng.choice([0.0, 0.9]))
        if rng.random() < 0.5:
            ledger.finish_prefill(request_id, 0.95)


def fill_paths(rng: random.Random, paths: PathTable, endpoints: list[Endpoint]) -> None:
    prefills = [e.id for e in endpoints if e.pool.can_prefill]
    decodes = [e.id for e in endpoints if e.pool.can_decode]
    is_bad = {name: rng.random() < 0.2 for name in prefills + decodes}
    share = rng.choice([0.0, 0.0, 0.2, 0.9])
    for prefill in prefills:
        for decode in decodes:
            if prefill != decode and (is_bad[prefill] or is_bad[decode]) and rng.random() < share:
                # Tripped at 0.5 s it is open at 1.0 s, tripped at -5 s it is half-open.
                paths.fail((prefill, decode), REFUSED, RequestId("x"), rng.choice([0.5, 0.5, -5.0]))


class Reference:
    """The choice as decision 1 states it: every endpoint alone and every pair, one by one."""

    def __init__(self, world: World) -> None:
        self.world = world
        matched = world.prefixes.approximate.match(world.request.block_keys)
        most = max(0, world.request.prompt_tokens - 1)
        self.objective = Objective(world.model)
        self.room_s: dict[EndpointId, float] = {}
        self.of_prefill_s: dict[EndpointId, float] = {}
        self.of_answer_s: dict[EndpointId, float] = {}
        self.cached = {o: min(n * world.request.block_tokens, most) for o, n in matched.items()}
        self.fit = [state for state in world.fleet.states() if self.is_fit(state)]
        self.decodes = [s for s in self.fit if s.endpoint.pool.can_decode]
        self.workers = [s for s in self.fit if s.endpoint.pool.can_prefill]

    def is_fit(self, state: EndpointState) -> bool:
        name, limit = state.endpoint.id, state.endpoint.pool.limits.in_flight_max
        if state.health is not Health.READY or name in self.world.excluded:
            return False
        load = self.world.ledger.load(name)
        return load.request_count + load.others(state.sample) < limit

    def own_figures(self, state: EndpointState) -> Figures:
        """A request served by this endpoint alone; step_s and cost count only where it can decode."""
        world, endpoint, request = self.world, state.endpoint, self.world.request
        pool, load = endpoint.pool, world.ledger.load(endpoint.id)
        cached = self.cached.get(state.ordinal, 0)
        others = load.others(state.sample)
        prefill_s = (
            world.speed.prefill_s(endpoint, request.prompt_tokens - cached) if request.is_generative else 0.0
        )
        queue_s, streams = load.pending_prefill_s(world.now_s), load.streaming_count
        if pool.can_decode:
            streams += others
        elif request.is_generative:
            queue_s += others * world.speed.prefill_s(endpoint, request.prompt_tokens)
        batch, limit = load.decode_count + others + 1, pool.limits.in_flight_max
        step_s = world.speed.step_s(endpoint, batch, load.context_tokens + request.prompt_tokens)
        output = min(256 if request.output_tokens_max is None else request.output_tokens_max, 1_024)
        cost = pool.cost_per_hour / 3600.0 * (prefill_s + output * step_s / limit)
        uncached = request.prompt_tokens - cached
        taken = request.prompt_tokens - world.prefixes.in_use.shared_tokens(state.ordinal, request, cached)
        room_s = room_wait_s(state.sample, load, taken, output, step_s) if pool.can_decode else 0.0
        pace_s = step_s / (1.0 - load.prefill_share(world.now_s)) if pool.can_decode else 0.0
        met = Surroundings(queue_s, streams, step_s if pool.can_decode else 0.0)
        typical_s = world.ledger.typical_prefill_s
        caused = harm(world.model.slo, prefill_s, met, typical_s, output)
        self.room_s[endpoint.id] = max(room_s, queue_s)
        excess = self.excess(max(queue_s, room_s) + prefill_s + step_s, pace_s) + caused
        crowding = slowing = 0.0
        if pool.can_decode:
            if state.sample is not None and state.sample.kv_tokens:
                share = taken / state.sample.kv_tokens
                crowding = crowding_s(share, state.sample.kv_usage, output * step_s)
            added_s = world.speed.step_s(endpoint, 1, request.prompt_tokens)
            added_s -= world.speed.step_s(endpoint, 0, 0)
            slowing = slowing_s(batch - 1, output * added_s)
        of_prefill = others_s(prefill_s, met, typical_s)
        self.of_prefill_s[endpoint.id] = of_prefill + crowding
        self.of_answer_s[endpoint.id] = crowding + slowing
        return Figures(
            queue_s=queue_s,
            prefill_s=prefill_s,
            transfer_s=0.0,
            step_s=step_s,
            stall_s=prefill_s * streams,
            slo_excess=excess,
            cost=cost,
            uncached_tokens=uncached,
            cached_tokens=cached,
            room_s=max(0.0, room_s - queue_s),
            landing_tokens=uncached,
            pace_s=pace_s,
            harm=caused,
            others_s=of_prefill + crowding + slowing,
            unfit=self.objective.unfit(max(queue_s, room_s) + prefill_s + step_s, pool),
        )

    def pair_figures(self, worker: EndpointState, decode: EndpointState) -> Figures | None:
        """None where the pair may not carry this request."""
        world, prefill_pool, decode_pool = self.world, worker.endpoint.pool, decode.endpoint.pool
        own, other = self.own_figures(worker), self.own_figures(decode)
        rules = world.model.disaggregation
        bandwidth = min(prefill_pool.link_bytes_per_s, decode_pool.link_bytes_per_s)
        stays = rules.mode is SplitMode.AUTO and decode_pool.can_serve_alone
        if (
            worker is decode
            or not world.paths.verdict(prefill_pool, decode_pool).is_possible
            or not world.paths.lets_pass(worker.endpoint.id, decode.endpoint.id, world.now_s)
            or bandwidth <= 0.0
            or bandwidth < rules.bandwidth_bytes_per_s_min
            or (stays and other.uncached_tokens < rules.uncached_tokens_min)
        ):
            return None
        moved = other.uncached_tokens * prefill_pool.kv_bytes_per_token
        ahead = max(world.ledger.load(s.endpoint.id).bytes_in_flight for s in (worker, decode))
        transfer_s = 0.002 + (moved + ahead) / bandwidth
        # A prefill waits for its own pool's room as well, where there is one.
        start_s = max(own.queue_s, self.room_s.get(worker.endpoint.id, 0.0))
        ready_s, room_s = start_s + own.prefill_s + transfer_s, self.room_s[decode.endpoint.id]
        excess = self.excess(max(ready_s, room_s) + other.step_s, other.pace_s) + own.harm
        output_cost = other.cost - other.prefill_s * decode_pool.cost_per_hour / 3600.0
        return replace(
            own,
            queue_s=start_s,
            transfer_s=transfer_s,
            step_s=other.step_s,
            slo_excess=excess,
            cost=own.prefill_s * prefill_pool.cost_per_hour / 3600.0 + output_cost,
            transfer_bytes=moved,
            room_s=max(0.0, room_s - ready_s),
            landing_tokens=other.uncached_tokens,
            pace_s=other.pace_s,
            others_s=self.of_prefill_s[worker.endpoint.id] + self.of_answer_s[decode.endpoint.id],
            unfit=self.objective.unfit(max(ready_s, room_s) + other.step_s, decode_pool, prefill_pool),
        )

    def excess(self, ttft_s: float, pace_s: float) -> float:
        slo = self.world.model.slo
        parts = [(ttft_s, slo.ttft_s), (pace_s, slo.tpot_s)]
        return sum(max(0.0, value / bound - 1.0) for value, bound in parts if bound is not None)

    def rank(self, figures: Figures) -> tuple[float, int, float]:
        """What must be exact: the violation, the pools and the time, in steps of what counts as equal."""
        noise_s = self.world.model.disaggregation.saving_s_min or 1e-6
        return figures.slo_excess // 0.01, figures.unfit, figures.time_s // noise_s

    def alone(self) -> Iterator[tuple[EndpointState, Figures]]:
        for state in self.decodes:
            if state.endpoint.pool.can_serve_alone:
                yield state, self.own_figures(state)

    def pairs(self) -> Iterator[tuple[EndpointState, EndpointState, Figures]]:
        for worker in self.workers:
            for decode in self.decodes:
                figures = self.pair_figures(worker, decode)
                if figures is not None:
                    yield worker, decode, figures


def assert_same(found: Figures, expected: Figures) -> None:
    for name in Figures.__slots__:
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-9, abs=1e-15), name


def state_of(world: World, endpoint: Endpoint) -> EndpointState:
    state = world.fleet.get(endpoint.id)
    assert state is not None
    return state


def check_alone(world: World, reference: Reference, found: Candidate | None, *, is_outage: bool) -> None:
    everyone = list(reference.alone())
    assert (found is None) == (not everyone)
    if is_outage:
        # What others were to prefill goes where the KV pool has headroom, if that is anywhere.
        usage_max = world.model.fallback.decode_kv_usage_max
        roomy = [(s, f) for s, f in everyone if s.sample is not None and s.sample.kv_usage <= usage_max]
        everyone = roomy or everyone
    if found is not None:
        expected = reference.own_figures(state_of(world, found.decode))
        assert found.prefill is None
        assert_same(found.figures, expected)
        assert reference.rank(found.figures) == min(reference.rank(figures) for _, figures in everyone)


def check_split(world: World, reference: Reference, found: Candidate | None) -> None:
    everyone = list(reference.pairs())
    assert (found is None) == (not everyone)
    if found is not None and found.prefill is not None:
        figures = reference.pair_figures(state_of(world, found.prefill), state_of(world, found.decode))
        assert figures is not None, "the path was not open"
        assert_same(found.figures, figures)
        assert reference.rank(found.figures) == min(reference.rank(figures) for *_, figures in everyone)


def check_rungs(world: World, reference: Reference, found: Choice) -> None:
    """The ladder's prefill endpoints are the next best closed paths of the chosen decode endpoint."""
    decode, best = found.best.decode, found.best.prefill
    others = []
    for worker, candidate_decode, figures in reference.pairs():
        prefill = worker.endpoint
        if candidate_decode.endpoint != decode or prefill == best:
            continue
        if world.paths.state(prefill.id, decode.id, world.now_s) is BreakerState.CLOSED:
            others.append(reference.rank(figures))
    ranks = []
    for prefill in found.other_prefills:
        figures = reference.pair_figures(state_of(world, prefill), state_of(world, decode))
        assert figures is not None
        ranks.append(reference.rank(figures))
    assert ranks == sorted(others)[: world.model.fallback.other_prefill_max]


def check(world: World) -> str:
    """Check a choice in full; the reason, so that callers may see what was covered."""
    reference, found = Reference(world), world.choose()
    together_why = why_together(world.request, world.model)
    may_split = together_why not in MUST_STAY_TOGETHER
    if isinstance(found, NoChoice):
        assert not list(reference.alone())
        assert not may_split or not list(reference.pairs())
        return "nobody"
    split, alone = found.best, found.runner_up
    if found.best.prefill is None:
        split, alone = alone, found.best
    assert (found.best.prefill is not None) == found.why.startswith("split-")
    check_alone(world, reference, alone, is_outage=found.is_outage)
    if together_why is not None and alone is not None:
        assert found.why is together_why
        assert split is None
        return str(found.why)
    check_split(world, reference, split)
    if split is None:
        assert found.why in {Why.PREFIX_CACHED, Why.NO_OPEN_PATH, Why.NO_PREFILL_ENDPOINT}
    elif alone is None:
        assert found.why is Why.SPLIT_ONLY_WAY
    else:
        assert found.why is weigh(split, alone, world.model.disaggregation)
    if found.best.prefill is not None:
        check_rungs(world, reference, found)
    else:
        assert found.other_prefills == ()
    return str(found.why)


@settings(max_examples=250)
@given(st.integers(0, 1 << 48))
def test_the_choice_is_the_best_of_all_pairs_and_all_alone(seed: int) -> None:
    check(random_world(seed))


def test_random_worlds_reach_every_reason() -> None:
    reasons = {check(random_world(seed)) for seed in range(300)}
    assert reasons == {"nobody", *map(str, Why)}


def small_world(mode: SplitMode, engine: EngineKind = EngineKind.VLLM, decode_count: int = 2) -> World:
    """One prefill endpoint and a few decode endpoints, idle, and a request well worth splitting."""
    side, speed = Side(Connector.PDCOORD, KvLayout(16)), SpeedFigures(0.01, 1e-4, 0.01)
    slow = SpeedFigures(0.01, 1e-3, 0.01, step_s_per_sequence=1e-3)
    prefill = Pool(PoolName("p"), M, Role.PREFILL, "v", engine, side, speed, 1_000, 1e10)
    decode = Pool(PoolName("d"), M, Role.DECODE, "v", engine, side, slow, 1_000, 1e10)
    fleet = Fleet()
    for pool, count in ((prefill, 1), (decode, decode_count)):
        for index in range(count):
            name = EndpointId(f"{pool.name}/{index}")
            fleet.handle(EndpointSeen(Endpoint(name, pool, HostPort(f"{pool.name}{index}:80"))))
            fleet.handle(SampleTaken(name, Sample(0, 0, 0.0, 0.0)))
    model = Model(M, (prefill, decode), disaggregation=Disaggregation(mode=mode))
    request = Request(RequestId("asked"), M, prompt_tokens=4_000)
    parts = (fleet, Ledger(), Prefixes(), PathTable(), SeededSpeed())
    return World(model, request, frozenset(), 1.0, *parts)


def choose(world: World) -> Choice:
    found = world.choose()
    assert isinstance(found, Choice)
    return found


def test_a_slow_prefill_on_the_decode_side_is_worth_a_split() -> None:
    found = choose(small_world(SplitMode.AUTO))
    assert found.why is Why.SPLIT_FASTER
    assert found.best.prefill is not None
    assert found.runner_up is not None
    assert found.runner_up.prefill is None
    assert not found.is_outage


def test_never_means_never_even_where_nobody_serves_alone() -> None:
    assert choose(small_world(SplitMode.NEVER)).why is Why.MODE_NEVER
    assert isinstance(small_world(SplitMode.NEVER, EngineKind.SGLANG).choose(), NoChoice)


@pytest.mark.parametrize("tokens", [1, 15, 100])
def test_a_short_prompt_is_split_only_where_nobody_serves_alone(tokens: int) -> None:
    world = small_world(SplitMode.AUTO)
    world.request = replace(world.request, prompt_tokens=tokens)
    assert choose(world).best.prefill is None
    world = small_world(SplitMode.AUTO, EngineKind.SGLANG)
    world.request = replace(world.request, prompt_tokens=tokens)
    assert choose(world).why is Why.SPLIT_ONLY_WAY


def test_in_an_outage_the_request_goes_where_the_kv_pool_has_room() -> None:
    world = small_world(SplitMode.AUTO)
    world.fleet.handle(EndpointDraining(EndpointId("p/0")))
    found = choose(world)
    assert (found.why, found.is_outage) == (Why.NO_PREFILL_ENDPOINT, True)
    assert found.best.decode.id == "d/0"
    assert found.drops == {DropReason.DRAINING: 1}

    world.fleet.handle(SampleTaken(EndpointId("d/0"), Sample(0, 0, 0.99, 2.0)))
    world.fleet.handle(SampleTaken(EndpointId("d/1"), Sample(3, 0, 0.90, 2.0)))
    assert choose(world).best.decode.id == "d/1"
    world.fleet.handle(SampleTaken(EndpointId("d/1"), Sample(3, 0, 0.99, 2.0)))
    assert choose(world).best.decode.id == "d/0"


def test_staying_together_by_design_is_no_outage() -> None:
    world = small_world(SplitMode.AUTO)
    world.fleet.handle(EndpointDraining(EndpointId("p/0")))
    world.model = replace(world.model, pools=world.model.pools[1:])
    found = choose(world)
    assert (found.why, found.is_outage) == (Why.NO_PREFILL_ENDPOINT, False)


def test_choosing_changes_nothing() -> None:
    for seed in range(20):
        world = random_world(seed)
        assert world.choose() == world.choose()


def test_endpoints_of_a_pool_fill_evenly_though_a_price_is_set() -> None:
    world = small_world(SplitMode.AUTO, decode_count=4)
    priced = tuple(replace(pool, cost_per_hour=2.5) for pool in world.model.pools)
    world.model = replace(world.model, pools=priced)
    for state in list(world.fleet.states()):
        pool = next(pool for pool in priced if pool.name == state.endpoint.pool.name)
        world.fleet.handle(EndpointSeen(replace(state.endpoint, pool=pool)))
    counts = Counter[EndpointId]()
    for index in range(40):
        found = choose(world)
        decode, worker = found.best.decode.id, (found.best.prefill or found.best.decode).id
        request_id = RequestId(f"r{index}")
        world.ledger.begin(Entry(request_id, decode, worker, 1_000, 4_000, 0), 1.0)
        world.ledger.finish_prefill(request_id, 1.0)
        counts[decode] += 1
    assert max(counts.values()) - min(counts.values()) <= 1
    assert len(counts) == 4
