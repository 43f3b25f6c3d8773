"""Tests of compiling policies, with the property that whatever is accepted compiles and survives a dump."""

import json
from random import Random
from typing import Any

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pdcoord.core.fleet import EngineKind, Role
from pdcoord.core.model import (
    AdmissionRules,
    Disaggregation,
    Fallback,
    LegOrder,
    PrefixMode,
    Slo,
    SplitMode,
    Tokenizing,
)
from pdcoord.policy.compile import CompiledPolicy, PoolBinding, compile_policy
from pdcoord.policy.errors import PolicyError
from pdcoord.policy.load import parse_policies
from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.plans import RungKind
from transfer.layout import KvDtype, KvSplit, Order
from transfer.presets import PRESETS
from transfer.verdict import Connector


def compiled(text: str) -> CompiledPolicy:
    return compile_policy(parse_policies(text.encode(), "p.yaml"))


def test_a_policy_becomes_a_model_in_the_cores_units(good: str) -> None:
    text = good.replace(
        "{mode: auto}",
        "{mode: never, uncached_tokens_min: 7, saving_ms_min: 2, prefill_deadline_ms: 3000, "
        "transfer_deadline_ms: 4000, bandwidth_gbit_per_s_min: 16}",
    )
    text = text.replace(
        "[other-prefill, colocated]",
        "[colocated, other-decode], other_prefill_max: 3, other_decode_max: 0, "
        "budget: {colocated_share_max: 0.25, decode_kv_usage_max: 0.5, window_requests: 10}",
    )
    text = text.replace("{ttft_ms: 2000}", "{ttft_ms: 2000, tpot_ms: 50}")
    text = text.replace(
        "aliases: [llama]",
        "aliases: [llama]\n  adapters: [sql]\n  bytes_per_token: 2.5\n"
        "  prefix: {block_tokens: 32, blocks_per_endpoint_max: 9}",
    )
    (model,) = compiled(text).models
    assert (model.name, model.aliases, model.bytes_per_token) == ("meta/llama", ("llama",), 2.5)
    assert model.names == ("meta/llama", "llama", "sql")
    assert (model.prefix_block_tokens, model.prefix_blocks_per_endpoint_max) == (32, 9)
    assert model.disaggregation == Disaggregation(SplitMode.NEVER, 7, 0.002, 3.0, 4.0, 2e9)
    assert model.fallback == Fallback((RungKind.COLOCATED, RungKind.OTHER_DECODE), 3, 0, 0.25, 0.5, 10)
    assert model.slo == Slo(2.0, 0.05)
    assert [pool.name for pool in model.pools] == ["fast", "wide"]
    assert {pool.model for pool in model.pools} == {"meta/llama"}


def test_each_pool_is_bound_to_its_endpoints_or_its_labels(good: str) -> None:
    text = good.replace('endpoints: [{address: "10.0.1.1:8000"}]', "selector: {match_labels: {role: d}}")
    policy = compiled(text)
    fast, wide = policy.bindings
    assert [pool for model in policy.models for pool in model.pools] == [fast.pool, wide.pool]
    assert [(e.id, e.address, e.pool) for e in fast.endpoints] == [
        ("fast/f0", "10.0.0.1:8000", fast.pool),
        ("fast/f1", "10.0.0.2:8000", fast.pool),
    ]
    assert fast.match_labels is None
    assert wide == PoolBinding(wide.pool, (), {"role": "d"})


def test_admission_is_compiled_to_seconds_and_pools_to_their_priority(good: str) -> None:
    rules = (
        "queue_ms_max: 500, wait_ms_max: 1500, requests_max: 9, deadline_excess_max: 0.5, low_share_min: 0.1"
    )
    text = f"{good}admission: {{{rules}, objectives: {{gold: 10, batch: -1}}}}\n"
    text = text.replace("  - name: fast\n", "  - name: fast\n    priority_max: -1\n")
    (model,) = compiled(text).models
    assert model.admission == AdmissionRules(0.5, 1.5, 9, 0.5, 0.1, {"gold": 10, "batch": -1})
    assert [pool.priority_max for pool in model.pools] == [-1, None]


def test_what_is_left_out_is_the_cores_default(good: str) -> None:
    text = good[: good.index("disaggregation:")]
    (model,) = compiled(text).models
    assert (model.disaggregation, model.fallback, model.slo) == (Disaggregation(), Fallback(), Slo())
    assert model.admission == AdmissionRules()


class Writer:
    """Writes policies at random: every key of the format, each optional one now and then.

    Drawn from a seed and not from hypothesis' own strategies, which take 100 ms for a document this deep.
    """

    def __init__(self, seed: int) -> None:
        self._rng = Random(seed)

    def policy(self) -> dict[str, Any]:
        return {
            "apiVersion": "pdcoord.io/v1alpha1",
            "kind": "PoolPolicy",
            "metadata": {"name": "a"},
            "model": {
                "name": "org/Model",
                **self._some(
                    aliases=self._rng.sample(["a", "b", "c"], self._rng.randint(0, 3)),
                    adapters=self._rng.sample(["d", "org/Model:e", "f"], self._rng.randint(0, 3)),
                    bytes_per_token=self._rng.uniform(0.25, 64),
                    prefix=self._some(
                        block_tokens=self._rng.randint(1, 8192),
                        blocks_per_endpoint_max=self._rng.randint(1, 4_194_304),
                    ),
                ),
            },
            "pools": [self._pool(f"p{i}") for i in range(self._rng.randint(1, 4))],
            **self._some(
                disaggregation=self._disaggregation(),
                fallback=self._fallback(),
                slo=self._some(ttft_ms=self._figure() + 0.1, tpot_ms=self._figure() + 0.1),
                admission=self._some(
                    queue_ms_max=self._figure(),
                    wait_ms_max=self._figure(),
                    requests_max=self._rng.randint(1, 65_536),
                    deadline_excess_max=self._rng.uniform(0, 100),
                    low_share_min=self._rng.random(),
                    objectives=self._some(gold=self._rng.randint(-1_000, 1_000), batch=-1),
                ),
            ),
        }

    def _some(self, **optional: Any) -> dict[str, Any]:
        return {key: value for key, value in optional.items() if self._rng.random() < 0.5}

    def _figure(self) -> float:
        return self._rng.choice([0, 1, self._rng.randint(0, 1000), self._rng.uniform(0, 1e4)])

    def _pool(self, name: str) -> dict[str, Any]:
        source: dict[str, Any] = {"endpoints": [self._endpoint() for _ in range(self._rng.randint(1, 3))]}
        if self._rng.random() < 0.3:
            source = {"selector": {"match_labels": {"pool": name, **self._some(a="", b="1")}}}
        return {
            "name": name,
            "vendor": self._rng.choice(["amd", "nvidia h100"]),
            "kv_bytes_per_token": self._rng.randint(1, 1 << 26),
            "speed": {
                "prefill_ms_per_token": self._figure() + 0.01,
                "step_base_ms": self._figure() + 0.01,
                **self._some(
                    prefill_base_ms=self._figure(),
                    prefill_ns_per_token_squared=self._figure(),
                    step_us_per_sequence=self._figure(),
                    step_ns_per_context_token=self._figure(),
                ),
            },
            **source,
            **self._engine(),
            **self._some(
                layout=self._layout(),
                link_gbit_per_s=self._figure() + 0.1,
                cost_per_hour=self._figure(),
                priority_max=self._rng.randint(-1_000, 1_000),
                limits=self._some(
                    in_flight_max=self._rng.randint(1, 65_536), context_tokens_max=self._rng.randint(1, 10**8)
                ),
            ),
        }

    def _engine(self) -> dict[str, str]:
        if self._rng.random() < 0.2:
            role = self._rng.choice(list(Role))
            connector = Connector.NONE if role is Role.BOTH else Connector.SGLANG
            return {"engine": EngineKind.SGLANG, "role": role, "connector": connector}
        connector = self._rng.choice([Connector.NIXL, Connector.PDCOORD, Connector.NONE])
        return {"engine": EngineKind.VLLM, "role": self._rng.choice(list(Role)), "connector": connector}

    def _endpoint(self) -> dict[str, Any]:
        return {
            "address": f"host{self._rng.randint(0, 10**6)}:{self._rng.randint(1, 65_535)}",
            **self._some(
                name=f"n{self._rng.randint(0, 10**6)}.x_Y",
                bootstrap_port=self._rng.randint(1, 65_535),
                kv_port=self._rng.randint(1, 65_535),
                metrics_port=self._rng.randint(1, 65_535),
            ),
        }

    def _layout(self) -> dict[str, Any]:
        least = {"block_tokens": self._rng.choice([1, 16, 128, 10**12])}
        return {
            **(least if self._rng.random() < 0.7 else {"preset": self._rng.choice(list(PRESETS))}),
            **self._some(
                order=self._rng.choice(list(Order)),
                dtype=self._rng.choice(list(KvDtype)),
                tensor_parallel=self._rng.randint(1, 1024),
                tiling=self._rng.choice(["plain", "amx"]),
                split=self._rng.choice(list(KvSplit)),
                head_dim_multiple=self._rng.choice([1, 64]),
            ),
        }

    def _disaggregation(self) -> dict[str, Any]:
        return self._some(
            mode=self._rng.choice(list(SplitMode)),
            order=self._rng.choice(list(LegOrder)),
            uncached_tokens_min=self._rng.randint(0, 10**7),
            saving_ms_min=self._figure(),
            prefill_deadline_ms=self._figure() + 1,
            transfer_deadline_ms=self._figure() + 1,
            lease_ms=self._rng.uniform(2e4, 3.6e6),
            bandwidth_gbit_per_s_min=self._figure(),
        )

    def _fallback(self) -> dict[str, Any]:
        rungs = [rung for rung in RungKind if rung is not RungKind.REFUSE]
        return self._some(
            ladder=self._rng.sample(rungs, self._rng.randint(0, 3)),
            other_prefill_max=self._rng.randint(0, 16),
            other_decode_max=self._rng.randint(0, 16),
            budget=self._some(
                colocated_share_max=self._rng.random(),
                decode_kv_usage_max=self._rng.random(),
                window_requests=self._rng.randint(1, 100_000),
            ),
            resume=self._some(
                tries_max=self._rng.randint(1, 8),
                age_s_max=self._figure() + 1,
                stall_ms_min=self._rng.uniform(100, 6e5),
            ),
            hedge=self._some(share_max=self._rng.random(), after_ms_min=self._figure()),
            quarantine=self._some(share_max=self._rng.random()),
        )


# What the rules between parts refuse of what is drawn; anything else would be a fault of the writer.
BETWEEN_PARTS = (
    "no pool decodes",
    "can serve a request alone",
    "is always, but",
    "expected less than lease_ms",
    "knows an adapter",
)


@given(st.integers(0, 2**32))
@settings(deadline=None)
def test_every_accepted_policy_compiles_and_survives_a_dump(seed: int) -> None:
    policy = Writer(seed).policy()
    # JSON is YAML, which saves writing a dumper.
    text = json.dumps(policy)
    try:
        first = parse_policies(text.encode(), "f")
    except PolicyError as error:
        strange = [
            p.message for p in error.problems if not any(words in p.message for words in BETWEEN_PARTS)
        ]
        assert strange == []
        assume(False)
    dumped = json.dumps(first[0].spec.model_dump(mode="json", exclude_none=True))
    again = parse_policies(dumped.encode(), "f")
    assert [document.spec for document in again] == [document.spec for document in first]
    one, other = compile_policy(first), compile_policy(again)
    assert (one.models, one.bindings) == (other.models, other.bindings)
    assert len(one.models) == 1
    assert [binding.pool.name for binding in one.bindings] == [pool["name"] for pool in policy["pools"]]
    ids = [endpoint.id for binding in one.bindings for endpoint in binding.endpoints]
    assert len(set(ids)) == len(ids)


def test_the_order_of_legs_and_the_ports_of_endpoints_reach_the_core(good: str) -> None:
    text = good.replace("mode: auto", "order: concurrent").replace(
        '"10.0.0.1:8000"}',
        '"10.0.0.1:8000", kv_port: 15000, metrics_port: 9091, kv_events_port: 5557,'
        " kv_events_replay_port: 5558}",
    )
    result = compiled(text)
    assert result.models[0].disaggregation.order is LegOrder.CONCURRENT
    first, second = result.bindings[0].endpoints
    assert (first.kv_port, first.metrics_port) == (15_000, 9_091)
    assert (first.kv_events_port, first.kv_events_replay_port) == (5_557, 5_558)
    assert (second.kv_events_port, second.kv_events_replay_port) == (None, None)
    assert (second.kv_port, second.metrics_port) == (None, None)


def test_precise_prefixes_and_their_tokens_reach_the_core(good: str) -> None:
    text = good.replace('"10.0.0.1:8000"}', '"10.0.0.1:8000", kv_events_port: 5557}')
    text = text.replace(
        "aliases: [llama]",
        "prefix: {mode: precise, precise_block_tokens: 32, precise_blocks_max: 5000}\n"
        "  tokenizer: {file: /m/tokenizer.json, render: 'R:9', deadline_ms: 20}",
    )
    (model,) = compiled(text).models
    assert model.prefix_mode is PrefixMode.PRECISE
    assert (model.precise_block_tokens, model.precise_blocks_max) == (32, 5_000)
    assert model.tokenizing == Tokenizing("/m/tokenizer.json", HostPort("r:9"), 0.02)


def test_prefixes_are_approximate_unless_said_otherwise(good: str) -> None:
    (model,) = compiled(good).models
    assert (model.prefix_mode, model.tokenizing) == (PrefixMode.APPROXIMATE, Tokenizing())
