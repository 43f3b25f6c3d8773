"""Pods as an endpoints source: what it reads anew, what it remembers, how much it says."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from pdcoord.feeds import kubernetes
from pdcoord.feeds.kubeapi import Collection
from pdcoord.feeds.kubefollow import Follower, FollowHooks
from pdcoord.feeds.kubernetes import PodsSource, PodsWanted
from pdcoord.feeds.kubewatch import KubeObject, PageListed, Started, WatchOpened, WatchTold
from pdcoord.feeds.podspec import SkipReason
from pdcoord.policy.endpoints import EndpointsDocument, Matching


class SilentApi:
    """Takes note of what it is asked, and never answers."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.is_asked = asyncio.Event()

    async def list_page(self, of: Collection, *, size: int, page: str = "") -> KubeObject:
        self.asked.append(of.plural)
        self.is_asked.set()
        await asyncio.Event().wait()
        return {}

    @asynccontextmanager
    async def watch(
        self, of: Collection, resource_version: str, *, last_s: int
    ) -> AsyncIterator[AsyncIterator[list[KubeObject]]]:
        raise AssertionError(of)
        yield


def pod(name: str, ip: str, *, uid: str = "u", ready: bool = True, **metadata: Any) -> KubeObject:
    return {
        "metadata": {"name": name, "uid": uid, "labels": {"app": "x"}, **metadata},
        "status": {
            "podIP": ip,
            "phase": "Running",
            "conditions": [{"type": "Ready", "status": "True" if ready else "False"}],
        },
    }


class Bench:
    def __init__(self, inference_pool: str | None = None) -> None:
        self.changes = 0
        self.api = SilentApi()
        self.source = PodsSource(
            self.api,
            PodsWanted("ns", "app", inference_pool),
            hooks=FollowHooks(self._changed, lambda *_: None),
            clock=lambda: 0.0,
            rng=random.Random(1),
        )

    def _changed(self) -> None:
        self.changes += 1

    def listed(self, *objects: KubeObject, follower: Follower | None = None) -> None:
        """What a list of these says, and a watch from then on."""
        follower = follower or self.source.followers[0]
        follower._take(Started())
        follower._take(PageListed(objects, "1"))
        follower._take(WatchOpened())

    def tell(self, type_: str, told: KubeObject) -> None:
        self.source.followers[0]._take(WatchTold(type_, told))

    def document(self) -> EndpointsDocument:
        found = self.source.poll()
        assert found is not None
        return found

    def shown(self) -> list[str]:
        return [
            f"{entry.name} {entry.address}{' draining' if entry.is_draining else ''}"
            for entry in self.document().entries
        ]


def judged(bench: Bench) -> list[str]:
    return [str(problem) for problem in bench.source.judge(Matching((), (), ()))]


def test_nothing_is_said_before_there_was_a_whole_list() -> None:
    bench = Bench()
    assert bench.source.load_first() is None
    assert bench.source.poll() is None
    bench.listed()
    assert bench.shown() == []
    assert bench.source.poll() is None
    assert bench.changes == 1


def test_a_pod_that_was_ready_is_remembered_as_such_for_as_long_as_it_is_the_same() -> None:
    bench = Bench()
    bench.listed(pod("a", "10.0.0.1"), pod("b", "10.0.0.2", ready=False))
    assert bench.shown() == ["a 10.0.0.1:8000"]
    bench.tell("MODIFIED", pod("a", "10.0.0.1", ready=False))
    assert bench.shown() == ["a 10.0.0.1:8000 draining"]
    bench.listed(pod("a", "10.0.0.1", ready=False, labels={"app": "y"}))
    assert bench.shown() == ["a 10.0.0.1:8000 draining"]
    bench.tell("MODIFIED", pod("a", "10.0.0.1", ready=False, uid="another"))
    assert bench.shown() == []
    bench.tell("MODIFIED", pod("a", "10.0.0.1", uid="another"))
    assert bench.shown() == ["a 10.0.0.1:8000"]


def test_an_address_belongs_to_the_pod_that_stays() -> None:
    bench = Bench()
    bench.listed(pod("a", "10.0.0.1", deletionTimestamp="now"), pod("b", "10.0.0.1"))
    assert bench.shown() == ["b 10.0.0.1:8000"]
    assert judged(bench) == ["pod ns/a: has address 10.0.0.1:8000, which pod b has"]
    assert bench.source.left_out[SkipReason.REPEATED] == 1


def test_only_what_is_new_is_read_anew() -> None:
    bench = Bench()
    bench.listed(pod("a", "10.0.0.1"), pod("b", "10.0.0.2"))
    first = {entry.name: entry for entry in bench.document().entries}
    bench.tell("MODIFIED", pod("b", "10.0.0.3"))
    second = {entry.name: entry for entry in bench.document().entries}
    assert second["a"] is first["a"]
    assert second["b"] is not first["b"]


def test_warnings_are_bounded_and_counts_are_not() -> None:
    bench = Bench()
    bench.listed(*(pod(f"p{i:02}", "10.0.0.1", labels={}) for i in range(30)), pod("z", "", ready=False))
    assert bench.shown() == []
    told = judged(bench)
    assert len(told) == 21
    assert told[0] == "pod ns/p00: has no labels, so no pool's selector can pick it"
    assert told[-1] == "pods in ns: and 10 more pods like these"
    counts = {reason: count for reason, count in bench.source.left_out.items() if count}
    assert counts == {SkipReason.NO_LABELS: 30, SkipReason.NO_ADDRESS: 1}


def test_there_is_a_bound_on_endpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubernetes, "ENTRIES_MAX", 3)
    bench = Bench()
    bench.listed(*(pod(f"p{i}", f"10.0.0.{i}") for i in range(5)))
    assert len(bench.shown()) == 3
    assert judged(bench) == [
        "pod ns/p3: is beyond the 3 endpoints that one process takes",
        "pod ns/p4: is beyond the 3 endpoints that one process takes",
    ]


def inference_pool(*ports: int, **labels: str) -> KubeObject:
    return {
        "metadata": {"name": "f"},
        "spec": {"selector": {"matchLabels": labels}, "targetPorts": [{"number": port} for port in ports]},
    }


def test_ports_of_a_pool_hold_for_the_pods_of_its_selector_only() -> None:
    bench = Bench("f")
    pods, pool = bench.source.followers
    bench.listed(inference_pool(1, app="x"), follower=pool)
    assert pods.collection.labels == "app=x"
    bench.listed(pod("a", "10.0.0.1"))
    assert bench.shown() == ["a 10.0.0.1:1"]
    bench.listed(inference_pool(2, app="y"), follower=pool)
    assert bench.source.poll() is None
    bench.listed(pod("a", "10.0.0.1"))
    assert bench.shown() == ["a 10.0.0.1:2"]
    bench.listed(inference_pool(3, app="y"), follower=pool)
    assert bench.shown() == ["a 10.0.0.1:3"]
    bench.listed(follower=pool)
    assert [str(problem) for problem in bench.source.problems] == [
        "InferencePool ns/f: does not exist; its last terms stay in force"
    ]
    assert bench.source.poll() is None


async def test_pods_are_not_asked_for_before_the_pool_said_which() -> None:
    bench = Bench("f")
    async with asyncio.timeout(20.0), asyncio.TaskGroup() as group:
        task = group.create_task(bench.source.run())
        await bench.api.is_asked.wait()
        assert bench.api.asked == ["inferencepools"]
        bench.api.is_asked.clear()
        bench.listed(inference_pool(1, app="x"), follower=bench.source.followers[1])
        await bench.api.is_asked.wait()
        assert bench.api.asked == ["inferencepools", "pods"]
        task.cancel()
