"""A fact reaches every account that it touches, and news of nobody reaches none."""

import pytest

from pdcoord.core.coordinator import Coordinator
from pdcoord.core.costs import SpeedFigures
from pdcoord.core.events import ModelsReplaced, PathProbed, SidecarLost
from pdcoord.core.fleet import (
    Endpoint,
    EndpointGone,
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
from pdcoord.core.kvcache import KvCleared
from pdcoord.core.model import Model
from pdcoord.core.probes import Probe
from pdcoord.protocol.headers import HostPort
from transfer.layout import KvLayout
from transfer.verdict import Connector, Side

SPEED = SpeedFigures(0.01, 1e-4, 0.01, step_s_per_sequence=1e-4)


def pool(name: str, role: Role) -> Pool:
    return Pool(
        name=PoolName(name),
        model=ModelName("m"),
        role=role,
        vendor="v",
        engine=EngineKind.VLLM,
        side=Side(Connector.PDCOORD, KvLayout(16)),
        speed=SPEED,
        kv_bytes_per_token=1_000,
        link_bytes_per_s=1e10,
    )


P, D = pool("p", Role.PREFILL), pool("d", Role.DECODE)


@pytest.fixture
def coordinator() -> Coordinator:
    made = Coordinator()
    made.handle(ModelsReplaced((Model(ModelName("m"), (P, D)),)), 0.0)
    for each in (P, D):
        made.handle(EndpointSeen(Endpoint(EndpointId(each.name), each, HostPort(f"{each.name}:80"))), 0.0)
        made.handle(SampleTaken(EndpointId(each.name), Sample(0, 0, 0.0, 0.0)), 0.0)
    return made


def test_a_probe_is_kept_for_its_path_and_goes_with_its_endpoint(coordinator: Coordinator) -> None:
    probed = PathProbed(HostPort("p:80"), EndpointId("d"), Probe(0.0, 30.0, failure="unreachable"))
    coordinator.handle(probed, 0.0)
    assert coordinator.paths.probe_count == 1
    coordinator.handle(EndpointGone(EndpointId("p")), 1.0)
    coordinator.validate()
    assert coordinator.paths.probe_count == 0


@pytest.mark.parametrize(
    "news",
    [
        PathProbed(HostPort("p:80"), EndpointId("x"), Probe(0.0, 30.0)),
        PathProbed(HostPort("x:80"), EndpointId("d"), Probe(0.0, 30.0)),
        SampleTaken(EndpointId("x"), Sample(1, 1, 0.5, 0.0)),
        KvCleared(EndpointId("x")),
        EndpointGone(EndpointId("x")),
        SidecarLost(HostPort("x:80")),
    ],
)
def test_news_of_nobody_changes_nothing(coordinator: Coordinator, news: object) -> None:
    before = [(view.prefill.id, view.decode.id, view.fault) for view in coordinator.paths_view(0.0)]
    assert coordinator.handle(news, 0.0) == []  # type: ignore[arg-type]
    coordinator.validate()
    assert [(v.prefill.id, v.decode.id, v.fault) for v in coordinator.paths_view(0.0)] == before
    assert coordinator.paths.probe_count == 0
