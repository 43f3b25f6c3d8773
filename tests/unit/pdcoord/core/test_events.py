"""What is said of a request names it."""

from pdcoord.core.costs import SpeedFigures
from pdcoord.core.events import Dispatch, Refuse, Wait
from pdcoord.core.fleet import Endpoint, EndpointId, EngineKind, ModelName, Pool, PoolName, Role
from pdcoord.core.plan import Candidate, Figures, Plan, Why
from pdcoord.core.refusals import AT_LIMIT
from pdcoord.core.request import RequestId
from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.plans import DialectName
from transfer.verdict import Connector, Side

NAME = RequestId("r-1")
POOL = Pool(
    name=PoolName("p"),
    model=ModelName("m"),
    role=Role.BOTH,
    vendor="v",
    engine=EngineKind.VLLM,
    side=Side(Connector.NONE, None),
    speed=SpeedFigures(0.01, 1e-4, 0.01),
    kv_bytes_per_token=1,
    link_bytes_per_s=0.0,
)


def test_every_action_names_its_request() -> None:
    endpoint = Endpoint(EndpointId("p/0"), POOL, HostPort("h:1"))
    chosen = Candidate(endpoint, None, None, Figures(0.0, 0.1, 0.0, 0.01, 0.0, 0.0, 0.0, 10, 0))
    plan = Plan(NAME, chosen, Why.COLOCATED_FASTER, DialectName.NIXLV2)
    assert [action.id for action in (Dispatch(plan), Refuse(NAME, AT_LIMIT), Wait(NAME))] == [NAME] * 3
