"""Tests of what is written into the status of PoolPolicy objects, and how seldom."""

import asyncio
import random
import time
from datetime import UTC, datetime
from typing import Any

import jsonschema
import pytest

from pdcoord.feeds.kubeapi import Collection, KubeError
from pdcoord.feeds.kubewatch import KubeObject, WatchTrouble
from pdcoord.feeds.policies import policies_of
from pdcoord.feeds.policystatus import StatusDesk, StatusLimits, StatusWrite, StatusWriter, says
from pdcoord.policy.compile import compile_policy
from pdcoord.policy.crd import crd
from pdcoord.policy.objects import Judgement, Reason, Verdict

LIMITS = StatusLimits(spread_s=1.0, interval_s=0.1, backoff_s=1.0, backoff_s_max=8.0)
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
GOOD = Verdict("a", 1, Reason.ACCEPTED, 2, "2 pools serve org/a")
BAD = Verdict("a", 2, Reason.INVALID, None, "spec.slo: is 1, expected a mapping")


class Server:
    """Objects with versions, and the desk of one replica, at a clock of its own."""

    def __init__(self, seed: int = 1, **verdicts: Verdict) -> None:
        self.objects: dict[str, dict[str, Any]] = {
            name: {"metadata": {"name": name, "resourceVersion": "1"}} for name in verdicts
        }
        self.verdicts = dict(verdicts)
        self.desk = StatusDesk(LIMITS, random.Random(seed))
        self.now_s = 0.0

    def look(self, desk: StatusDesk | None = None) -> None:
        judged = Judgement(dict(self.objects), dict(self.verdicts), compile_policy(()))
        (desk or self.desk).look(judged, self.now_s)
        (desk or self.desk).validate()

    def writes(self, seconds: float, desk: StatusDesk | None = None) -> list[StatusWrite]:
        """Those that are due in a time, none of them answered."""
        found: list[StatusWrite] = []
        for _ in range(round(seconds / 0.1)):
            self.now_s += 0.1
            write = (desk or self.desk).due(self.now_s, NOON)
            found += [] if write is None else [write]
        return found

    def first_write(self) -> StatusWrite:
        """The next one, within the time that a new one waits at most."""
        for _ in range(11):
            if writes := self.writes(0.1):
                return writes[0]
        raise AssertionError("no write is due")

    def apply(self, write: StatusWrite) -> None:
        """What a server does with a write that is based on the version it has."""
        given = self.objects[write.name]
        assert write.patch["metadata"] == {"resourceVersion": given["metadata"]["resourceVersion"]}
        version = str(int(given["metadata"]["resourceVersion"]) + 1)
        self.objects[write.name] = {
            "metadata": {**given["metadata"], "resourceVersion": version},
            "status": {**given.get("status", {}), **write.patch["status"]},
        }


def test_a_verdict_is_written_once() -> None:
    server = Server(a=GOOD)
    server.look()
    write = server.first_write()
    assert write.patch == {
        "metadata": {"resourceVersion": "1"},
        "status": {
            "observedGeneration": 1,
            "acceptedGeneration": 1,
            "pools": 2,
            "conditions": [
                {
                    "type": "Accepted",
                    "status": "True",
                    "observedGeneration": 1,
                    "reason": "Accepted",
                    "message": "2 pools serve org/a",
                    "lastTransitionTime": "2026-01-01T12:00:00Z",
                }
            ],
        },
    }
    server.desk.written(write)
    assert server.writes(20) == [], "the watch has not told of it yet"
    server.apply(write)
    server.look()
    assert server.writes(20) == [], "the change of a status leads to no other"


def test_what_is_written_fits_the_definition() -> None:
    (version,) = crd()["spec"]["versions"]
    schema = version["schema"]["openAPIV3Schema"]["properties"]["status"]
    for verdict in (GOOD, BAD):
        server = Server(a=verdict)
        server.look()
        write = server.first_write()
        jsonschema.Draft4Validator(schema).validate(write.patch["status"])
        known = schema["properties"]["conditions"]["items"]["properties"]
        assert write.patch["status"].keys() <= schema["properties"].keys()
        assert write.patch["status"]["conditions"][0].keys() <= known.keys()


def test_a_refusal_keeps_what_tells_of_the_last_good_content() -> None:
    server = Server(a=GOOD)
    server.look()
    server.apply(server.first_write())
    server.verdicts["a"] = BAD
    server.look()
    server.apply(server.first_write())
    status = server.objects["a"]["status"]
    assert (status["observedGeneration"], status["acceptedGeneration"], status["pools"]) == (2, 1, 2)
    assert says(server.objects["a"], BAD)
    assert not says(server.objects["a"], GOOD)


def test_others_conditions_stay_and_the_time_is_that_of_the_change() -> None:
    server = Server(a=BAD)
    mine = {"type": "Accepted", "status": "False", "lastTransitionTime": "2025-01-01T00:00:00Z"}
    other = {"type": "Reviewed", "status": "True"}
    server.objects["a"]["status"] = {"conditions": [mine, other]}
    server.look()
    write = server.first_write()
    listed = write.patch["status"]["conditions"]
    assert listed[0] == other
    assert listed[1]["lastTransitionTime"] == "2025-01-01T00:00:00Z"


def test_the_second_replica_sees_that_there_is_nothing_left_to_write() -> None:
    server = Server(a=GOOD, seed=1)
    slow = StatusDesk(LIMITS, random.Random(2))
    server.look()
    server.look(slow)
    early = [write for write in (server.desk.due(0.5, NOON), slow.due(0.5, NOON)) if write is not None]
    assert len(early) == 1, "their pauses differ; of these seeds one is below 0.5 s"
    server.apply(early[0])
    server.look()
    server.look(slow)
    assert server.writes(5) == []
    assert server.writes(5, slow) == []


def test_who_overwrites_again_and_again_is_answered_more_and_more_slowly() -> None:
    server = Server(a=GOOD)
    server.look()
    count = 0
    for _ in range(600):
        for write in server.writes(0.1):
            count += 1
            server.desk.written(write)
            server.apply(write)
            server.look()
            server.objects["a"] = {
                "metadata": server.objects["a"]["metadata"] | {"resourceVersion": str(100 + count * 2)},
                "status": {},
            }
        server.look()
    assert 5 <= count <= 12, "in a minute: 1, 2, 4, 8, 8 ... s apart"


def test_failures_are_repeated_more_and_more_slowly_and_as_the_server_asks() -> None:
    server = Server(a=GOOD)
    server.look()
    write = server.first_write()
    server.desk.failed(write, None, server.now_s)
    again = server.first_write()
    server.desk.failed(again, 5.0, server.now_s)
    assert server.writes(4.5) == []
    assert len(server.writes(1.0)) == 1
    count = len(server.writes(60))
    assert 6 <= count <= 9, "every 8 s at last"


def test_after_a_conflict_the_new_version_is_what_counts() -> None:
    server = Server(a=GOOD)
    server.look()
    write = server.first_write()
    server.desk.failed(write, None, server.now_s)
    server.objects["a"]["metadata"] = {"name": "a", "resourceVersion": "7"}
    server.look()
    again = server.first_write()
    assert again.version == "7"


def test_writes_of_one_process_are_apart() -> None:
    verdicts = {f"p{i}": Verdict(f"p{i}", 1, Reason.ACCEPTED, 1, "1 pool serves x") for i in range(50)}
    server = Server(**verdicts)
    server.look()
    assert len(server.writes(2)) <= 20
    assert len(server.writes(8)) >= 30


def test_an_object_that_is_gone_is_not_written() -> None:
    server = Server(a=GOOD)
    server.look()
    server.objects.clear()
    server.verdicts.clear()
    server.look()
    assert server.writes(5) == []


@pytest.mark.parametrize(
    "status", [None, "text", {"conditions": "text"}, {"conditions": [None, {"type": 1}]}]
)
def test_a_status_of_any_shape_is_put_right(status: object) -> None:
    server = Server(a=GOOD)
    server.objects["a"]["status"] = status
    server.look()
    write = server.first_write()
    assert write.patch["status"]["conditions"][-1]["type"] == "Accepted"


class Api:
    """Refuses the first write."""

    def __init__(self) -> None:
        self.writes: list[str] = []
        self.is_written = asyncio.Event()

    async def patch_status(self, of: Collection, name: str, patch: KubeObject) -> KubeObject:
        self.writes.append(f"{of.path}/{name} {patch['status']['conditions'][0]['status']}")
        if len(self.writes) == 1:
            raise KubeError(WatchTrouble.THROTTLED, "status 429: later", retry_after_s=0.01)
        self.is_written.set()
        return {}


async def test_a_write_that_fails_is_told_and_made_again() -> None:
    server, api, troubles = Server(a=BAD), Api(), []
    judged = Judgement(server.objects, server.verdicts, compile_policy(()))
    writer = StatusWriter(
        api,
        policies_of("prod"),
        judgement=lambda: judged,
        clock=time.monotonic,
        rng=random.Random(1),
        troubled=lambda *trouble: troubles.append(trouble),
        limits=StatusLimits(look_s=0.001, spread_s=0.001, interval_s=0.001, backoff_s=0.001),
    )
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        running = group.create_task(writer.run())
        await api.is_written.wait()
        running.cancel()
    assert troubles == [("a", WatchTrouble.THROTTLED, "status 429: later")]
    assert api.writes == ["/apis/pdcoord.io/v1alpha1/namespaces/prod/poolpolicies/a False"] * 2
