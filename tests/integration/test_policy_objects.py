"""PoolPolicy objects in an API server, followed by two replicas that write what became of them."""

import asyncio
import copy
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import aiohttp.web
import kmock as kmock_package
import pytest
import yaml
from kmock import KubernetesEmulator, action

from pdcoord.feeds.kubeapi import KubeApi
from pdcoord.feeds.kubefollow import Follower, FollowHooks
from pdcoord.feeds.kubewatch import WatchLimits
from pdcoord.feeds.policies import KubePolicies, policies_of
from pdcoord.feeds.policystatus import StatusLimits, StatusWriter

WAIT_S = 20.0
NAMESPACE = "prod"
COLLECTION = policies_of(NAMESPACE)
RESOURCE = kmock_package.resource("pdcoord.io", "v1alpha1", "poolpolicies")
POOL: dict[str, Any] = {
    "role": "both",
    "vendor": "nvidia",
    "engine": "vllm",
    "connector": "none",
    "kv_bytes_per_token": 1,
    "endpoints": [{"address": "10.0.0.1:8000"}],
    "speed": {"prefill_ms_per_token": 0.1, "step_base_ms": 10},
}


class Server(KubernetesEmulator):
    """With what the emulator leaves out: generations, versions, conflicts, and a status apart."""

    version = 0
    conflicts_left = 0
    status_writes = 0

    async def _handle(self, request: Any) -> aiohttp.web.StreamResponse:
        if request.resource is not None and isinstance(request.data, dict):
            metadata = request.data.setdefault("metadata", {})
            Server.version += 1
            if request.action == action.CREATE:
                metadata |= {"uid": f"uid-{Server.version}", "generation": 1}
                metadata["creationTimestamp"] = f"2026-01-01T00:00:{Server.version:02}Z"
            elif request.action == action.UPDATE:
                self._take_change(request, metadata)
            metadata["resourceVersion"] = str(Server.version)
        return await super()._handle(request)

    def _take_change(self, request: Any, metadata: dict[str, Any]) -> None:
        known = self.objects[request.resource, request.namespace, request.name].raw
        if request.subresource == "status":
            Server.status_writes += 1
            is_old = metadata.get("resourceVersion") != known["metadata"]["resourceVersion"]
            Server.conflicts_left -= 1
            if is_old or Server.conflicts_left >= 0:
                raise kmock_package.KubernetesError(status=409, reason="Conflict", message="changed since")
            assert request.data.keys() == {"metadata", "status"}
        else:
            assert "status" not in request.data
            metadata["generation"] = known["metadata"]["generation"] + 1


class Replica:
    """One coordinator's sources of policy."""

    def __init__(self, api: KubeApi, seed: int) -> None:
        rng = random.Random(seed)
        self.changed = asyncio.Event()
        self.troubles: list[str] = []
        self.follower = Follower(
            api,
            COLLECTION,
            hooks=FollowHooks(self.changed.set, lambda *trouble: self.troubles.append(str(trouble))),
            clock=time.monotonic,
            rng=rng,
            limits=WatchLimits(backoff_s=0.02, backoff_s_max=0.1),
        )
        self.policies = KubePolicies(lambda: self.follower.objects if self.follower.listed else None)
        self.writer = StatusWriter(
            api,
            COLLECTION,
            judgement=lambda: self.policies.judgement,
            clock=time.monotonic,
            rng=rng,
            troubled=lambda *trouble: self.troubles.append(str(trouble)),
            limits=StatusLimits(look_s=0.01, spread_s=0.05, interval_s=0.01, backoff_s=0.05),
        )

    async def follow(self) -> None:
        while True:
            await self.changed.wait()
            self.changed.clear()
            await asyncio.to_thread(self.policies.poll)

    @property
    def models(self) -> list[str]:
        compiled = self.policies.compiled
        return ["unknown"] if compiled is None else [str(model.name) for model in compiled.models]


class Cluster:
    """The server, as kubectl has it, and replicas."""

    def __init__(self, session: aiohttp.ClientSession, replicas: list[Replica]) -> None:
        self._session = session
        self.replicas = replicas

    async def create(self, name: str, model: str | None = None, **pool: Any) -> None:
        body = {
            "apiVersion": "pdcoord.io/v1alpha1",
            "kind": "PoolPolicy",
            "metadata": {"name": name, "namespace": NAMESPACE},
            "spec": spec_of(name, model, **pool),
        }
        await self._call("POST", COLLECTION.path, body)

    async def change(self, name: str, model: str | None = None, **pool: Any) -> None:
        await self._call("PATCH", f"{COLLECTION.path}/{name}", {"spec": spec_of(name, model, **pool)})

    async def delete(self, name: str) -> None:
        await self._call("DELETE", f"{COLLECTION.path}/{name}", None)

    async def condition(self, name: str) -> tuple[str, str, int, str]:
        """(status, reason, observedGeneration, message); of nothing where nothing is written yet."""
        given = await self._call("GET", f"{COLLECTION.path}/{name}", None)
        for each in given.get("status", {}).get("conditions", ()):
            assert each["type"] == "Accepted"
            assert given["status"]["observedGeneration"] == each["observedGeneration"]
            return each["status"], each["reason"], each["observedGeneration"], each["message"]
        return "", "", 0, ""

    async def _call(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        async with self._session.request(method, path, json=copy.deepcopy(body)) as response:
            assert response.status < 300, await response.text()
            answer: dict[str, Any] = await response.json()
            return answer

    async def until_models(self, *models: str) -> None:
        await until(lambda: all(replica.models == [*models] for replica in self.replicas))

    async def until_told(self, name: str, status: str, reason: str, generation: int) -> str:
        async with asyncio.timeout(WAIT_S):
            while (told := await self.condition(name))[:3] != (status, reason, generation):
                await asyncio.sleep(0.02)
        return told[3]


def spec_of(name: str, model: str | None, **pool: Any) -> dict[str, Any]:
    return {"model": {"name": model or f"org/{name}"}, "pools": [POOL | {"name": name} | pool]}


async def until(is_true: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not is_true():
            await asyncio.sleep(0.01)


@asynccontextmanager
async def running(kmock: Any, folder: Path, count: int = 2) -> AsyncIterator[Cluster]:
    """Replicas that follow a server."""
    url = str(kmock.url)
    config = {
        "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u"}}],
        "clusters": [{"name": "k", "cluster": {"server": url}}],
        "users": [{"name": "u", "user": {}}],
    }
    kubeconfig = folder / "kubeconfig"
    kubeconfig.write_text(yaml.safe_dump(config))
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(aiohttp.ClientSession(base_url=url))
        environ = {"KUBECONFIG": str(kubeconfig)}
        apis = [await stack.enter_async_context(KubeApi(environ=environ, deadline_s=5)) for _ in range(count)]
        replicas = [Replica(api, seed) for seed, api in enumerate(apis)]
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(part)
                for replica in replicas
                for part in (replica.follower.run(), replica.follow(), replica.writer.run())
            ]
            try:
                yield Cluster(session, replicas)
            finally:
                for task in tasks:
                    task.cancel()


def define(kmock: Any) -> None:
    """What installing the definition does."""
    Server.version = Server.conflicts_left = Server.status_writes = 0
    kmock.resources[RESOURCE] = {
        "kind": "PoolPolicy",
        "namespaced": True,
        "verbs": {"list", "watch", "patch"},
    }


@pytest.mark.kmock(cls=Server)
async def test_policies_come_change_break_and_go(kmock: Any, tmp_path: Path) -> None:
    define(kmock)
    async with running(kmock, tmp_path) as cluster:
        await cluster.until_models()
        await cluster.create("a")
        await cluster.until_models("org/a")
        assert await cluster.until_told("a", "True", "Accepted", 1) == "1 pool serves org/a"
        await cluster.create("b")
        await cluster.until_models("org/a", "org/b")

        await cluster.change("a", role="bot")
        message = await cluster.until_told("a", "False", "Invalid", 2)
        assert message == 'spec.pools[0].role: is "bot", expected one of prefill, decode, both'
        await cluster.change("b", model="org/b2")
        await cluster.until_models("org/a", "org/b2")

        await cluster.change("a", model="org/a3")
        await cluster.until_models("org/a3", "org/b2")
        await cluster.until_told("a", "True", "Accepted", 3)
        await cluster.delete("b")
        await cluster.until_models("org/a3")


@pytest.mark.kmock(cls=Server)
async def test_two_objects_with_one_model_name_are_told_of_each_other(kmock: Any, tmp_path: Path) -> None:
    define(kmock)
    async with running(kmock, tmp_path) as cluster:
        await cluster.create("z", model="org/shared")
        await cluster.until_told("z", "True", "Accepted", 1)
        await cluster.create("a", model="org/shared")
        message = await cluster.until_told("a", "False", "Conflicted", 1)
        assert message.startswith('spec.model.name: is "org/shared", a name of a model that PoolPolicy z')
        await cluster.until_models("org/shared")
        await cluster.delete("z")
        await cluster.until_told("a", "True", "Accepted", 1)
        await cluster.until_models("org/shared")


@pytest.mark.kmock(cls=Server)
async def test_conflicts_are_tried_again_and_writes_come_to_an_end(kmock: Any, tmp_path: Path) -> None:
    define(kmock)
    async with running(kmock, tmp_path) as cluster:
        Server.conflicts_left = 3
        await cluster.create("a")
        await cluster.until_told("a", "True", "Accepted", 1)
        assert any("409" in trouble for replica in cluster.replicas for trouble in replica.troubles)

        def says_so(replica: Replica) -> bool:
            return bool(replica.follower.objects["a"].get("status"))

        await until(lambda: all(says_so(replica) for replica in cluster.replicas))
        count = Server.status_writes
        # Another object's story passes, and nothing is written about this one any more.
        await cluster.create("b")
        await cluster.until_told("b", "True", "Accepted", 1)
        await cluster.delete("b")
        await cluster.until_models("org/a")
        assert Server.status_writes <= count + 2, "at most one by each replica, about b"


async def test_an_api_without_the_definition_is_named(kmock: Any, tmp_path: Path) -> None:
    async with running(kmock, tmp_path, 1) as cluster:
        (replica,) = cluster.replicas
        await until(lambda: any("missing" in trouble for trouble in replica.troubles))
        assert replica.policies.load_first() is None
