"""What is shown of canaries: counts, states, and a line that names both layouts."""

from dataclasses import replace

import structlog
from structlog.testing import LogCapture

from pdcoord.core.canary import CanaryBegan, CanaryJudged
from pdcoord.core.coordinator import Coordinator
from pdcoord.core.costs import SpeedFigures
from pdcoord.core.events import ModelsReplaced
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
from pdcoord.core.likeness import CanaryOutcome, Finding
from pdcoord.core.model import Model
from pdcoord.protocol.headers import HostPort
from pdcoord.runtime.canaries import CanaryRecord
from transfer.layout import KvLayout
from transfer.verdict import Connector, Side

M = ModelName("m")
FAST = Pool(
    PoolName("fast"),
    M,
    Role.PREFILL,
    "nvidia",
    EngineKind.VLLM,
    Side(Connector.PDCOORD, KvLayout(16)),
    SpeedFigures(0.01, 1e-4, 0.01),
    1_000,
    1e10,
)
WIDE = replace(
    FAST,
    name=PoolName("wide"),
    role=Role.DECODE,
    vendor="gaudi",
    side=Side(Connector.PDCOORD, KvLayout(128)),
)
PAIR = ("m", "fast", "wide")


def test_a_canary_that_ended_is_counted_and_told_with_both_layouts() -> None:
    coordinator = Coordinator(has_canaries=True)
    log = LogCapture()
    record = CanaryRecord(coordinator.canaries, lambda: 12.0, structlog.wrap_logger(None, processors=[log]))
    coordinator.handle(ModelsReplaced((Model(M, (FAST, WIDE)),)), 0.0)
    for pool in (FAST, WIDE):
        name = EndpointId(f"{pool.name}/0")
        coordinator.handle(EndpointSeen(Endpoint(name, pool, HostPort(f"{pool.name}:80"))), 0.0)
        coordinator.handle(SampleTaken(name, Sample(0, 0, 0.0, 0.0)), 0.0)

    def shown() -> dict[str, dict[tuple[str, ...], float]]:
        return {spec.name: dict(samples) for spec, samples in record.samples()}

    before = shown()
    assert before["pdcoord_gateway_canary_state"][*PAIR, "untried"] == 1.0
    assert set(before["pdcoord_gateway_canaries_total"].values()) == {0.0}
    assert before["pdcoord_gateway_canary_age_seconds"] == {}
    (order,) = coordinator.canaries.due(1.0)
    coordinator.handle(CanaryBegan(order), 1.0)
    finding = Finding(CanaryOutcome.TOKENS, "tokens differ", 2)
    coordinator.handle(CanaryJudged(order, finding), 2.0)
    record.told(order, finding)
    after = shown()
    assert after["pdcoord_gateway_canaries_total"][*PAIR, "canary-tokens"] == 1.0
    assert after["pdcoord_gateway_canary_state"][*PAIR, "failed"] == 1.0
    assert after["pdcoord_gateway_canary_state"][*PAIR, "untried"] == 0.0
    assert after["pdcoord_gateway_canary_suspects"] == {PAIR: 0.0}
    assert after["pdcoord_gateway_canary_age_seconds"] == {PAIR: 10.0}
    (line,) = log.entries
    assert (line["event"], line["log_level"], line["position"]) == ("canary.judged", "error", 2)
    assert line["prefill_layout"].startswith("nvidia pdcoord")
    assert "block_tokens=128" in line["decode_layout"]
    record.told(order, Finding(CanaryOutcome.INCONCLUSIVE, "no answer"))
    record.told(order, Finding(CanaryOutcome.PASSED))
    assert [entry["log_level"] for entry in log.entries] == ["error", "warning", "info"]
    coordinator.handle(ModelsReplaced(()), 20.0)
    assert not any(shown().values())
