"""The plan of one attempt: what the policy bounds, what the ladder has, and why there is none."""

from dataclasses import replace

import pytest

from pdcoord.core.accounts import Accounts
from pdcoord.core.costs import SpeedFigures
from pdcoord.core.fleet import (
    Endpoint,
    EndpointId,
    EndpointSeen,
    EngineKind,
    ModelName,
    Pool,
    PoolName,
    Role,
    Sample,
    SampleTaken,
)
from pdcoord.core.model import Disaggregation, Fallback, Model, Slo, SplitMode
from pdcoord.core.models import Models
from pdcoord.core.plan import DropReason, Plan
from pdcoord.core.planning import Planner
from pdcoord.core.prefixes import Prefixes
from pdcoord.core.request import Request, RequestId
from pdcoord.protocol.errors import Refusal, RefuseReason
from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.plans import Mode, RungKind
from transfer.layout import KvLayout
from transfer.verdict import Connector, Side

M = ModelName("m")
REQUEST = Request(RequestId("r"), M, prompt_tokens=4_000)


def pool(name: str, role: Role) -> Pool:
    return Pool(
        name=PoolName(name),
        model=M,
        role=role,
        vendor="v",
        engine=EngineKind.VLLM,
        side=Side(Connector.PDCOORD, KvLayout(16)),
        speed=SpeedFigures(0.01, 1e-4, 0.01),
        kv_bytes_per_token=1_000,
        link_bytes_per_s=1e10,
    )


P, D = pool("p", Role.PREFILL), pool("d", Role.DECODE)
MODEL = Model(M, (P, D), disaggregation=Disaggregation(mode=SplitMode.ALWAYS))


class Desk:
    """A planner over two endpoints of each pool, with its model's budget."""

    def __init__(self, accounts: Accounts, model: Model, prefills: int = 2) -> None:
        self.model = model
        for of, count in ((P, prefills), (D, 2)):
            for index in range(count):
                name = EndpointId(f"{of.name}/{index}")
                accounts.fleet.handle(EndpointSeen(Endpoint(name, of, HostPort(f"{of.name}-{index}:80"))))
                accounts.fleet.handle(SampleTaken(name, Sample(0, 0, 0.1, 0.0)))
        models = Models()
        models.replace((model,))
        self.budget = models.budgets[M]
        prefixes = Prefixes()
        prefixes.replace_models((model,))
        self._planner = Planner(accounts, prefixes, models, "replica-1")

    def ask(self, *excluded: str, attempt: int = 0) -> Plan | Refusal:
        names = frozenset(EndpointId(name) for name in excluded)
        return self._planner.plan(REQUEST, self.model, names, attempt, 0.0)

    def plan(self, *excluded: str, attempt: int = 0) -> Plan:
        found = self.ask(*excluded, attempt=attempt)
        assert isinstance(found, Plan), found
        return found


def test_the_plan_carries_the_policys_deadlines_and_its_numbers(accounts: Accounts) -> None:
    rules = Disaggregation(mode=SplitMode.ALWAYS, prefill_deadline_s=7.0, transfer_deadline_s=3.0)
    plan = Desk(accounts, replace(MODEL, disaggregation=rules, slo=Slo(ttft_s=30.0))).plan(attempt=2)
    assert (plan.request_id, plan.replica, plan.attempt) == ("r", "replica-1", 2)
    assert (plan.prefill_deadline_s, plan.transfer_deadline_s) == (7.0, 3.0)
    assert plan.runner_up is not None
    assert plan.hedge_after_s is not None


def test_a_split_has_a_ladder_and_one_endpoint_alone_has_none(accounts: Accounts) -> None:
    desk = Desk(accounts, MODEL)
    split = desk.plan()
    assert [rung.kind for rung in split.rungs] == [RungKind.OTHER_PREFILL, RungKind.COLOCATED]
    assert split.rungs[0].prefill not in {split.prefill, None}
    alone = desk.plan("p/0", "p/1")
    assert (alone.mode, alone.rungs, alone.is_outage) == (Mode.COLOCATED, (), True)
    assert alone.drops[DropReason.EXCLUDED] == 2


def test_who_is_excluded_is_in_no_plan(accounts: Accounts) -> None:
    plan = Desk(accounts, MODEL).plan("p/0", "d/1")
    assert plan.endpoint_ids() == {"p/1", "d/0"}


@pytest.mark.parametrize(
    ("fallback", "reason"),
    [
        (Fallback(colocated_share_max=0.0), RefuseReason.SATURATED),
        (Fallback(rungs=(RungKind.OTHER_PREFILL,)), RefuseReason.NO_ENDPOINTS),
    ],
)
def test_without_leave_an_outage_is_refused_and_counted(
    accounts: Accounts, fallback: Fallback, reason: RefuseReason
) -> None:
    desk = Desk(accounts, replace(MODEL, fallback=fallback), prefills=0)
    refusal = desk.ask()
    assert isinstance(refusal, Refusal)
    assert refusal.reason is reason
    assert list(desk.budget._recent) == [False]  # what was noted
    assert desk.budget.refused_count == (reason is RefuseReason.SATURATED)


def test_with_nobody_left_the_refusal_says_so(accounts: Accounts) -> None:
    refusal = Desk(accounts, MODEL).ask("d/0", "d/1")
    assert isinstance(refusal, Refusal)
    assert refusal.reason is RefuseReason.NO_ENDPOINTS
