"""Gates: what is shut is shut for its own pair of pools and for nobody else."""

from dataclasses import replace

from pdcoord.core.costs import SpeedFigures
from pdcoord.core.fleet import Endpoint, EndpointId, EngineKind, ModelName, Pool, PoolName, Role
from pdcoord.core.gates import UNTRIED, CanaryGates
from pdcoord.protocol.headers import HostPort
from transfer.verdict import Connector, Side

FAST = Pool(
    PoolName("fast"),
    ModelName("m"),
    Role.PREFILL,
    "v",
    EngineKind.VLLM,
    Side(Connector.PDCOORD, None),
    SpeedFigures(0.01, 1e-4, 0.01),
    1_000,
    1e10,
)
WIDE, OTHER = (replace(FAST, name=PoolName(name), role=Role.DECODE) for name in ("wide", "other"))
PAIR = (FAST.name, WIDE.name)


def endpoint(of: Pool, index: int) -> Endpoint:
    return Endpoint(EndpointId(f"{of.name}/{index}"), of, HostPort(f"{of.name}-{index}:80"))


def test_a_pair_is_shut_for_all_of_its_endpoints_and_for_no_others() -> None:
    gates = CanaryGates()
    assert gates.fault(endpoint(FAST, 0), endpoint(WIDE, 0)) == ""
    gates.set_pair(PAIR, UNTRIED)
    assert gates.fault(endpoint(FAST, 0), endpoint(WIDE, 0)) == UNTRIED
    assert gates.fault(endpoint(FAST, 0), endpoint(OTHER, 0)) == ""
    assert gates.endpoints == set()
    gates.set_pair(PAIR, "")
    gates.set_pair(PAIR, "")
    assert gates.pair_fault(FAST, WIDE) == ""


def test_an_endpoint_is_shut_on_either_side_and_for_one_pair() -> None:
    gates = CanaryGates()
    prefill, decode = endpoint(FAST, 0), endpoint(WIDE, 0)
    gates.set_end(PAIR, prefill.id, "canary-tokens")
    gates.set_end(PAIR, prefill.id, "canary-error")
    gates.set_end(PAIR, decode.id, "canary-tokens")
    gates.validate()
    assert gates.end_fault(prefill, endpoint(WIDE, 1)) == "canary-error"
    assert gates.end_fault(endpoint(FAST, 1), decode) == "canary-tokens"
    assert gates.end_fault(endpoint(FAST, 1), endpoint(WIDE, 1)) == ""
    assert gates.end_fault(prefill, endpoint(OTHER, 0)) == ""
    assert set(gates.endpoints) == {prefill.id, decode.id}
    gates.set_end(PAIR, prefill.id, "")
    gates.set_end(PAIR, prefill.id, "")
    gates.validate()
    assert set(gates.endpoints) == {decode.id}
