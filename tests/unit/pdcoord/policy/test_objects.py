"""Tests of what several PoolPolicy objects mean together, and of what each is told of itself."""

import copy
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, settings
from hypothesis import given as drawn
from hypothesis import strategies as st

from pdcoord.policy.crd import MESSAGE_LENGTH_MAX
from pdcoord.policy.objects import Given, Judgement, ObjectJudge, Reason, Verdict, generation_of

BROKEN = {"role": "decod"}


class Server:
    """Objects as a server holds them, and a process that looks at them."""

    def __init__(self, good: str) -> None:
        document = yaml.safe_load(good)
        self._spec = {
            key: value for key, value in document.items() if key not in {"apiVersion", "kind", "metadata"}
        }
        self.objects: dict[str, dict[str, Any]] = {}
        self.judge = ObjectJudge()
        self._uid = 0

    def put(self, name: str, /, *, model: str | None = None, **values: Any) -> None:
        """Create or change an object: other names of its model; the other values are its second pool's."""
        names = {kind: values.pop(kind) for kind in ("aliases", "adapters") if kind in values}
        spec = copy.deepcopy(self._spec)
        spec["model"] = {"name": model or f"org/{name}", **names}
        for index, each in enumerate(spec["pools"]):
            each["name"] = f"{name}-{index}"
            for endpoint in each["endpoints"]:
                endpoint["address"] = endpoint["address"].replace("10.0", f"10.{sum(name.encode()) % 250}")
        spec["pools"][1].update(values)
        if name not in self.objects:
            self._uid += 1
            metadata = {"name": name, "uid": str(self._uid), "generation": 0}
            metadata["creationTimestamp"] = f"2026-01-01T00:00:{self._uid:02}Z"
            self.objects[name] = {
                "apiVersion": "pdcoord.io/v1alpha1",
                "kind": "PoolPolicy",
                "metadata": metadata,
            }
        given = self.objects[name] = copy.deepcopy(self.objects[name])
        given["metadata"]["generation"] += given.get("spec") != spec
        given["spec"] = spec

    def look(self, judge: ObjectJudge | None = None) -> Judgement:
        return (judge or self.judge).judge(dict(self.objects))

    def write(self, judged: Judgement) -> None:
        """What the verdicts have written into the objects' status."""
        for name, verdict in judged.verdicts.items():
            condition = {
                "type": "Accepted",
                "status": "True" if verdict.is_accepted else "False",
                "observedGeneration": verdict.generation,
            }
            self.objects[name] = {**self.objects[name], "status": {"conditions": [condition]}}


@pytest.fixture
def server(good: str) -> Server:
    return Server(good)


def models(judged: Judgement) -> list[str]:
    return [model.name for model in judged.compiled.models]


def reasons(judged: Judgement) -> dict[str, str]:
    return {name: str(verdict.reason) for name, verdict in sorted(judged.verdicts.items())}


def test_each_object_is_one_model(server: Server) -> None:
    server.put("b")
    server.put("a")
    judged = server.look()
    assert models(judged) == ["org/a", "org/b"]
    assert reasons(judged) == {"a": "Accepted", "b": "Accepted"}
    assert judged.verdicts["a"] == Verdict("a", 1, Reason.ACCEPTED, 2, "2 pools serve org/a")


def test_no_objects_are_a_policy_without_models(server: Server) -> None:
    assert models(server.look()) == []
    assert server.look().compiled is server.look().compiled


def test_what_did_not_change_is_the_same_policy(server: Server) -> None:
    server.put("a")
    first = server.look()
    server.write(first)
    server.put("a")
    assert server.look().compiled is first.compiled


def test_a_broken_object_keeps_its_last_good_content_and_touches_no_other(server: Server) -> None:
    server.put("a")
    server.put("b")
    server.look()
    server.put("a", **BROKEN)
    server.put("b", model="org/other")
    judged = server.look()
    assert models(judged) == ["org/a", "org/other"]
    verdict = judged.verdicts["a"]
    assert verdict.reason is Reason.INVALID
    assert verdict.generation == 2
    assert verdict.message == 'spec.pools[1].role: is "decod", expected one of prefill, decode, both'
    assert [str(problem) for problem in verdict.problems] == [f"PoolPolicy a: {verdict.message}"]
    server.put("a")
    assert reasons(server.look()) == {"a": "Accepted", "b": "Accepted"}


def test_a_process_that_never_knew_the_good_content_serves_the_others(server: Server) -> None:
    server.put("a", **BROKEN)
    server.put("b")
    assert models(server.look()) == ["org/b"]


def test_deleted_objects_take_their_model_with_them(server: Server) -> None:
    server.put("a")
    server.put("b")
    server.look()
    server.put("a", **BROKEN)
    server.look()
    del server.objects["a"]
    assert models(server.look()) == ["org/b"]
    server.objects["b"]["metadata"]["deletionTimestamp"] = "2026-01-02T00:00:00Z"
    judged = server.look()
    assert models(judged) == []
    assert judged.verdicts == {}


def test_an_object_made_anew_has_no_last_good_content(server: Server) -> None:
    server.put("a")
    server.look()
    del server.objects["a"]
    server.put("a", **BROKEN)
    assert models(server.look()) == []


def test_of_two_new_objects_with_one_name_the_older_keeps_it(server: Server) -> None:
    server.put("z", model="org/shared")
    server.put("a", model="org/shared")
    judged = server.look()
    assert reasons(judged) == {"a": "Conflicted", "z": "Accepted"}
    assert judged.verdicts["a"].message == (
        'spec.model.name: is "org/shared", a name of a model that PoolPolicy z already has; change one'
    )
    assert str(judged.verdicts["a"].problems[0]).startswith("PoolPolicy a: spec.model.name: ")


def test_an_adapter_is_no_name_of_another_object(server: Server) -> None:
    server.put("a", adapters=["sql"])
    server.put("b", adapters=["law", "sql"])
    server.put("c", aliases=["sql"])
    server.put("d", adapters=["org/a"])
    server.put("e", adapters=["code"])
    judged = server.look()
    held = "a name of a model that PoolPolicy a already has; change one"
    assert {name: verdict.message for name, verdict in judged.verdicts.items() if name in "bcd"} == {
        "b": f'spec.model.adapters[1]: is "sql", {held}',
        "c": f'spec.model.aliases[0]: is "sql", {held}',
        "d": f'spec.model.adapters[0]: is "org/a", {held}',
    }
    assert [model.names for model in judged.compiled.models] == [("org/a", "sql"), ("org/e", "code")]


@pytest.mark.parametrize("has_status", [True, False])
def test_who_takes_a_name_in_use_is_refused_though_older(server: Server, *, has_status: bool) -> None:
    server.put("old")
    server.put("young")
    judged = server.look()
    if has_status:
        server.write(judged)
    server.put("old", model="org/young")
    # A process that starts now knows only what the objects say.
    for judge in (server.judge, ObjectJudge()) if has_status else (server.judge,):
        judged = server.look(judge)
        assert reasons(judged) == {"old": "Conflicted", "young": "Accepted"}
    assert models(server.look()) == ["org/old", "org/young"]
    if has_status:
        server.write(judged)
        assert reasons(server.look(ObjectJudge())) == {"old": "Conflicted", "young": "Accepted"}


@pytest.mark.parametrize("has_status", [True, False])
def test_a_refused_object_does_not_hold_up_changes_of_the_other(server: Server, *, has_status: bool) -> None:
    server.put("old", model="org/shared", **BROKEN)
    server.put("young", model="org/shared")
    judged = server.look()
    assert reasons(judged) == {"old": "Invalid", "young": "Accepted"}
    if has_status:
        server.write(judged)
    server.put("old", model="org/shared")
    server.put("young", model="org/shared", cost_per_hour=2.0)
    judged = server.look()
    assert reasons(judged) == {"old": "Conflicted", "young": "Accepted"}
    assert judged.compiled.bindings[1].pool.cost_per_hour == 2.0


def test_two_that_were_both_accepted_go_by_age(server: Server) -> None:
    """As two replicas may have written, each of what it saw first; after it all agree."""
    server.put("z", model="org/shared")
    server.put("a", model="org/shared")
    one, other = Judgement({}, {"z": server.look().verdicts["z"]}, server.look().compiled), None
    server.write(one)
    server.objects["a"]["status"] = copy.deepcopy(server.objects["z"]["status"])
    other = server.look(ObjectJudge())
    assert reasons(other) == {"a": "Conflicted", "z": "Accepted"}
    server.write(other)
    assert reasons(server.look(ObjectJudge())) == reasons(other)


def test_last_good_content_gives_way_to_what_is_accepted(server: Server) -> None:
    server.put("a", model="org/shared")
    server.look()
    server.put("a", model="org/shared", **BROKEN)
    server.put("b", model="org/shared")
    judged = server.look()
    assert reasons(judged) == {"a": "Invalid", "b": "Accepted"}
    assert models(judged) == ["org/shared"]
    assert judged.compiled.bindings[0].pool.name == "b-0"


def test_aliases_and_pool_names_are_names_too(server: Server) -> None:
    server.put("a")
    server.put("b", name="a-1")
    judged = server.look()
    assert reasons(judged) == {"a": "Accepted", "b": "Conflicted"}
    assert "a pool name that PoolPolicy a already has" in judged.verdicts["b"].message


def test_warnings_are_told_with_what_is_accepted(server: Server) -> None:
    server.put("a", link_gbit_per_s=1)
    verdict = server.look().verdicts["a"]
    assert verdict.is_accepted
    assert verdict.message.startswith("2 pools serve org/a; warning: spec.pools[1]")


def test_a_message_is_bounded_and_one_line(server: Server) -> None:
    server.put("a", endpoints=[{"address": f"\n{'x' * 70}{i}"} for i in range(100)])
    message = server.look().verdicts["a"].message
    assert len(message) <= MESSAGE_LENGTH_MAX
    assert message.isprintable()
    shown, count = message.rsplit("; and ", 1)
    assert len(shown.split("; ")) + int(count.removesuffix(" more")) == 100


@pytest.mark.parametrize(
    "odd",
    [
        {"metadata": {"name": "odd"}},
        {"metadata": {"name": "odd"}, "spec": {}, "status": {"conditions": "text"}},
        {"metadata": {"name": "odd", "generation": "x"}, "spec": [1], "status": []},
        {"metadata": None, "status": {"conditions": [None, {"type": "Other"}]}},
    ],
)
def test_an_object_of_any_shape_is_refused_alone(server: Server, odd: Given) -> None:
    server.put("a")
    server.objects["odd"] = dict(odd)
    judged = server.look()
    assert models(judged) == ["org/a"]
    assert judged.verdicts["odd"].reason is Reason.INVALID
    assert generation_of(odd) == 0


STATUS = st.sampled_from([None, ("True", 1), ("True", 0), ("False", 1), ("Unknown", 1)])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@drawn(st.lists(st.tuples(st.sampled_from("xyz"), st.booleans(), STATUS), max_size=5))
def test_replicas_agree_once_a_verdict_is_written(
    good: str, said: list[tuple[str, bool, tuple[str, int] | None]]
) -> None:
    """From any state that objects may be in, what one process decides and writes every other decides too."""
    server = Server(good)
    for index, (model, is_broken, status) in enumerate(said):
        server.put(f"p{index}", model=model, **(BROKEN if is_broken else {}))
        if status is not None:
            condition = {"type": "Accepted", "status": status[0], "observedGeneration": status[1]}
            server.objects[f"p{index}"]["status"] = {"conditions": [condition]}
    first = server.look(ObjectJudge())
    assert first.verdicts == server.look(ObjectJudge()).verdicts
    server.write(first)
    again = server.look(ObjectJudge())
    assert again.verdicts == first.verdicts
    assert again.compiled == first.compiled
    sound = {model for model, is_broken, _ in said if not is_broken}
    assert sorted(models(first)) == sorted(sound), "each name is served once, whoever wants it"
