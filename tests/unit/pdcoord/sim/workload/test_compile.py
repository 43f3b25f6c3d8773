"""Whole workloads: the examples compile, and every call of any mix keeps what a Call promises."""

import json
from collections import Counter
from collections.abc import Callable
from itertools import groupby, islice, pairwise
from pathlib import Path
from typing import Any

import pytest

from pdcoord.policy.errors import PolicyError, format_key_path
from pdcoord.sim.workload.call import Call
from pdcoord.sim.workload.compile import compile_workload
from pdcoord.sim.workload.mixed import MixedWorkload
from pdcoord.sim.workload.workloadfile import load_workload

EXAMPLES = Path(__file__).resolve().parents[5] / "deploy" / "workloads"
Compile = Callable[..., MixedWorkload]
Follow = Callable[..., list[Call]]

MIX = """\
seed: 3
context_tokens_max: 8000
slo: {ttft_ms: 2000, tpot_ms: 50}
load: {stages: [{rate: 4, duration: 20}, {rate: 0, duration: 5}, {rate: 8, duration: 10}]}
tenants: [{name: big, share: 3}, {name: small}]
priorities: [{priority: 0, share: 4}, {priority: -1}]
parts:
  - {name: chat, weight: 2, chat: {system_prompts: 2, think_s: 0.5}}
  - name: agents
    agents: {instructions_len: 1000, tool_s: {type: exponential, mean: 0.2}}
    slo: {tpot_ms: 100}
    tenants: [{name: robots}]
  - {name: rag, rag: {documents: 9, document_len: {type: uniform, min: 500, max: 3000}}}
  - name: users
    load: {type: constant, stages: [{rate: 2, duration: 30}]}
    shared_prefix:
      {num_unique_system_prompts: 3, num_users_per_system_prompt: 4, enable_multi_turn_chat: true}
"""


def whole(calls: list[Call]) -> list[Call]:
    """Checks what holds for any workload."""
    assert len({call.id for call in calls}) == len(calls)
    assert all(a.at_s <= b.at_s for a, b in pairwise(calls))
    return calls


@pytest.fixture
def mix(compiled: Compile) -> MixedWorkload:
    return compiled(MIX)


def test_a_mix_has_all_calls_it_said_it_would(mix: MixedWorkload, follow: Follow) -> None:
    calls = whole(follow(mix))
    assert len(calls) == mix.call_count
    assert {call.kind for call in calls} == {"chat", "agents", "rag", "users"}
    for call in calls:
        assert len(call.keys) == call.prompt_tokens // mix.key_tokens
        assert 1 <= call.prompt_tokens + call.output_tokens <= 8000
        assert call.keys_after[: len(call.keys)] == (call.keys if call.keys_after else ())
    known = list(mix.calls())
    assert [call.at_s for call in known] == sorted(call.at_s for call in known)
    assert len(known) == 80 + 80 + 12  # Both stages, and the first turn of each user.


def test_a_session_keeps_its_tenant_and_priority_and_grows(mix: MixedWorkload, follow: Follow) -> None:
    calls = sorted(follow(mix), key=lambda call: (call.session, call.at_s))
    sessions = [list(group) for session, group in groupby(calls, lambda call: call.session) if session >= 0]
    assert max(len(session) for session in sessions) > 3
    for session in sessions:
        assert len({(call.tenant, call.priority, call.kind) for call in session}) == 1
        for before, later in pairwise(session):
            assert later.keys[: len(before.keys_after)] == before.keys_after
            assert later.prompt_tokens > before.prompt_tokens + before.output_tokens
        assert session[-1].keys_after == ()
    assert all(call.kind == "rag" for call in calls if call.session == -1)


def test_keys_of_different_parts_have_nothing_in_common(mix: MixedWorkload, follow: Follow) -> None:
    seen: dict[int, str] = {}
    for call in follow(mix):
        for key in call.keys:
            assert seen.setdefault(key, call.kind) == call.kind


def test_tenants_priorities_and_objectives_are_as_written(compiled: Compile) -> None:
    text = MIX.replace("rate: 4, duration: 20", "rate: 100, duration: 20")
    calls = list(compiled(text).calls())
    tenants = Counter(call.tenant for call in calls if call.kind == "chat")
    assert tenants["big"] / tenants["small"] == pytest.approx(3.0, rel=0.25)
    priorities = Counter(call.priority for call in calls)
    assert priorities[0] / priorities[-1] == pytest.approx(4.0, rel=0.25)
    kinds = Counter(call.kind for call in calls)
    assert kinds["chat"] / kinds["rag"] == pytest.approx(2.0, rel=0.25)
    assert {call.tenant for call in calls if call.kind == "agents"} == {"robots"}
    objectives = {(call.kind, call.ttft_s_max, call.tpot_s_max) for call in calls}
    assert ("chat", 2.0, 0.05) in objectives
    assert ("agents", 2.0, 0.1) in objectives


def test_the_same_seed_gives_the_same_calls_in_any_order(compiled: Compile, follow: Follow) -> None:
    workload = compiled(MIX)
    calls = follow(workload)
    assert follow(workload) == calls
    assert follow(compiled(MIX)) == calls
    assert follow(compiled(MIX, seed=4)) != calls
    # What a session says does not depend on how long its answers take, nor on who else is served.
    slowly = {call.id: call for call in follow(workload, 7.0)}
    assert slowly.keys() == {call.id for call in calls}
    assert all(slowly[call.id].keys == call.keys for call in calls)


def test_a_rate_factor_makes_every_rate_higher(compiled: Compile) -> None:
    once, twice = list(compiled(MIX).calls()), list(compiled(MIX, rate_factor=2.0).calls())
    shared = [sum(call.kind != "users" for call in calls) for calls in (once, twice)]
    assert shared == [160, 320]
    assert max(call.at_s for call in twice) <= 35.0


def test_calls_are_made_as_they_are_asked_for(compiled: Compile) -> None:
    workload = compiled("load: {stages: [{rate: 100000, duration: 100}]}\nparts: [{name: a, rag: {}}]\n")
    assert workload.call_count == 10_000_000
    assert len(list(islice(workload.calls(), 5))) == 5


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_the_examples_compile_with_files_beside_them(path: Path, tmp_path: Path, follow: Follow) -> None:
    (tmp_path / path.name).write_bytes(path.read_bytes())
    row: dict[str, Any] = {"timestamp": 5, "input_length": 600, "output_length": 9, "hash_ids": [1, 2]}
    (tmp_path / "conversation_trace.jsonl").write_text(json.dumps(row) + "\nnonsense\n")
    azure = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n"
    (tmp_path / "AzureLLMInferenceTrace_conv.csv").write_text(azure)
    workload = compile_workload(load_workload(tmp_path / path.name))
    calls = whole(follow(workload))
    assert len(calls) == workload.call_count > 0
    if path.name == "mooncake.yaml":
        assert workload.key_tokens == 512
        assert workload.notes == ("conversation_trace.jsonl: row 2: is not JSON; skipped",)


def test_files_that_cannot_be_used_are_named_together(compiled: Compile) -> None:
    with pytest.raises(PolicyError) as caught:
        compiled(
            "load: {stages: [{rate: 1, duration: 9}]}\n"
            "parts:\n"
            "- {name: a, mooncake: {file: none.jsonl}}\n"
            "- {name: b, chat: {question_len: {type: empirical, file: none.txt}}}\n"
        )
    problems = [(format_key_path(each.key_path), each.message) for each in caught.value.problems]
    assert [place for place, _ in problems] == ["parts[0].mooncake.file", "parts[1].chat.question_len.file"]
    assert all("cannot be read: No such file" in message for _, message in problems)
