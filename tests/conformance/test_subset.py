"""Which endpoints a gateway allows: protocol 004 v1.0.0, "Endpoint Subset"."""

import json
from typing import Any

import pytest

SUBSET = ("envoy.lb.subset_hint", "x-gateway-destination-endpoint-subset")
ELSEWHERE = "192.0.2.1:8000"


def prompt(target: Any) -> bytes:
    return json.dumps({"model": target.model, "prompt": "word " * 400, "max_tokens": 8}).encode()


async def test_without_the_key_any_endpoint_of_the_pool_may_be_picked(envoy: Any, target: Any) -> None:
    told = await envoy.ask(prompt(target))
    assert set(told.destinations) <= target.endpoints


async def test_metadata_without_the_key_is_no_subset(envoy: Any, target: Any) -> None:
    told = await envoy.ask(prompt(target), hints={(SUBSET[0], "another"): ["x"], ("other", SUBSET[1]): []})
    assert set(told.destinations) <= target.endpoints


async def test_each_endpoint_can_be_the_only_one(envoy: Any, target: Any) -> None:
    for endpoint in sorted(target.endpoints):
        told = await envoy.ask(prompt(target), hints={SUBSET: [endpoint]})
        assert told.destinations == [endpoint], "no fallback either may be from outside the subset"


async def test_only_endpoints_of_the_subset_are_picked(envoy: Any, target: Any) -> None:
    allowed = sorted(target.endpoints)[:2]
    for _ in range(8):
        told = await envoy.ask(prompt(target), hints={SUBSET: allowed})
        assert set(told.destinations) <= set(allowed)


async def test_unknown_endpoints_of_the_subset_do_not_count(envoy: Any, target: Any) -> None:
    known = min(target.endpoints)
    told = await envoy.ask(prompt(target), hints={SUBSET: [ELSEWHERE, known]})
    assert told.destinations == [known]


@pytest.mark.parametrize("subset", [[], [ELSEWHERE], ["not an address"], [""], [7, None, {}]], ids=str)
async def test_a_subset_with_nobody_eligible_is_503(envoy: Any, target: Any, subset: list[Any]) -> None:
    told = await envoy.ask(prompt(target), hints={SUBSET: subset})
    assert told.status == 503
    assert told.kinds == ["immediate_response"]


@pytest.mark.optional
async def test_a_subset_may_be_one_string(envoy: Any, target: Any) -> None:
    """As the inference extension's own lightweight picker takes it."""
    allowed = sorted(target.endpoints)[:2]
    told = await envoy.ask(prompt(target), hints={SUBSET: ", ".join(allowed)})
    assert set(told.destinations) <= set(allowed)
    assert (await envoy.ask(prompt(target), hints={SUBSET: ""})).status == 503


@pytest.mark.optional
async def test_a_subset_may_name_addresses_without_ports(envoy: Any, target: Any) -> None:
    host = min(target.endpoints).rpartition(":")[0]
    told = await envoy.ask(prompt(target), hints={SUBSET: [host]})
    assert {each.rpartition(":")[0] for each in told.destinations} == {host}
    assert (await envoy.ask(prompt(target), hints={SUBSET: ["192.0.2.1"]})).status == 503


async def test_a_call_without_a_body_keeps_to_the_subset(envoy: Any, target: Any) -> None:
    sent = [(":authority", "example"), (":path", "/v1/models"), (":method", "GET"), (":scheme", "http")]
    only = min(target.endpoints)
    told = await envoy.ask(None, headers=sent, hints={SUBSET: [only]})
    if told.refusal is None:
        assert told.destinations == [only]
    else:
        assert told.status == 200, "a picker may answer itself"
