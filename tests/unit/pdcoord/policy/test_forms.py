"""Tests that one text is a policy file and a Kubernetes object alike, and that problems name its places."""

from pathlib import Path

import pytest
import yaml

from pdcoord.policy.commands import check
from pdcoord.policy.compile import compile_policy
from pdcoord.policy.errors import PolicyError
from pdcoord.policy.forms import document_of
from pdcoord.policy.load import parse_policies, read_policy

HEAD = "apiVersion: pdcoord.io/v1alpha1\nkind: PoolPolicy\nmetadata: {name: llama}\n"


def as_object(text: str) -> str:
    """A document with its keys at the top, put beneath `spec`, each on the next line."""
    head, rest = text.split("model:\n", 1)
    return head + "spec:\n" + "".join(f"  {line}\n" for line in ("model:\n" + rest).splitlines())


def problems(text: str) -> list[str]:
    with pytest.raises(PolicyError) as caught:
        parse_policies(text.encode(), "p.yaml")
    return [str(problem) for problem in caught.value.problems]


def test_both_forms_mean_the_same(good: str) -> None:
    flat, nested = (parse_policies(text.encode(), "p.yaml") for text in (good, as_object(good)))
    assert flat[0].spec == nested[0].spec
    assert compile_policy(flat) == compile_policy(nested)


def test_one_text_is_read_from_a_file_and_from_a_server(good: str) -> None:
    text = as_object(good).replace("{name: llama}", "{name: llama, namespace: prod, labels: {a: b}}")
    (from_file,) = parse_policies(text.encode(), "p.yaml")
    sent = yaml.safe_load(text)
    sent["metadata"] |= {"uid": "1", "generation": 3, "fieldOfALaterServer": {}}
    sent["status"] = {"conditions": []}
    from_server = read_policy(document_of(sent))
    assert from_file.spec == from_server.spec


def test_what_kubectl_prints_is_read_from_a_file(good: str) -> None:
    status = "status: {observedGeneration: 1}\n"
    (policy,) = parse_policies((as_object(good) + status).encode(), "p.yaml")
    assert policy.spec.metadata.name == "llama"


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("role: decode", "role: decod", '22: spec.pools[1].role: is "decod", expected one of'),
        ("block_tokens: 64", "block_tokens: 0", "26: spec.pools[1].layout.block_tokens: is 0"),
        ("  slo: {ttft_ms", "  slos: {ttft_ms", "33: spec.slos: is not a known key; did you mean slo?"),
        ("    aliases:", "    slo: {}\n    aliases:", "7: spec.model.slo: is not a known key; it belo"),
        ("  slo: {", "  zzz: {", "33: spec.zzz: is not a known key; keys here are model, pools, disagg"),
        ("name: wide", "name: fast", '21: spec.pools[1].name: is "fast", a pool name that line 9'),
        ("kind: PoolPolicy", "kind: Endpoints", '2: kind: is "Endpoints", expected PoolPolicy'),
        ("{name: llama}", "{nmae: llama}", "3: metadata.name: is missing"),
        ("{name: llama}", "{name: llama}\nslo: {}", "4: slo: is set beside spec; move it into spec"),
        ("  slo:", "  kind: PoolPolicy\n  slo:", "33: spec.kind: is set in spec; move it to the top"),
    ],
)  # fmt: skip
def test_problems_name_the_place_in_the_text(good: str, old: str, new: str, told: str) -> None:
    text = as_object(good)
    assert text.count(old) == 1
    assert any(problem.startswith(f"p.yaml:{told}") for problem in problems(text.replace(old, new))), (
        problems(text.replace(old, new))
    )


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("", "is empty, expected a mapping with model and pools"),
        ("[]", "is a list of 0, expected a mapping with model and pools"),
        ("text", 'is "text", expected a mapping with model and pools'),
    ],
)
def test_a_spec_that_is_no_mapping_is_the_only_problem(spec: str, told: str) -> None:
    assert problems(f"{HEAD}spec: {spec}\n") == [f"p.yaml:4: spec: {told}"]


def test_problems_of_an_object_name_it_and_no_line(good: str) -> None:
    sent = yaml.safe_load(as_object(good))
    sent["spec"]["pools"][1] |= {"role": "decod", "name": "fast"}
    with pytest.raises(PolicyError) as caught:
        read_policy(document_of(sent))
    assert [str(problem).split(", expected")[0] for problem in caught.value.problems] == [
        'PoolPolicy llama: spec.pools[1].role: is "decod"'
    ]
    with pytest.raises(PolicyError, match="PoolPolicy llama: spec: is empty, expected a mapping"):
        read_policy(document_of({**sent, "spec": None}))


def test_the_check_reads_objects(tmp_path: Path, good: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "object.yaml"
    path.write_text(as_object(good))
    assert check([path]) == 0
    assert "ok, 1 model, 0 warnings" in capsys.readouterr().out
