"""`pdcoord plan`: read a fleet and a workload, advise, check in the simulator, and print."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from pdcoord.core.model import Slo
from pdcoord.policy.errors import PolicyError
from pdcoord.sim.advise.advice import Advice, advise
from pdcoord.sim.advise.assignment import Assignment
from pdcoord.sim.advise.check import Check, check, factor_for, until
from pdcoord.sim.advise.demand import measure
from pdcoord.sim.advise.kinds import AdviceError, Kind, kinds_of
from pdcoord.sim.advise.report import Report, as_json, show
from pdcoord.sim.fleetfile import load_fleet
from pdcoord.sim.workload.arrivals import LoadSpec, StageSpec
from pdcoord.sim.workload.compile import compile_workload
from pdcoord.sim.workload.mixed import MixedWorkload
from pdcoord.sim.workload.workloadfile import LoadedWorkload, load_workload

LOADS = (1.0, 0.8, 0.6)
"""Of the capacity predicted with the advised roles, at which the simulator is asked."""
ENOUGH = 0.9
"""Of the calls that can begin in time: where so many are good no lower rate is tried."""
CACHE_SHARE = 0.5
"""Of the fleet's KV pools, that is left for prefixes of later calls while others run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOrder:
    """What a person asked for.

    Attributes:
        ttft_s_max: objective of calls for which the workload has none; tpot_s_max alike.
        is_checked: whether the simulator tries the advice.
    """

    fleet: Path
    workload: Path
    ttft_s_max: float | None = None
    tpot_s_max: float | None = None
    is_checked: bool = True
    is_json: bool = False


def plan(order: PlanOrder) -> int:
    """Print advice; the exit status is 1 if there is none, 2 if a file cannot be used."""
    errors = Console(stderr=True, soft_wrap=True, markup=False, highlight=False)
    try:
        report = make_report(order)
    except PolicyError as error:
        errors.print(f"pdcoord plan: {error}")
        return 2
    except AdviceError as error:
        errors.print(f"pdcoord plan: no advice: {error}")
        return 1
    if order.is_json:
        print(as_json(report))  # noqa: T201  # the command's answer
    else:
        show(report, Console(highlight=False))
    return 0


def make_report(order: PlanOrder) -> Report:
    """Advice for the files of an order.

    Raises:
        PolicyError: if a file cannot be used.
        AdviceError: if there is no advice for them.
    """
    kinds = kinds_of(load_fleet(order.fleet))
    loaded = steady(load_workload(order.workload))
    workload = compile_workload(loaded)
    traffic = measure(
        workload, _cache_tokens(kinds), ttft_s_max=order.ttft_s_max, tpot_s_max=order.tpot_s_max
    )
    advice = advise(kinds, traffic)
    checks = tuple(_checks(order, advice, loaded)) if order.is_checked else ()
    return Report(advice, checks, workload.notes)


def _cache_tokens(kinds: tuple[Kind, ...]) -> int:
    return int(CACHE_SHARE * sum(kind.kv_tokens * kind.count for kind in kinds))


def steady(loaded: LoadedWorkload) -> LoadedWorkload:
    """A workload whose loads have one stage of their mean rate: roles are advised for that.

    Traces keep their times.
    """
    spec = loaded.spec
    parts = tuple(
        part if part.load is None else part.model_copy(update={"load": _flat(part.load)})
        for part in spec.parts
    )
    load = None if spec.load is None else _flat(spec.load)
    return replace(loaded, spec=spec.model_copy(update={"load": load, "parts": parts}))


def _flat(load: LoadSpec) -> LoadSpec:
    duration = sum(stage.duration for stage in load.stages)
    rate = sum(stage.rate * stage.duration for stage in load.stages) / duration
    return load.model_copy(update={"stages": (StageSpec(rate=rate, duration=duration),)})


def _checks(order: PlanOrder, advice: Advice, loaded: LoadedWorkload) -> Iterator[Check]:
    """The advised roles, the file's, and none, under one traffic at falling rates until all goes well."""

    def make(factor: float) -> MixedWorkload:
        return compile_workload(loaded, rate_factor=factor)

    slo = Slo(ttft_s=order.ttft_s_max, tpot_s=order.tpot_s_max)
    for label, tried in _candidates(advice):
        for load in LOADS:
            rate_per_s = load * advice.best.rate_per_s
            factor = factor_for(make, rate_per_s, rate_per_s / advice.traffic.rate_per_s)
            done = check(
                advice, tried, make(factor), label=label, load=load, slo=slo, until_s=until(rate_per_s)
            )
            yield done
            if done.summary.goodput_per_s >= ENOUGH * advice.good_share * done.summary.offered_per_s:
                break


def _candidates(advice: Advice) -> list[tuple[str, Assignment]]:
    found: list[tuple[str, Assignment]] = [("advised", advice.best)]
    for label, other in (("as written", advice.written), ("all both", advice.mixed)):
        is_new = all(dict(other.counts) != dict(each.counts) for _, each in found)
        if is_new and other.good_per_s > 0.0:
            found.append((label, other))
    return found
