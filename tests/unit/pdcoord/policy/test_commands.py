"""Tests of `pdcoord policy check` and `schema`, on the examples that the project ships among others."""

import io
import json
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from pdcoord.policy.commands import check, schema
from pdcoord.policy.errors import PolicyError
from pdcoord.policy.load import load_policies, parse_policies

ROOT = Path(__file__).resolve().parents[4]
EXAMPLES = sorted((ROOT / "deploy" / "policies").glob("*.yaml"))
POLICIES = [path for path in EXAMPLES if not path.name.endswith(".endpoints.yaml")]


def run(*paths: Path) -> tuple[int, list[str]]:
    out = io.StringIO()
    status = check(paths, out)
    return status, out.getvalue().splitlines()


def test_the_examples_are_found() -> None:
    assert {path.name for path in EXAMPLES} >= {
        "two-vendor.yaml",
        "three-vendor.yaml",
        "three-vendor.endpoints.yaml",
        "sglang.yaml",
        "vllm-nixl-same-layout.yaml",
    }


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_passes_without_a_warning(path: Path) -> None:
    status, lines = run(path)
    assert status == 0
    assert lines[0].startswith(f"{path}: ok, ")
    assert not any("warning:" in line for line in lines)


@pytest.mark.parametrize("path", POLICIES, ids=lambda path: path.name)
def test_every_example_gives_every_figure_a_source(path: Path) -> None:
    """A figure of speed or cost on a line of its own says where it is from, or that it is an estimate."""
    for number, line in enumerate(path.read_text().splitlines(), 1):
        key = line.strip().split(":")[0]
        if key == "cost_per_hour" or key.startswith(("prefill_base", "prefill_ms", "step_")):
            comment = line.partition("#")[2]
            assert "estimate" in comment or "[1]" in comment or "[2]" in comment, f"{path.name}:{number}"


def test_an_example_with_its_endpoints_shows_who_belongs_where() -> None:
    folder = ROOT / "deploy" / "policies"
    status, lines = run(folder / "three-vendor.yaml", folder / "three-vendor.endpoints.yaml")
    assert status == 0
    (row,) = [line for line in lines if line.startswith("  mi300x-decode  decode")]
    assert "2: 10.0.2.1:8000, 10.0.2.2:8000 (draining); those with" in row
    assert not any("warning:" in line for line in lines)


def test_every_problem_is_a_line_and_the_status_is_one(tmp_path: Path, good: str) -> None:
    bad, sound, missing = tmp_path / "bad.yaml", tmp_path / "sound.yaml", tmp_path / "none.yaml"
    bad.write_text(good.replace("order: NHD", "order: x").replace("ttft_ms", "ttft"))
    sound.write_text(good)
    status, lines = run(bad, sound, missing)
    assert status == 1
    assert lines[:3] == [
        f'{bad}:25: pools[1].layout.order: is "x", expected one of HND, NHD, LHBNC, BLHNC, BLNHC, BHLNC',
        f"{bad}:32: slo.ttft: is not a known key; did you mean ttft_ms?",
        f"{sound}: ok, 1 model, 0 warnings",
    ]
    assert lines[-1] == f"{missing}: cannot be read: No such file or directory"
    assert run(sound)[0] == 0


def test_warnings_are_said_and_do_not_change_the_status(tmp_path: Path, good: str) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(good.replace("mode: auto", "mode: never"))
    status, lines = run(path)
    assert status == 0
    assert lines[:2] == [
        f"{path}:8: warning: pools[0]: pool fast gets no work: disaggregation.mode is never",
        f"{path}: ok, 1 model, 1 warning",
    ]


def test_endpoints_are_judged_beside_the_policy(tmp_path: Path, good: str) -> None:
    policy, endpoints = tmp_path / "p.yaml", tmp_path / "e.yaml"
    policy.write_text(
        good.replace('endpoints: [{address: "10.0.1.1:8000"}]', "selector: {match_labels: {role: d}}")
    )
    head = "apiVersion: pdcoord.io/v1alpha1\nkind: Endpoints\nendpoints:\n"
    endpoints.write_text(f"{head}- {{address: '10.0.0.1:8000', labels: {{role: d}}}}\n")
    status, lines = run(policy, endpoints)
    assert status == 1
    assert lines == [
        (
            f"{endpoints}:4: endpoints[0]: belongs to pools wide and fast of model meta/llama, expected one "
            "of them"
        ),
        f"{endpoints}: ok, 1 endpoint",
    ]
    endpoints.write_text(f"{head}- {{address: 'h:1', labels: {{role: x}}}}\n")
    status, lines = run(policy, endpoints)
    assert status == 0
    assert lines[0] == (
        f"{endpoints}:4: warning: endpoints[0]: is picked by no pool's selector, so nothing is sent there"
    )
    policy.write_text(good)
    status, lines = run(policy, endpoints)
    assert (status, lines[0]) == (0, f"{policy}: ok, 1 model, 0 warnings")


def test_a_broken_endpoints_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "e.yaml"
    path.write_text("apiVersion: pdcoord.io/v1alpha1\nkind: Endpoints\n")
    assert run(path) == (
        1,
        [f"{path}:1: endpoints: is missing, expected a list of at most 16384 entries"],
    )


def test_check_writes_to_standard_output(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "\udcff.yaml"
    assert check([path]) == 1
    assert capsys.readouterr().out.endswith("cannot be read: No such file or directory\n")


def test_the_schema_is_json_schema_of_a_policy() -> None:
    found = json.loads(schema())
    jsonschema_rs.meta.validate(found)
    validator = jsonschema_rs.Draft202012Validator(found)
    data = [policy.document.data for path in POLICIES for policy in load_policies(path)]
    assert [list(validator.iter_errors(policy)) for policy in data] == [[] for _ in data]
    wrong = json.loads(json.dumps(data[0]))
    wrong["pools"][0]["layout"]["block_tokens"] = 0
    wrong["fallback"] = {"ladder": ["refuse"]}
    wrong["pools"][1]["selector"] = {"match_labels": {"a": "b"}}
    wrong["extra"] = 1
    places = sorted("/".join(map(str, error.instance_path)) for error in validator.iter_errors(wrong))
    assert places[:2] == ["", "fallback/ladder/0"]
    assert places[2].startswith("pools/0/layout")
    assert places[3] == "pools/1"


@pytest.mark.parametrize(
    ("layout", "is_sound"),
    [
        ({"block_tokens": 16}, True),
        ({"preset": "cpu-vec"}, True),
        ({"preset": "cpu-vec", "block_tokens": 32, "split": "halved", "head_dim_multiple": 16}, True),
        ({"preset": None, "block_tokens": 16}, True),
        ({"preset": None}, False),
        ({"preset": "cpu"}, False),
        ({"order": "HND"}, False),
        ({"block_tokens": 16, "split": "apart"}, False),
        ({}, False),
    ],
)
def test_the_schema_and_check_agree_on_layouts(layout: dict[str, Any], is_sound: bool) -> None:
    policy: Any = load_policies(ROOT / "deploy/policies/two-vendor.yaml")[0].document.data
    policy = json.loads(json.dumps(policy))
    policy["pools"][0]["layout"] = layout
    assert jsonschema_rs.Draft202012Validator(json.loads(schema())).is_valid(policy) is is_sound
    try:
        parse_policies(json.dumps(policy).encode(), "p")
    except PolicyError as error:
        assert not is_sound, str(error)
    else:
        assert is_sound
