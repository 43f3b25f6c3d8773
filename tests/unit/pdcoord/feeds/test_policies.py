"""Tests of PoolPolicy objects as a source of policies, with the answers of a file's registry."""

import copy
from typing import Any

import pytest

from pdcoord.feeds.policies import KubePolicies, policies_of
from pdcoord.policy.registry import Accepted, Refused, Unchanged

SPEC: dict[str, Any] = {
    "model": {"name": "org/a"},
    "pools": [
        {
            "name": "whole",
            "role": "both",
            "vendor": "nvidia",
            "engine": "vllm",
            "connector": "none",
            "kv_bytes_per_token": 1,
            "endpoints": [{"address": "10.0.0.1:8000"}],
            "speed": {"prefill_ms_per_token": 0.1, "step_base_ms": 10},
        }
    ],
}


def policy(name: str, generation: int = 1, **pool: Any) -> dict[str, Any]:
    spec = copy.deepcopy(SPEC)
    spec["model"]["name"] = f"org/{name}"
    spec["pools"][0] |= {"name": name, **pool}
    metadata = {"name": name, "uid": name, "generation": generation}
    return {"apiVersion": "pdcoord.io/v1alpha1", "kind": "PoolPolicy", "metadata": metadata, "spec": spec}


class Story:
    """Objects that change, and what a look at them says."""

    def __init__(self) -> None:
        self.objects: dict[str, dict[str, Any]] | None = None
        self.policies = KubePolicies(lambda: self.objects)

    def put(self, *given: dict[str, Any]) -> "Story":
        self.objects = (self.objects or {}) | {each["metadata"]["name"]: each for each in given}
        return self

    def drop(self, name: str) -> "Story":
        self.objects = {key: each for key, each in (self.objects or {}).items() if key != name}
        return self

    def look(self) -> str:
        match self.policies.poll():
            case Unchanged():
                return "unchanged"
            case Refused(problems):
                return f"refused {' '.join(problem.file for problem in problems)}"
            case Accepted(compiled, refused):
                assert compiled is self.policies.compiled
                names = " ".join(model.name for model in compiled.models)
                return f"accepted {names}" + "".join(f", refused {problem.file}" for problem in refused)


@pytest.fixture
def story() -> Story:
    return Story()


def test_nothing_is_known_before_objects_were_listed(story: Story) -> None:
    assert story.policies.load_first() is None
    assert story.look() == "unchanged"
    assert story.policies.judgement is None
    assert story.put().look() == "accepted "
    assert story.policies.load_first() is story.policies.compiled


def test_objects_come_change_break_and_go(story: Story) -> None:
    assert story.put(policy("a")).look() == "accepted org/a"
    assert story.look() == "unchanged"
    assert story.put(policy("b")).look() == "accepted org/a org/b"
    assert story.put(policy("b", 2, role="bot")).look() == "refused PoolPolicy b"
    assert [problem.key_path for problem in story.policies.problems] == [("spec", "pools", 0, "role")]
    assert story.look() == "unchanged"
    assert story.put(policy("a", 2, cost_per_hour=2)).look() == "accepted org/a org/b"
    assert story.policies.problems, "b is as broken as before, which was said"
    assert story.put(policy("b", 3)).look() == "unchanged", "as it was before it broke"
    assert story.policies.problems == ()
    assert story.drop("a").look() == "accepted org/b"


def test_one_look_may_accept_and_refuse(story: Story) -> None:
    assert story.put(policy("a"), policy("b", role="bot")).look() == "accepted org/a, refused PoolPolicy b"


def test_our_own_writes_of_a_status_are_no_change(story: Story) -> None:
    story.put(policy("a")).look()
    given = policy("a")
    given["metadata"]["resourceVersion"] = "2"
    assert story.put({**given, "status": {"observedGeneration": 1}}).look() == "unchanged"


def test_where_the_objects_are() -> None:
    assert policies_of("prod").path == "/apis/pdcoord.io/v1alpha1/namespaces/prod/poolpolicies"
