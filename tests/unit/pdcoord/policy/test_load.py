"""Tests of loading policy files: whole files in, documents or every problem out."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdcoord.policy.compile import compile_policy
from pdcoord.policy.errors import PolicyError
from pdcoord.policy.load import load_policies, parse_policies, parts_of

SEED = """\
apiVersion: pdcoord.io/v1alpha1
kind: PoolPolicy
metadata: {name: llama}
model: {name: m, aliases: [a], prefix: &p {block_tokens: 64}}
pools:
  - &pool
    name: p
    role: both
    vendor: nvidia
    engine: vllm
    connector: pdcoord
    layout: {block_tokens: 16}
    kv_bytes_per_token: 131072
    link_gbit_per_s: 1e2
    endpoints: [{address: "h:1"}]
    speed: {prefill_ms_per_token: 0.2, step_base_ms: 12}
  - {<<: *pool, name: q, endpoints: [{address: "h:2"}], role: decode}
disaggregation: {mode: auto, lease_ms: 30000}
fallback: {ladder: [other-prefill, colocated], budget: {window_requests: 5}}
slo: {ttft_ms: 2000}
"""


def refused_or_compiled(text: str) -> None:
    """Whatever is read either compiles or is refused with problems that say something."""
    try:
        documents = parse_policies(text.encode(), "f")
    except PolicyError as error:
        refused = error.problems
    else:
        compile_policy(documents)
        return
    assert refused
    assert all(problem.message for problem in refused)
    # YAML counts CR, NEL and the two Unicode separators as line breaks too.
    line_count = sum(map(text.count, "\n\r\x85\u2028\u2029")) + 1
    assert all(problem.line is None or 1 <= problem.line <= line_count for problem in refused)


def test_the_seed_of_the_mutations_is_sound() -> None:
    assert [pool.name for pool in parse_policies(SEED.encode(), "f")[0].spec.pools] == ["p", "q"]


def test_a_file_is_loaded_document_by_document(tmp_path: Path, good: str) -> None:
    path = tmp_path / "p.yaml"
    other = good.replace("llama", "other").replace("fast", "fast2").replace("wide", "wide2")
    path.write_text(f"# both\n---\n{good}---\n{other}")
    first, second = load_policies(path)
    assert (first.spec.model.name, second.spec.model.name) == ("meta/llama", "meta/other")
    assert first.document.file == str(path)
    assert second.document.position_of(("metadata", "name")) == 38


def test_a_directory_is_not_a_policy(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="is a directory; name one YAML file"):
        load_policies(tmp_path)


def test_a_sound_document_has_all_its_parts(good: str) -> None:
    (document,) = parse_policies(good.encode(), "f")
    parts = parts_of(document)
    assert parts.is_complete
    assert [part.index for part in parts.prefills] == [0]
    assert [part.index for part in parts.decodes] == [1]
    assert parts.impossible_reasons(parts.pools[0]) == []


@given(st.text(max_size=200))
@settings(deadline=None, max_examples=50)
def test_any_text_is_refused_as_a_policy_error(text: str) -> None:
    refused_or_compiled(text)


@given(st.binary(max_size=100))
@settings(deadline=None, max_examples=50)
def test_any_bytes_are_refused_as_a_policy_error(raw: bytes) -> None:
    with pytest.raises(PolicyError):
        parse_policies(raw, "f")


LINES = SEED.splitlines()
SCRAPS = [
    *("[", "]", "{", "}", ": ", "- ", "&p ", "*p", "<<: *p", "!!int ", "|", "---\n", "'", '"', "#", "\t"),
    *(
        "null",
        "true",
        "-1",
        "0",
        ".nan",
        ".inf",
        "1e400",
        "9" * 30,
        "9" * 80,
        "010",
        "0x10",
        "text",
        "[]",
        "{}",
    ),
    *("[*pool, *pool]", "{a: {b: c}}", "\u0000", "\ud7ff", "\u2028", "prefill", "sglang", "always", "never"),
]


@given(st.data())
@settings(deadline=None)
def test_a_mutated_policy_is_accepted_or_refused_and_never_breaks_anything(data: st.DataObject) -> None:
    """Cuts, copies and scraps at random places of a sound policy."""
    text = SEED
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        end = data.draw(st.integers(start, min(len(text), start + 30)))
        scrap = data.draw(st.sampled_from(SCRAPS) | st.sampled_from(LINES) | st.text(max_size=5))
        text = text[:start] + scrap + text[end:]
    refused_or_compiled(text)


@given(st.data())
@settings(deadline=None)
def test_a_policy_with_any_values_changed_is_accepted_or_refused(data: st.DataObject) -> None:
    """Well-formed all the time, so that every rule of the schema meets values of every kind."""
    tokens = SEED.replace("{", "{ ").replace("}", " }").split(" ")
    for _ in range(data.draw(st.integers(1, 3))):
        index = data.draw(st.integers(0, len(tokens) - 1))
        kept = "".join(c for c in tokens[index] if c in ",]}\n")
        tokens[index] = data.draw(st.sampled_from(SCRAPS)) + kept
    refused_or_compiled(" ".join(tokens))
