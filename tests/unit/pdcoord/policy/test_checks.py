"""Tests of what must hold between pools and between documents: every rule's golden lines."""

import pytest

from pdcoord.policy.errors import PolicyError
from pdcoord.policy.load import parse_policies


def problems_of(text: str) -> list[str]:
    with pytest.raises(PolicyError) as caught:
        parse_policies(text.encode(), "p")
    return [str(problem) for problem in caught.value.problems]


WIDE_CONNECTOR = "engine: vllm\n    connector: pdcoord\n    layout: {block_tokens: 64, order: NHD}"


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "name: wide",
            "name: fast",
            ['p:20: pools[1].name: is "fast", a pool name that line 8 already has; change one'],
        ),
        (
            "10.0.1.1:8000",
            "10.0.0.2:8000",
            [
                (
                    'p:28: pools[1].endpoints[0].address: is "10.0.0.2:8000", an address that line 18 '
                    "already has; change one"
                )
            ],
        ),
        (
            'name: f1, address: "10.0.0.2:8000"',
            'name: f0, address: "10.0.0.2:8000"',
            [
                (
                    'p:18: pools[0].endpoints[1].name: is "f0", an endpoint name of pool fast that line 17 '
                    "already has; change one"
                )
            ],
        ),
        (
            "aliases: [llama]",
            "aliases: [a, meta/llama, a]\n  adapters: [sql, a]",
            [
                (
                    'p:6: model.aliases[1]: is "meta/llama", a name of a model that line 5 already has; '
                    "change one"
                ),
                'p:6: model.aliases[2]: is "a", a name of a model that line 6 already has; change one',
                'p:7: model.adapters[1]: is "a", a name of a model that line 6 already has; change one',
            ],
        ),
        (
            "speed: {prefill_base_ms: 8, prefill_ms_per_token: 0.2}",
            "speed: {step_base_ms: 5}",
            [
                (
                    "p:19: pools[0].speed: has no prefill figure above 0, and the pool prefills; set "
                    "prefill_ms_per_token"
                )
            ],
        ),
        (
            "speed: {prefill_base_ms: 8, prefill_ms_per_token: 0.1, step_base_ms: 12}",
            "speed: {prefill_base_ms: 0, step_us_per_sequence: 0}",
            [
                (
                    "p:29: pools[1].speed: has no prefill figure above 0, and the pool prefills the requests "
                    "that stay together; set prefill_ms_per_token"
                ),
                "p:29: pools[1].speed: has no step figure above 0, and the pool decodes; set step_base_ms",
            ],
        ),
        (
            "role: decode",
            "role: prefill",
            ["p:7: pools: no pool decodes; give one of them role decode or both"],
        ),
        (
            f"{WIDE_CONNECTOR}\n",
            "engine: sglang\n    connector: sglang\n",
            [
                (
                    "p:7: pools: no pool can serve a request alone, and no two can together: fast -> wide: "
                    "connectors differ: pdcoord cannot feed sglang"
                )
            ],
        ),
    ],
)
def test_each_rule_has_its_line(good: str, old: str, new: str, expected: list[str]) -> None:
    assert good.count(old) == 1
    assert problems_of(good.replace(old, new)) == expected


def test_a_prefill_pool_that_can_feed_nobody_is_refused_where_everything_is_split(good: str) -> None:
    text = good.replace("mode: auto", "mode: always").replace("connector: pdcoord", "connector: nixl")
    assert problems_of(text) == [
        (
            "p:8: pools[0]: mode is always, but pool fast can feed no decode pool: fast -> wide: nixl moves "
            "equal layouts only; these differ in block_tokens, order"
        )
    ]
    parse_policies(text.replace("mode: always", "mode: auto").encode(), "p")


def test_mode_always_without_anybody_to_prefill_is_refused(good: str) -> None:
    start, end = good.index("  - name: fast"), good.index("  - name: wide")
    alone = (good[:start] + good[end:]).replace("mode: auto", "mode: always")
    assert problems_of(alone) == [
        "p:18: disaggregation.mode: is always, but no pool prefills; give one role prefill or both"
    ]
    both = alone.replace("role: decode", "role: both").replace("connector: pdcoord", "connector: none")
    assert problems_of(both) == [
        (
            "p:18: disaggregation.mode: is always, but no pool can feed another: wide -> wide: one side has "
            "no KV connector"
        )
    ]
    parse_policies(both.replace("connector: none", "connector: nixl").encode(), "p")


def test_mode_never_needs_somebody_to_serve_alone(good: str) -> None:
    text = good.replace("engine: vllm", "engine: sglang").replace("connector: pdcoord", "connector: sglang")
    assert problems_of(text.replace("mode: auto", "mode: never")) == [
        "p:30: disaggregation.mode: is never, but no pool can serve a request alone; add one with role both"
    ]


@pytest.mark.parametrize(
    ("first", "second"), [("{a: b}", "{a: b}"), ("{a: b}", "{a: b, c: d}"), ("{a: b, c: d}", "{c: d}")]
)
def test_selectors_of_which_one_holds_the_other_are_refused(good: str, first: str, second: str) -> None:
    assert problems_of(with_selectors(good, first, second)) == [
        (
            "p:26: pools[1].selector.match_labels: overlaps the selector of pool fast; an endpoint "
            "belongs to one pool"
        )
    ]
    parse_policies(with_selectors(good, first, "{a: z}").encode(), "p")


def with_selectors(good: str, first: str, second: str) -> str:
    """The sound policy with these match_labels in place of its endpoints."""
    start, end = (
        good.index("    endpoints:\n"),
        good.index("    speed: {prefill_base_ms: 8, prefill_ms_per_token: 0.2}"),
    )
    text = good[:start] + f"    selector: {{match_labels: {first}}}\n" + good[end:]
    return text.replace('endpoints: [{address: "10.0.1.1:8000"}]', f"selector: {{match_labels: {second}}}")


def test_names_are_unique_over_all_documents(good: str) -> None:
    other = good.replace("aliases: [llama]", "aliases: [meta/llama]").replace(
        "name: meta/llama", "name: llama"
    )
    assert problems_of(f"{good}---\n{other}") == [
        'p:36: metadata.name: is "llama", a document name that line 3 already has; change one',
        'p:38: model.name: is "llama", a name of a model that line 6 already has; change one',
        'p:39: model.aliases[0]: is "meta/llama", a name of a model that line 5 already has; change one',
        'p:41: pools[0].name: is "fast", a pool name that line 8 already has; change one',
        'p:53: pools[1].name: is "wide", a pool name that line 20 already has; change one',
    ]


def test_an_adapter_is_no_name_of_another_document(good: str) -> None:
    other = good.replace("name: llama}", "name: other}").replace("meta/llama", "other")
    other = other.replace("aliases: [llama]", "aliases: [o]\n  adapters: [sql, llama]")
    other = other.replace("name: fast", "name: fast-2").replace("name: wide", "name: wide-2")
    assert problems_of(f"{good}---\n{other}") == [
        'p:40: model.adapters[1]: is "llama", a name of a model that line 6 already has; change one'
    ]


def test_sglang_takes_an_adapter_only_behind_the_models_name(good: str) -> None:
    text = good.replace(
        "aliases: [llama]",
        "aliases: [llama]\n  adapters: [sql, 'llama:sql', 'meta/llama:sql', 'meta/llama:']",
    )
    assert parse_policies(text.encode(), "p")
    wide = text.index("name: wide")
    text = text[:wide] + text[wide:].replace("engine: vllm", "engine: sglang")
    text = text.replace("connector: pdcoord", "connector: none").replace("role: decode", "role: both")
    message = (
        'p:7: model.adapters[{}]: is "{}"; name it "meta/llama:<name>": so SGLang (pool wide) knows an '
        "adapter, and without the colon answers as its base model; vLLM takes such a name as well "
        "in --lora-modules"
    )
    assert problems_of(text) == [
        message.format(0, "sql"),
        message.format(1, "llama:sql"),
        message.format(3, "meta/llama:"),
    ]
    good = text.replace("[sql, 'llama:sql', 'meta/llama:sql', 'meta/llama:']", "['meta/llama:sql']")
    assert parse_policies(good.encode(), "p")


def test_what_is_wrong_between_parts_is_said_although_a_part_is_wrong(good: str) -> None:
    """A problem in one pool hides neither those of the other documents nor those between sound pools."""
    third = """\
  - name: fast
    role: both
    vendor: x
    engine: vllm
    connector: none
    kv_bytes_per_token: 1
    endpoints: [{address: "10.0.0.1:8000"}]
    speed: {}
"""
    text = good.replace("disaggregation:", f"{third}disaggregation:").replace("order: NHD", "order: N")
    second = good.replace("10.0.1.1", "10.0.0.1").replace("ttft_ms", "ttft")
    assert [line.split(": is ")[0].split(": has ")[0] for line in problems_of(f"{text}---\n{second}")] == [
        "p:25: pools[1].layout.order",
        "p:30: pools[2].name",
        "p:36: pools[2].endpoints[0].address",
        "p:37: pools[2].speed",
        "p:37: pools[2].speed",
        "p:44: metadata.name",
        "p:46: model.name",
        "p:47: model.aliases[0]",
        "p:49: pools[0].name",
        "p:69: pools[1].endpoints[0].address",
        "p:73: slo.ttft",
    ]


def test_precise_prefixes_need_an_engine_that_tells(good: str) -> None:
    text = good.replace("aliases: [llama]", "prefix: {mode: precise}")
    assert problems_of(text) == [
        (
            "p:6: model.prefix.mode: is precise, but no endpoint has a kv_events_port; set it where the "
            "engines publish KV events, or set mode to approximate"
        )
    ]
    # An endpoints file may bring the ports.
    start = text.index('endpoints: [{address: "10.0.1.1:8000"}]')
    selecting = text[:start] + "selector: {match_labels: {a: b}}" + text[start:].partition("]")[2]
    assert parse_policies(selecting.encode(), "p")


def test_a_replay_of_nothing_is_refused(good: str) -> None:
    text = good.replace('"10.0.0.2:8000"}', '"10.0.0.2:8000", kv_events_replay_port: 5558}')
    assert problems_of(text) == [
        ("p:18: pools[0].endpoints[1].kv_events_replay_port: is 5558 without kv_events_port; set both")
    ]
