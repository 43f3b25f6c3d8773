"""Tests of compiling a pool: units, defaults and endpoint ids."""

import pytest

from pdcoord.core.costs import SpeedFigures
from pdcoord.core.fleet import EndpointId, EngineKind, ModelName, Pool, PoolLimits, Role
from pdcoord.policy.pools import compile_pool, make_endpoint
from pdcoord.policy.poolschema import PoolSpec
from pdcoord.protocol.headers import HostPort
from transfer.layout import KvDtype, KvLayout, KvSplit, Order
from transfer.verdict import Connector, Side

FULL = """{
  "name": "p", "role": "both", "vendor": "amd", "engine": "vllm", "connector": "pdcoord",
  "layout": {"block_tokens": 32, "order": "HND", "dtype": "float16", "tensor_parallel": 2, "tiling": "t",
             "split": "halved", "head_dim_multiple": 64},
  "kv_bytes_per_token": 1000, "link_gbit_per_s": 100, "selector": {"match_labels": {"a": "b"}},
  "speed": {"prefill_base_ms": 8, "prefill_ms_per_token": 0.5, "prefill_ns_per_token_squared": 4,
            "step_base_ms": 10, "step_us_per_sequence": 50, "step_ns_per_context_token": 20},
  "cost_per_hour": 2.5, "limits": {"in_flight_max": 9, "context_tokens_max": 4096}
}"""
LEAST = """{
  "name": "p", "role": "prefill", "vendor": "amd", "engine": "sglang", "connector": "sglang",
  "kv_bytes_per_token": 1, "selector": {"match_labels": {"a": "b"}}, "speed": {}
}"""


def pool_of(text: str) -> Pool:
    return compile_pool(PoolSpec.model_validate_json(text, strict=True), ModelName("m"))


def test_every_figure_arrives_in_the_cores_units() -> None:
    pool = pool_of(FULL)
    assert pool.side == Side(
        Connector.PDCOORD, KvLayout(32, Order.HND, KvDtype.FLOAT16, 2, "t", KvSplit.HALVED, 64)
    )
    assert pool.speed == SpeedFigures(
        prefill_base_s=0.008,
        prefill_s_per_token=0.0005,
        prefill_s_per_token_squared=4e-9,
        step_base_s=0.01,
        step_s_per_sequence=5e-5,
        step_s_per_context_token=2e-8,
    )
    assert (pool.name, pool.model, pool.role, pool.vendor) == ("p", "m", Role.BOTH, "amd")
    assert pool.link_bytes_per_s == 12.5e9
    assert (pool.kv_bytes_per_token, pool.cost_per_hour) == (1000, 2.5)
    assert pool.limits == PoolLimits(9, 4096)


def test_what_is_left_out_is_unknown_or_the_cores_default() -> None:
    pool = pool_of(LEAST)
    assert pool.side == Side(Connector.SGLANG, None)
    assert pool.link_bytes_per_s == 0.0
    assert pool.speed == SpeedFigures(0.0, 0.0, 0.0)
    assert pool.limits == PoolLimits()


def test_an_endpoint_is_called_by_pool_and_name() -> None:
    pool = pool_of(FULL)
    assert make_endpoint(pool, HostPort("h:1"), "x", None).id == EndpointId("p/x")
    assert make_endpoint(pool, HostPort("h:1"), None, None).id == EndpointId("p/h:1")


@pytest.mark.parametrize(
    ("text", "given", "expected"),
    [(LEAST, None, 8998), (LEAST, 7000, 7000), (FULL, None, None), (FULL, 7, 7)],
)
def test_sglang_prefill_has_its_usual_bootstrap_port(
    text: str, given: int | None, expected: int | None
) -> None:
    pool = pool_of(text)
    assert (pool.engine is EngineKind.SGLANG) is (text is LEAST)
    assert make_endpoint(pool, HostPort("h:1"), None, given).bootstrap_port == expected


def test_ports_of_an_endpoint_are_kept() -> None:
    ports = {
        "kv_port": 14_580,
        "metrics_port": 9_090,
        "kv_events_port": 5_557,
        "kv_events_replay_port": 5_558,
    }
    endpoint = make_endpoint(pool_of(FULL), HostPort("h:1"), None, None, **ports)
    assert {name: getattr(endpoint, name) for name in ports} == ports
    assert make_endpoint(pool_of(FULL), HostPort("h:1"), None, None).kv_port is None
