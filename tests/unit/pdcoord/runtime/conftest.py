"""A coordinator loop over a small fleet, with a clock that tests move."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import pytest
import structlog

from pdcoord.core.coordinator import Coordinator
from pdcoord.core.events import Dispatch, ModelsReplaced, Refuse, RequestArrived, Wait
from pdcoord.core.fleet import EndpointId, EndpointSeen, ModelName, Sample, SampleTaken
from pdcoord.core.plan import Plan
from pdcoord.core.request import Request, RequestId
from pdcoord.policy.compile import CompiledPolicy, compile_policy
from pdcoord.policy.load import parse_policies
from pdcoord.protocol.errors import Refusal
from pdcoord.runtime.decisions import DecisionLog
from pdcoord.runtime.loop import CoordinatorLoop
from pdcoord.runtime.observe import Metrics

POLICY = """\
apiVersion: pdcoord.io/v1alpha1
kind: PoolPolicy
metadata: {name: m}
model: {name: m, aliases: [alias]}
pools:
  - name: fast
    role: prefill
    vendor: intel-gaudi
    engine: vllm
    connector: nixl
    layout: {block_tokens: 128}
    kv_bytes_per_token: 131072
    link_gbit_per_s: 100
    endpoints: [{name: p0, address: "10.0.0.1:8000"}, {name: p1, address: "10.0.0.3:8000"}]
    speed: {prefill_base_ms: 8, prefill_ms_per_token: 0.02, step_base_ms: 10}
  - name: wide
    role: decode
    vendor: amd
    engine: vllm
    connector: nixl
    layout: {block_tokens: 128}
    kv_bytes_per_token: 131072
    link_gbit_per_s: 100
    endpoints: [{name: d0, address: "10.0.0.2:8000"}, {name: d1, address: "10.0.0.4:8000"}]
    speed: {prefill_base_ms: 8, prefill_ms_per_token: 0.3, step_base_ms: 8}
"""


@dataclass
class Bench:
    """A loop and what it hangs on; `now_s` is its clock."""

    now_s: float = 100.0
    decisions_max: int = 8
    decided: list[Dispatch | Refuse] = field(default_factory=list)
    policy: CompiledPolicy = field(
        default_factory=lambda: compile_policy(parse_policies(POLICY.encode(), "p"))
    )

    def __post_init__(self) -> None:
        self.metrics = Metrics()
        self.coordinator = Coordinator()
        self.decisions = DecisionLog(self.decisions_max)
        self.loop = CoordinatorLoop(
            self.coordinator, clock=lambda: self.now_s, decisions=self.decisions, metrics=self.metrics
        )

    def fill(self, round_: int = 0) -> None:
        """Two seconds of work on each prefill endpoint, and a policy that has the next request wait."""
        for endpoint_id in ALL:
            self.loop.handle(SampleTaken(EndpointId(endpoint_id), Sample(0, 0, 0.25, self.now_s)))
        for index in range(2):
            self.arrive(f"fill-{index + 2 * round_}", tokens=100_000)
        (model,) = self.policy.models
        rules = replace(model.admission, queue_s_max=0.5, wait_s_max=5.0)
        self.loop.handle(ModelsReplaced((replace(model, admission=rules),)))

    def load(self) -> None:
        """Put the policy in force with all its endpoints unknown."""
        self.loop.handle(ModelsReplaced(self.policy.models))
        for binding in self.policy.bindings:
            for endpoint in binding.endpoints:
                self.loop.handle(EndpointSeen(endpoint))

    def ready(self, *ids: str) -> None:
        for endpoint_id in ids:
            sample = Sample(running=1, waiting=0, kv_usage=0.25, at_s=self.now_s)
            self.loop.handle(SampleTaken(EndpointId(endpoint_id), sample))

    def arrive(
        self, request_id: str = "r-1", tokens: int = 4_000, priority: int = 0, adapter: str = ""
    ) -> Plan | Refusal | None:
        """What the core says; None for a wait, whose end comes into `decided`."""
        name = RequestId(request_id)
        request = Request(
            name, ModelName("m"), tokens, output_tokens_max=64, priority=priority, adapter=adapter
        )
        (action,) = self.loop.handle(RequestArrived(request))
        match action:
            case Wait():
                self.loop.expect(name, self.decided.append)
                return None
            case Dispatch(plan):
                return plan
            case Refuse(_, refusal):
                return refusal

    def metric(self, line: str) -> float:
        """The value of a series as the text format names it."""
        for found in self.metrics.render().decode().splitlines():
            name, _, value = found.rpartition(" ")
            if name == line:
                return float(value)
        raise AssertionError(f"{line} is not among the metrics")


ALL = ("fast/p0", "fast/p1", "wide/d0", "wide/d1")


@pytest.fixture
def bench() -> Bench:
    """All four endpoints ready."""
    made = Bench()
    made.load()
    made.ready(*ALL)
    return made


@pytest.fixture
def make_bench() -> Callable[..., Bench]:
    return Bench


@pytest.fixture
def policy_text() -> str:
    return POLICY


@pytest.fixture(autouse=True)
def _restore_logs() -> Iterator[None]:
    """What `configure_logs` sets is the process's; the next test has another stderr."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)
