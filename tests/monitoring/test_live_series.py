"""The alerts over what a coordinator's own exporter shows while something goes wrong.

A loop is driven in its own time: its endpoints are scraped at the feed's pace and calls come in. What it
shows every half minute is given to promtool, which says which alerts fire at the end.
"""

import itertools
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from pdcoord.core.coordinator import Coordinator
from pdcoord.core.events import Dispatch, ModelsReplaced, Outcome, Refuse, RequestArrived, RequestEnded
from pdcoord.core.events import ResponseBegan as Began
from pdcoord.core.fleet import (
    EndpointDraining,
    EndpointId,
    EndpointSeen,
    ModelName,
    Sample,
    SampleFailed,
    SampleTaken,
)
from pdcoord.core.request import Request, RequestId
from pdcoord.feeds.scrapes import Round, ScrapeFailure, ScrapeLimits
from pdcoord.front.ports import CallRecord
from pdcoord.policy.compile import compile_policy
from pdcoord.policy.load import parse_policies
from pdcoord.runtime.decisions import DecisionLog
from pdcoord.runtime.loop import CoordinatorLoop
from pdcoord.runtime.observe import Metrics

RULES = Path(__file__).resolve().parents[2] / "deploy" / "monitoring" / "rules.yaml"
STEP_S = 0.2
EVERY_S = 30.0
LAST_S = 720.0
BEGAN_S = 1_000.0
CALL_EVERY_S = 2.0
"""Between two calls."""

POLICY = """\
apiVersion: pdcoord.io/v1alpha1
kind: PoolPolicy
metadata: {{name: m}}
model: {{name: m}}
fallback: {fallback}
pools:
  - name: fast
    role: prefill
    vendor: nvidia
    engine: {engine}
    connector: {connector}
    layout: {{block_tokens: 128}}
    kv_bytes_per_token: 131072
    link_gbit_per_s: 100
    endpoints: [{{name: p0, address: "10.0.0.1:8000"}}, {{name: p1, address: "10.0.0.2:8000"}}]
    speed: {{prefill_base_ms: 8, prefill_ms_per_token: 0.02, step_base_ms: 10}}
  - name: wide
    role: decode
    vendor: nvidia
    engine: {engine}
    connector: {connector}
    layout: {{block_tokens: 128}}
    kv_bytes_per_token: 131072
    link_gbit_per_s: 100
    endpoints: [{{name: d0, address: "10.0.0.3:8000"}}, {{name: d1, address: "10.0.0.4:8000"}}]
    speed: {{prefill_base_ms: 8, prefill_ms_per_token: 0.3, step_base_ms: 8}}
"""

Answers = Callable[[str, float], bool]
"""Whether an endpoint answers a scrape, so many seconds after the start."""


def policy(fallback: str = "{}", engine: str = "vllm", connector: str = "nixl") -> str:
    return POLICY.format(fallback=fallback, engine=engine, connector=connector)


@dataclass
class Site:
    """One coordinator, and what it showed so far by series."""

    policy: str = field(default_factory=policy)
    limits: ScrapeLimits = field(default_factory=ScrapeLimits)
    shown: dict[str, list[str]] = field(default_factory=dict)
    now_s: float = BEGAN_S

    def __post_init__(self) -> None:
        self.metrics = Metrics()
        self.loop = CoordinatorLoop(
            Coordinator(), clock=lambda: self.now_s, decisions=DecisionLog(8), metrics=self.metrics
        )
        compiled = compile_policy(parse_policies(self.policy.encode(), "p"))
        self.loop.handle(ModelsReplaced(compiled.models))
        for endpoint in itertools.chain(*(binding.endpoints for binding in compiled.bindings)):
            self.loop.handle(EndpointSeen(endpoint))
        self._turns = Round(self.limits)
        self._calls = itertools.count()

    def run(self, answers: Answers, *, has_calls: bool = False, drained: str | None = None) -> None:
        """Twelve minutes."""
        look, call = round(EVERY_S / STEP_S), round(CALL_EVERY_S / STEP_S)
        for step in range(round(LAST_S / STEP_S) + 1):
            self.now_s = BEGAN_S + step * STEP_S
            if drained is not None and self.now_s > BEGAN_S + 60.0:
                self.loop.handle(EndpointDraining(EndpointId(drained)))
            self._scrape(answers)
            if has_calls and step % call == 0:
                self._call()
            if step % look == look // 2:  # Never just after a scrape that comes once a minute.
                self._show()

    def _scrape(self, answers: Answers) -> None:
        turns = self._turns
        turns.sync(((each.id, each.address) for each in self.loop.endpoints()), self.now_s)
        for target in turns.take_due(self.now_s):
            is_good = answers(target.id, self.now_s - BEGAN_S)
            turns.done(target, self.now_s, is_failure=not is_good)
            sample = Sample(running=1, waiting=0, kv_usage=0.25, at_s=self.now_s)
            self.loop.handle(
                SampleTaken(target.id, sample) if is_good else SampleFailed(target.id, ScrapeFailure.TIMEOUT)
            )

    def _call(self) -> None:
        """One call, that is served as it is planned, and counted as a front does."""
        name = RequestId(f"r{next(self._calls)}")
        (action,) = self.loop.handle(
            RequestArrived(Request(name, ModelName("m"), 4_000, output_tokens_max=8))
        )
        record = CallRecord(name, "/v1/completions", self.now_s, model="m", ended_s=self.now_s)
        match action:
            case Dispatch(plan):
                self.loop.handle(Began(name, None))
                self.loop.handle(RequestEnded(name, Outcome.OK))
                record.plan, record.outcome, record.status = plan, Outcome.OK, 200
            case Refuse(_, refusal):
                record.outcome, record.reason, record.status = Outcome.REFUSED, refusal.reason, refusal.status
        self.metrics.count_call(record)

    def _show(self) -> None:
        """Take down every series, those that are new with a gap before them."""
        count = max(map(len, self.shown.values()), default=0)
        lines = (line for line in self.metrics.render().decode().splitlines() if not line.startswith("#"))
        now = dict(line.rsplit(" ", 1) for line in lines if not line.startswith(("python_", "process_")))
        for name in self.shown.keys() | now.keys():
            values = self.shown.setdefault(name, ["_"] * count)
            values.append(now.get(name, "_"))


def firing(site: Site, promtool: str, folder: Path, expected: Iterable[str]) -> str:
    """What promtool has against `expected` being the alerts that fire at the end; empty if nothing."""
    wanted, last_s = sorted(expected), EVERY_S * (max(map(len, site.shown.values())) - 1)
    test = {
        "interval": f"{EVERY_S:.0f}s",
        "input_series": [
            {"series": name.replace("}", ',namespace="n",job="j"}') if "{" in name else name, "values": text}
            for name, values in site.shown.items()
            if (text := " ".join(values)) and "_bucket" not in name
        ],
        "promql_expr_test": [
            {
                "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                "eval_time": f"{last_s:.0f}s",
                "exp_samples": [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in wanted],
            }
        ],
    }
    path = folder / "test.yaml"
    path.write_text(
        yaml.safe_dump({"rule_files": [str(RULES)], "evaluation_interval": "30s", "tests": [test]})
    )
    done = subprocess.run(
        [promtool, "test", "rules", str(path)], capture_output=True, text=True, timeout=60, check=False
    )
    return "" if done.returncode == 0 else done.stdout + done.stderr


ONCE_A_MINUTE = ScrapeLimits(interval_s=60.0)


@pytest.mark.parametrize(
    ("limits", "answers", "drained", "expected"),
    [
        (ScrapeLimits(), lambda _id, _s: True, None, ()),
        (ScrapeLimits(), lambda id_, s: id_ != "wide/d0" or s < 60.0, None, ("PdcoordSignalsStale",)),
        (ScrapeLimits(), lambda id_, s: id_ != "wide/d0" or s < 60.0, "wide/d0", ()),
        (ONCE_A_MINUTE, lambda _id, _s: True, None, ()),
        (ONCE_A_MINUTE, lambda _id, s: not 500.0 < s < 550.0, None, ()),
        (ONCE_A_MINUTE, lambda id_, s: id_ != "wide/d0" or s < 90.0, None, ("PdcoordSignalsStale",)),
    ],
    ids=["good", "one falls silent", "one drains", "seldom", "seldom and one lost", "seldom and silent"],
)
def test_an_endpoint_that_falls_silent_is_told_of(
    promtool: str,
    tmp_path: Path,
    limits: ScrapeLimits,
    answers: Answers,
    drained: str | None,
    expected: tuple[str, ...],
) -> None:
    site = Site(limits=limits)
    site.run(answers, drained=drained)
    assert firing(site, promtool, tmp_path, expected) == ""


OUTAGE = ("PdcoordPrefillOutage", "PdcoordPoolEmpty", "PdcoordSignalsStale")
WHOLE = "{budget: {window_requests: 100, colocated_share_max: 1.0}}"
SMALL = "{budget: {window_requests: 100, colocated_share_max: 0.05}}"
HALF = "{budget: {window_requests: 100, colocated_share_max: 0.5}}"
NO_RUNG = "{ladder: [other-prefill, other-decode]}"


@pytest.mark.parametrize(
    ("policy_text", "expected"),
    [
        (policy(WHOLE), OUTAGE),
        (policy(HALF), (*OUTAGE, "PdcoordFallbackBudgetSpent", "PdcoordSaturated")),
        (policy(SMALL), (*OUTAGE, "PdcoordFallbackBudgetSpent", "PdcoordSaturated")),
        (policy(NO_RUNG), OUTAGE),
        (policy(NO_RUNG, "sglang", "sglang"), (*OUTAGE, "PdcoordNotReady")),
    ],
    ids=["all fall back", "half of them", "few", "no rung", "sglang"],
)
def test_a_prefill_outage_is_told_of_whatever_the_ladder(
    promtool: str, tmp_path: Path, policy_text: str, expected: tuple[str, ...]
) -> None:
    site = Site(policy=policy_text)
    site.run(lambda id_, s: not id_.startswith("fast/") or s < 60.0, has_calls=True)
    assert firing(site, promtool, tmp_path, expected) == ""


def test_a_fleet_that_serves_well_is_quiet(promtool: str, tmp_path: Path) -> None:
    site = Site()
    site.run(lambda _id, _s: True, has_calls=True)
    assert any('why="split-faster"' in name for name in site.shown)
    assert firing(site, promtool, tmp_path, ()) == ""
