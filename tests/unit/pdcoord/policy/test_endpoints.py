"""Tests of the endpoints file and of matching it with selectors."""

import contextlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdcoord.policy.compile import PoolBinding, compile_policy
from pdcoord.policy.endpoints import (
    EndpointPicker,
    EndpointsDocument,
    load_endpoints,
    match_endpoints,
    parse_endpoints,
    static_endpoints,
    unmatched_entries,
)
from pdcoord.policy.errors import PolicyError
from pdcoord.policy.load import parse_policies

HEAD = "apiVersion: pdcoord.io/v1alpha1\nkind: Endpoints\nendpoints:\n"


def selecting(good: str) -> tuple[PoolBinding, ...]:
    """The sound policy with a selector on its decode pool."""
    text = good.replace(
        'endpoints: [{address: "10.0.1.1:8000"}]', "selector: {match_labels: {role: d, v: amd}}"
    )
    return compile_policy(parse_policies(text.encode(), "p.yaml")).bindings


def problems_of(text: str) -> list[str]:
    with pytest.raises(PolicyError) as caught:
        parse_endpoints(text.encode(), "e.yaml")
    return [str(problem) for problem in caught.value.problems]


def test_entries_become_endpoints_of_the_pool_that_selects_them(good: str, tmp_path: Path) -> None:
    path = tmp_path / "e.yaml"
    path.write_text(
        HEAD
        + "- {name: w0, address: 'H:1', labels: {role: d, v: amd, more: x}}\n"
        + "- {address: 'h:2', labels: {role: d, v: amd}, is_draining: true, bootstrap_port: 7, kv_port: 8,"
        + " metrics_port: 9, kv_events_port: 10, kv_events_replay_port: 11}\n"
        + "- {address: 'h:3', labels: {role: d}}\n"
        + "- {address: 'h:4'}\n"
    )
    bindings = selecting(good)
    document = load_endpoints(path)
    found = match_endpoints(bindings, document)
    assert [(m.endpoint.id, m.endpoint.address, m.is_draining, m.endpoint.bootstrap_port) for m in found] == [
        ("wide/w0", "h:1", False, None),
        ("wide/h:2", "h:2", True, 7),
    ]
    assert [(m.endpoint.kv_port, m.endpoint.metrics_port) for m in found] == [(None, None), (8, 9)]
    ports = [(m.endpoint.kv_events_port, m.endpoint.kv_events_replay_port) for m in found]
    assert ports == [(None, None), (10, 11)]
    assert {m.endpoint.pool for m in found} == {bindings[1].pool}
    assert [str(problem) for problem in unmatched_entries(bindings, document)] == [
        f"{path}:6: endpoints[2]: is picked by no pool's selector, so nothing is sent there",
        f"{path}:7: endpoints[3]: is picked by no pool's selector, so nothing is sent there",
    ]


def test_listed_endpoints_are_apart(good: str) -> None:
    found = static_endpoints(selecting(good))
    assert [(m.endpoint.id, m.is_draining) for m in found] == [("fast/f0", False), ("fast/f1", False)]


def test_no_entries_are_allowed_and_several_documents_are_one_list(good: str) -> None:
    assert parse_endpoints(f"{HEAD[:-1]} []\n".encode(), "e").entries == ()
    text = f"{HEAD}- {{address: 'h:1', labels: {{role: d, v: amd}}}}\n"
    both = parse_endpoints(f"{text}---\n{text.replace('h:1', 'h:2')}".encode(), "e")
    assert [m.endpoint.id for m in match_endpoints(selecting(good), both)] == ["wide/h:1", "wide/h:2"]
    assert str(both.problem(1, "is odd")) == "e:9: endpoints[0]: is odd"


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ("- {name: a}\n", "e.yaml:4: endpoints[0].address: is missing, expected host:port"),
        (
            "- {address: 'h:1', label: {}}\n",
            "e.yaml:4: endpoints[0].label: is not a known key; did you mean labels?",
        ),
        (
            "- {address: 'h:1', is_draining: yes}\n",
            'e.yaml:4: endpoints[0].is_draining: is "yes", expected true or false',
        ),
        (
            "- {address: 'h:1'}\n- {address: 'H:1'}\n",
            'e.yaml:5: endpoints[1].address: is "h:1", which line 4 already has; change one',
        ),
        (
            "- {address: 'h:1', name: a}\n- {address: 'h:2', name: a}\n",
            'e.yaml:5: endpoints[1].name: is "a", which line 4 already has; change one',
        ),
    ],
)
def test_each_rule_has_its_line(entries: str, expected: str) -> None:
    assert problems_of(HEAD + entries) == [expected]


def test_a_policy_is_no_endpoints_file(good: str) -> None:
    assert problems_of(good) == ['e.yaml:2: kind: is "PoolPolicy", expected Endpoints']


def test_an_entry_of_two_pools_of_one_model_is_refused(good: str) -> None:
    bindings = selecting(good)
    wide = bindings[1]
    other = PoolBinding(bindings[0].pool, (), {"v": "amd"})
    text = (
        f"{HEAD}- {{address: 'h:1', labels: {{role: d, v: amd}}}}\n- {{address: 'h:2', labels: {{v: amd}}}}\n"
    )
    document = parse_endpoints(text.encode(), "e.yaml")
    with pytest.raises(PolicyError) as caught:
        match_endpoints((other, wide), document)
    assert str(caught.value) == (
        "e.yaml:4: endpoints[0]: belongs to pools fast and wide of model meta/llama, expected one of them"
    )


def test_an_entry_that_the_policy_lists_too_is_refused(good: str) -> None:
    text = f"{HEAD}- {{address: '10.0.0.2:8000', labels: {{role: d, v: amd}}}}\n"
    with pytest.raises(PolicyError, match=r"belongs to pools wide and fast of model meta/llama"):
        match_endpoints(selecting(good), parse_endpoints(text.encode(), "e.yaml"))


def test_an_entry_may_serve_two_models(good: str) -> None:
    other = good.replace("llama", "other").replace("fast", "fast2").replace("wide", "wide2")
    other = other.replace("10.0.0.1", "10.1.0.1").replace("10.0.0.2", "10.1.0.2")
    both = f"{good}---\n{other}".replace(
        'endpoints: [{address: "10.0.1.1:8000"}]', "selector: {match_labels: {role: d}}"
    )
    bindings = compile_policy(parse_policies(both.encode(), "p")).bindings
    document = parse_endpoints(f"{HEAD}- {{address: 'h:1', labels: {{role: d}}}}\n".encode(), "e")
    assert [m.endpoint.id for m in match_endpoints(bindings, document)] == ["wide/h:1", "wide2/h:1"]


SEED = f"{HEAD}- {{name: a, address: 'h:1', labels: {{r: d}}}}\n- {{address: 'h:2', is_draining: true}}\n"


@given(st.data())
@settings(deadline=None)
def test_a_mutated_file_is_accepted_or_refused_and_never_breaks_anything(data: st.DataObject) -> None:
    text = SEED
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        end = data.draw(st.integers(start, min(len(text), start + 20)))
        scrap = data.draw(
            st.sampled_from(["[", "{", "- ", ": ", "&a ", "*a", "null", "5", "---\n"]) | st.text(max_size=3)
        )
        text = text[:start] + scrap + text[end:]
    with contextlib.suppress(PolicyError):
        parse_endpoints(text.encode(), "e")


def test_one_entry_at_fault_takes_no_other_out_where_entries_are_picked_one_by_one(good: str) -> None:
    wide = selecting(good)[1]
    other = PoolBinding(selecting(good)[0].pool, (), {"v": "amd"})
    text = (
        f"{HEAD}- {{address: 'h:1', labels: {{role: d, v: amd}}}}\n- {{address: 'h:2', labels: {{v: amd}}}}\n"
    )
    text += "- {address: 'h:3', labels: {v: x}}\n"
    document = parse_endpoints(text.encode(), "e.yaml")
    picker = EndpointPicker((other, wide))
    matching = picker.pick(document)
    assert [m.endpoint.id for m in matching.endpoints] == ["fast/h:2"]
    assert [problem.line for problem in matching.problems] == [4]
    assert [problem.line for problem in matching.unpicked] == [6]
    fewer = EndpointsDocument(document.entries[1:], document.sources[1:])
    (again,) = picker.pick(fewer).endpoints
    assert again is matching.endpoints[0]
