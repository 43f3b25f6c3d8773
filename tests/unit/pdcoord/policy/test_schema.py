"""Tests of a policy document's sections: every rule's golden line."""

from collections.abc import Iterator

import pytest
from pydantic import BaseModel

from pdcoord.core.fleet import PoolLimits
from pdcoord.core.model import Disaggregation, Fallback, Model, Tokenizing
from pdcoord.policy.errors import PolicyError
from pdcoord.policy.load import parse_policies
from pdcoord.policy.poolschema import LimitsSpec
from pdcoord.policy.schema import DisaggregationSpec, FallbackSpec, PoolPolicy, PrefixSpec, TokenizerSpec


def problems_of(text: str) -> list[str]:
    with pytest.raises(PolicyError) as caught:
        parse_policies(text.encode(), "p")
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("v1alpha1", "v2", 'p:1: apiVersion: is "pdcoord.io/v2", expected pdcoord.io/v1alpha1'),
        ("PoolPolicy", "Endpoints", 'p:2: kind: is "Endpoints", expected PoolPolicy'),
        (
            "kind: PoolPolicy\n",
            "",
            "p:1: kind: is missing, expected PoolPolicy",
        ),
        (
            "name: llama}",
            "name: Llama}",
            (
                'p:3: metadata.name: is "Llama", expected up to 63 lower-case letters, digits and dashes, '
                "with no dash at either end"
            ),
        ),
        (
            "name: meta/llama",
            'name: ""',
            'p:5: model.name: is "", expected up to 256 printable ASCII characters without a space',
        ),
        (
            "aliases: [llama]",
            "aliases: llama",
            'p:6: model.aliases: is "llama", expected a list of at most 64 entries',
        ),
        (
            "aliases: [llama]",
            "aliases: [llama]\n  bytes_per_token: 0",
            "p:7: model.bytes_per_token: is 0, expected a number from 0.25 to 64",
        ),
        (
            "aliases: [llama]",
            "aliases: [llama]\n  prefix: {block_tokens: 0}",
            "p:7: model.prefix.block_tokens: is 0, expected a whole number from 1 to 8192",
        ),
        (
            "aliases: [llama]",
            "prefix: {mode: exact}",
            'p:6: model.prefix.mode: is "exact", expected one of precise, approximate',
        ),
        (
            "aliases: [llama]",
            "tokenizer: {file: tokenizer.json}",
            (
                'p:6: model.tokenizer.file: is "tokenizer.json", expected an absolute path such as '
                "/models/llama/tokenizer.json"
            ),
        ),
        (
            "aliases: [llama]",
            "tokenizer: {render: here}",
            (
                'p:6: model.tokenizer.render: is "here", expected host:port such as 10.0.0.1:8000, or '
                "[2001:db8::1]:8000"
            ),
        ),
        (
            "aliases: [llama]",
            "tokenizer: {deadline_ms: 0}",
            "p:6: model.tokenizer.deadline_ms: is 0, expected a number from 1 to 10000",
        ),
        (
            "disaggregation: {mode: auto}",
            "disaggregation: {mode: sometimes}",
            'p:30: disaggregation.mode: is "sometimes", expected one of auto, always, never',
        ),
        (
            "disaggregation: {mode: auto}",
            "disaggregation: {order: parallel}",
            'p:30: disaggregation.order: is "parallel", expected one of sequential, concurrent',
        ),
        (
            "disaggregation: {mode: auto}",
            "disaggregation: {transfer_deadline_ms: 30000}",
            (
                "p:30: disaggregation.transfer_deadline_ms: is 30000, expected less than lease_ms (30000): "
                "KV would be dropped while it is waited for"
            ),
        ),
        (
            "disaggregation: {mode: auto}",
            "disaggregation:\n  mode: auto\n  lease_ms: 5000",
            (
                "p:30: disaggregation.transfer_deadline_ms: is 20000, expected less than lease_ms (5000): KV "
                "would be dropped while it is waited for"
            ),
        ),
        (
            "disaggregation: {mode: auto}",
            "disagregation: {mode: auto}",
            "p:30: disagregation: is not a known key; did you mean disaggregation?",
        ),
        (
            "ladder: [other-prefill, colocated]",
            "ladder: [other-prefill, colocated, other-prefill]",
            "p:31: fallback.ladder[2]: is other-prefill a second time; list it once",
        ),
        (
            "ladder: [other-prefill, colocated]",
            "ladder: [other-prefill, refuse]",
            "p:31: fallback.ladder[1]: is refuse, which always comes last and is not listed; remove it",
        ),
        (
            "ladder: [other-prefill, colocated]",
            "ladder: [local]",
            (
                'p:31: fallback.ladder[0]: is "local", '
                "expected one of other-prefill, other-decode, colocated, resume"
            ),
        ),
        (
            "ladder: [other-prefill, colocated]",
            "budget: {colocated_share_max: 50}",
            "p:31: fallback.budget.colocated_share_max: is 50, expected a number from 0 to 1",
        ),
        (
            "ttft_ms: 2000",
            "ttft_ms: 0",
            "p:32: slo.ttft_ms: is 0, expected a number above 0 and at most 3600000",
        ),
        ("slo: {ttft_ms: 2000}", "slo: 5", "p:32: slo: is 5, expected a mapping"),
    ],
)
def test_each_rule_has_its_line(good: str, old: str, new: str, expected: str) -> None:
    assert good.count(old) == 1
    assert problems_of(good.replace(old, new)) == [expected]


def test_a_document_without_pools_is_refused(good: str) -> None:
    head, tail = good[: good.index("pools:")], good[good.index("disaggregation:") :]
    assert problems_of(head + tail) == ["p:1: pools: is missing, expected a list of 1 to 256 entries"]
    assert problems_of(head + "pools: []\n" + tail) == [
        "p:7: pools: is a list of 0, expected a list of 1 to 256 entries"
    ]


def test_everything_wrong_is_said_at_once(good: str) -> None:
    text = good.replace("order: HND", "order: 1").replace("ttft_ms: 2000", "ttft: 1").replace("10.0.0.2:", "")
    text = text.replace("mode: auto", "mode: 5")
    assert [line.split(": ")[1] for line in problems_of(text)] == [
        "pools[0].layout.order",
        "pools[0].endpoints[1].address",
        "disaggregation.mode",
        "slo.ttft",
    ]


def specs(model_class: type[BaseModel], seen: set[type[BaseModel]]) -> Iterator[type[BaseModel]]:
    """A class and every class beneath it."""
    if model_class in seen:
        return
    seen.add(model_class)
    yield model_class
    for field in model_class.model_fields.values():
        pending = [field.annotation]
        while pending:
            annotation = pending.pop()
            pending += getattr(annotation, "__args__", ())
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                yield from specs(annotation, seen)


def test_every_field_of_every_section_says_what_it_is() -> None:
    found = list(specs(PoolPolicy, set()))
    assert len(found) >= 15
    for spec in found:
        assert spec.model_config["extra"] == "forbid"
        assert spec.model_config["frozen"] is True
        for name, field in spec.model_fields.items():
            assert field.description, f"{spec.__name__}.{name}"


def test_defaults_are_the_cores_own() -> None:
    """Whoever leaves a key out gets what a test of the core gets."""
    rules, core_rules = DisaggregationSpec(), Disaggregation()
    assert rules.mode == core_rules.mode
    assert rules.order == core_rules.order
    assert rules.uncached_tokens_min == core_rules.uncached_tokens_min
    assert rules.saving_ms_min / 1e3 == core_rules.saving_s_min
    assert rules.prefill_deadline_ms / 1e3 == core_rules.prefill_deadline_s
    assert rules.transfer_deadline_ms / 1e3 == core_rules.transfer_deadline_s
    assert rules.bandwidth_gbit_per_s_min * 125e6 == core_rules.bandwidth_bytes_per_s_min
    fallback, core_fallback = FallbackSpec(), Fallback()
    assert fallback.ladder == core_fallback.rungs
    assert fallback.other_prefill_max == core_fallback.other_prefill_max
    assert fallback.other_decode_max == core_fallback.other_decode_max
    assert fallback.budget.colocated_share_max == core_fallback.colocated_share_max
    assert fallback.budget.decode_kv_usage_max == core_fallback.decode_kv_usage_max
    assert fallback.budget.window_requests == core_fallback.window
    assert LimitsSpec().in_flight_max == PoolLimits().in_flight_max
    fields = Model.__dataclass_fields__
    assert PrefixSpec().block_tokens == fields["prefix_block_tokens"].default
    assert PrefixSpec().blocks_per_endpoint_max == fields["prefix_blocks_per_endpoint_max"].default
    assert PrefixSpec().mode == fields["prefix_mode"].default
    assert PrefixSpec().precise_block_tokens == fields["precise_block_tokens"].default
    assert PrefixSpec().precise_blocks_max == fields["precise_blocks_max"].default
    assert TokenizerSpec().deadline_ms == Tokenizing().deadline_s * 1e3
