"""Observations: which could have been measured, and what kind they are."""

import math

import pytest

from pdcoord.core.costs import SpeedFigures
from pdcoord.core.fleet import Endpoint, EndpointId, EngineKind, ModelName, Pool, PoolName, Role
from pdcoord.core.observations import (
    DURATION_S_MAX,
    TOKENS_MAX,
    Observation,
    ObservationKind,
    OutputSeen,
    PrefillSeen,
    StepsSeen,
    TransferSeen,
    is_sane,
    kind_of,
)
from pdcoord.protocol.headers import HostPort
from transfer.layout import KvLayout
from transfer.verdict import Connector, Side

M = ModelName("m")
SIDE = Side(Connector.PDCOORD, KvLayout(16))
POOL = Pool(PoolName("p"), M, Role.BOTH, "v", EngineKind.VLLM, SIDE, SpeedFigures(0.01, 1e-4, 0.01), 1, 1e9)
E = Endpoint(EndpointId("e"), POOL, HostPort("h:1"))


@pytest.mark.parametrize(
    ("observation", "kind"),
    [
        (PrefillSeen(E, 1, 1e-6, is_alone=True), ObservationKind.PREFILL),
        (PrefillSeen(E, TOKENS_MAX, DURATION_S_MAX, is_alone=False), ObservationKind.PREFILL),
        (StepsSeen(E, 1, 0.01, 1.0, 0.0), ObservationKind.STEPS),
        (TransferSeen(E, E, 1, 0, 0.01), ObservationKind.TRANSFER),
        (OutputSeen(M, "", 1), ObservationKind.OUTPUT),
    ],
)
def test_what_can_be_measured(observation: Observation, kind: ObservationKind) -> None:
    assert is_sane(observation)
    assert kind_of(observation) is kind


@pytest.mark.parametrize("took_s", [0.0, -1.0, math.nan, math.inf, -math.inf, 1e300])
def test_times_that_cannot(took_s: float) -> None:
    assert not is_sane(PrefillSeen(E, 1, took_s, is_alone=True))
    assert not is_sane(StepsSeen(E, 1, took_s, 1.0, 1.0))
    assert not is_sane(TransferSeen(E, E, 1, 0, took_s))


@pytest.mark.parametrize("count", [0, -1, 1 << 62])
def test_counts_that_cannot(count: int) -> None:
    assert not is_sane(PrefillSeen(E, count, 1.0, is_alone=True))
    assert not is_sane(StepsSeen(E, count, 1.0, 1.0, 1.0))
    assert not is_sane(TransferSeen(E, E, count, 0, 1.0))
    assert not is_sane(OutputSeen(M, "", count))
