"""A plan knows where it may send work, and a candidate how it serves."""

from dataclasses import replace

from pdcoord.core.costs import SpeedFigures
from pdcoord.core.fleet import Endpoint, EndpointId, EngineKind, ModelName, Pool, PoolName, Role
from pdcoord.core.plan import Candidate, Figures, Plan, Rung, Why
from pdcoord.core.request import RequestId
from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.plans import DialectName, Mode, RungKind
from transfer.verdict import Connector, Side, Verdict, VerdictKind

SIDE = Side(Connector.PDCOORD, None)
POOL = Pool(
    PoolName("p"), ModelName("m"), Role.BOTH, "v", EngineKind.VLLM, SIDE, SpeedFigures(0.1, 0.1, 0.1), 1, 1.0
)
FIGURES = Figures(1.0, 2.0, 4.0, 8.0, 16.0, 0.0, 0.0, 10, 5)
A, B, C = (Endpoint(EndpointId(name), POOL, HostPort(f"{name}:1")) for name in "abc")


def plan(prefill: Endpoint | None, rungs: tuple[Rung, ...] = ()) -> Plan:
    verdict = Verdict(VerdictKind.NATIVE, "equal") if prefill is not None else None
    return Plan(
        RequestId("r"), Candidate(A, prefill, verdict, FIGURES), Why.SPLIT_FASTER, DialectName.NIXLV2, rungs
    )


def test_the_own_time_is_the_sum_of_its_parts_and_what_is_compared_adds_the_delay_of_others() -> None:
    assert FIGURES.ttft_s == 15.0
    assert replace(FIGURES, others_s=32.0).time_s == 47.0


def test_a_plan_is_split_when_it_has_a_prefill_endpoint() -> None:
    assert plan(B).mode is Mode.SPLIT
    assert plan(None).mode is Mode.COLOCATED
    assert (plan(B).decode, plan(B).prefill) == (A, B)


def test_a_plan_knows_every_endpoint_it_may_send_work_to() -> None:
    rungs = (Rung(RungKind.OTHER_PREFILL, C), Rung(RungKind.COLOCATED))
    assert plan(B, rungs).endpoint_ids() == {"a", "b", "c"}
    assert plan(None).endpoint_ids() == {"a"}
