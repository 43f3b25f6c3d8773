"""Advice tried out: the advised roles and the workload at the predicted rate, in the simulator."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import takewhile

from pdcoord.core.fleet import Endpoint, EndpointId, ModelName, Pool, PoolLimits, PoolName
from pdcoord.core.model import Model, Slo
from pdcoord.protocol.headers import HostPort
from pdcoord.sim.advise.advice import Advice
from pdcoord.sim.advise.assignment import Assignment, Group
from pdcoord.sim.advise.demand import STEADY, in_order, steady_rate_per_s
from pdcoord.sim.settings import EngineSettings
from pdcoord.sim.study.contenders import contender, run_on
from pdcoord.sim.study.results import OURS
from pdcoord.sim.study.stage import Stage, make_scene
from pdcoord.sim.study.statistics import Summary, summarize
from pdcoord.sim.workload.call import Workload

CHECK_CALLS = 6_000
CHECK_S_MIN = 60.0
"""A check ends after about so many calls, but not before so many seconds of virtual time."""
FACTOR_TRIES = 3


@dataclass(frozen=True, slots=True)
class Check:
    """One run.

    Attributes:
        label: which roles were tried.
        load: share of the rate that the fleet was predicted to take with the advised roles.
        predicted_per_s: goodput that was predicted for the rate that was sent.
    """

    label: str
    load: float
    predicted_per_s: float
    summary: Summary


def stage_of(advice: Advice, counts: Mapping[Group, int], slo: Slo) -> Stage:
    """A stage of engines in these roles, with a policy that believes the engines' own figures."""
    pools: list[Pool] = []
    endpoints: list[Endpoint] = []
    settings: list[EngineSettings] = []
    for group, count in counts.items():
        pool = _pool(advice, group, len(pools))
        pools.append(pool)
        engine = replace(advice.kinds[group.kind].settings, role=pool.role)
        for number in range(count):
            name = f"{pool.name}/{number}"
            # Nobody dials it; an address tells endpoints apart.
            address = HostPort(f"10.{len(pools)}.{number // 250}.{number % 250 + 1}:8000")
            endpoints.append(Endpoint(EndpointId(name), pool, address))
            settings.append(replace(engine, name=name))
    model = Model(ModelName(settings[0].model), tuple(pools), slo=slo)
    return Stage(model, make_scene(endpoints, settings))


def _pool(advice: Advice, group: Group, number: int) -> Pool:
    kind = advice.kinds[group.kind]
    settings = kind.settings
    return Pool(
        name=PoolName(f"{kind.vendor}-{group.role}-{number}"),
        model=ModelName(settings.model),
        role=group.role,
        vendor=kind.vendor,
        engine=settings.engine,
        side=settings.side,
        speed=settings.speed,
        kv_bytes_per_token=settings.kv_bytes_per_token,
        link_bytes_per_s=settings.link_bytes_per_s,
        cost_per_hour=kind.cost_per_hour or 0.0,
        limits=PoolLimits(
            in_flight_max=settings.running_max + settings.queued_max,
            context_tokens_max=settings.context_tokens_max,
        ),
    )


def check(
    advice: Advice,
    tried: Assignment,
    workload: Workload,
    *,
    label: str,
    load: float,
    slo: Slo,
    until_s: float,
) -> Check:
    """Run a workload made for the rate to be tried, on engines in given roles, under pdcoord's own router.

    Only the steady part of the run is looked at, as in measuring the workload. What is predicted is less
    where less is sent than the fleet could take.
    """
    stage = stage_of(advice, tried.counts, slo)
    results = run_on(stage, contender(OURS), workload, until_s=until_s)
    results.sort(key=lambda result: result.at_s)
    begin, end = (int(len(results) * share) for share in STEADY)
    summary = summarize(results[begin:end])
    share = min(1.0, summary.offered_per_s / tried.rate_per_s)
    return Check(label, load, share * tried.good_per_s, summary)


def until(rate_per_s: float) -> float:
    """How long a check at a rate lasts, in seconds of virtual time."""
    return max(CHECK_S_MIN, CHECK_CALLS / rate_per_s)


def factor_for(make: Callable[[float], Workload], rate_per_s: float, first: float) -> float:
    """The rate factor with which a run of that length has about so many calls per second once it is steady.

    Sessions take their time to begin: a short run of long sessions has fewer calls than a long one.

    Args:
        make: the workload with a rate factor.
        rate_per_s: the rate that is wanted.
        first: the factor to begin with.
    """
    factor, until_s = first, until(rate_per_s)
    for _ in range(FACTOR_TRIES):
        calls = takewhile(lambda call: call.at_s <= until_s, in_order(make(factor)))
        found = steady_rate_per_s([call.at_s for call in calls])
        if found is None or abs(found / rate_per_s - 1.0) < 0.02:
            break
        factor = min(max(factor * rate_per_s / found, first / 10), first * 10)
    return factor
