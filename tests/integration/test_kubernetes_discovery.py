"""Discovery against an API server over HTTP: what changes, what expires, what fails, and a whole process."""

import asyncio
import json
import random
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp.web
import pytest
from kmock import KubernetesEmulator, Server, action, resource

from pdcoord.core.events import Action, Event, ModelsReplaced
from pdcoord.core.fleet import EndpointDraining, EndpointGone, EndpointSeen
from pdcoord.feeds.declared import DeclaredFeed
from pdcoord.feeds.kubeapi import Collection, KubeApi, KubeError
from pdcoord.feeds.kubefollow import FollowHooks
from pdcoord.feeds.kubernetes import PodsSource, PodsWanted
from pdcoord.feeds.kubewatch import WatchLimits, WatchTrouble
from pdcoord.feeds.podspec import SkipReason
from pdcoord.policy.registry import PolicyRegistry

PODS = resource("", "v1", "pods")
POOLS = resource("inference.networking.k8s.io", "v1", "inferencepools")
DEADLINE_S = 20.0

POLICY = """\
apiVersion: pdcoord.io/v1alpha1
kind: PoolPolicy
metadata: {name: m}
model: {name: org/model}
pools:
  - name: picked
    role: both
    vendor: v
    engine: vllm
    connector: none
    kv_bytes_per_token: 1024
    selector: {match_labels: {pdcoord.io/role: both}}
    speed: {prefill_base_ms: 8, prefill_ms_per_token: 0.1, step_base_ms: 8}
"""

Fault = Callable[[Any], Awaitable[aiohttp.web.StreamResponse]]


class ApiServer(KubernetesEmulator):
    """kmock's, which answers the next lists and watches with the faults that it is given, and selects labels.

    Attributes:
        asked: lists and watches by action.
    """

    def __init__(self) -> None:
        super().__init__()
        self.faults: deque[Fault] = deque()
        self.asked: Counter[str] = Counter()
        self.queries: list[dict[str, str]] = []

    async def _handle(self, request: Any) -> aiohttp.web.StreamResponse:
        if request.action in {action.LIST, action.WATCH}:
            self.asked[f"{request.action.value} {request.resource.plural}"] += 1
            self.queries.append(dict(request.params))
            if self.faults:
                return await self.faults.popleft()(request)
        return await super()._handle(request)

    async def tell(self, type_: str, told: dict[str, Any]) -> None:
        """Put a line into the open watches of pods."""
        await self._buses[PODS].put({"type": type_, "object": told})

    async def put(self, given: dict[str, Any], at: Any = PODS) -> None:
        """Create or replace an object."""
        name = given["metadata"]["name"]
        is_new = (at, "ns", name) not in self.objects or self.objects[at, "ns", name].deleted
        self.objects[at, "ns", name] = given
        line = {"type": "ADDED" if is_new else "MODIFIED", "object": given}
        await self._buses[at].put(line)

    async def remove(self, name: str, at: Any = PODS) -> None:
        given = dict(self.objects[at, "ns", name].raw)
        del self.objects[at, "ns", name]
        await self._buses[at].put({"type": "DELETED", "object": given})


def refusal(status: int, **headers: str) -> Fault:
    async def answer(_: Any) -> aiohttp.web.StreamResponse:
        body = {"kind": "Status", "code": status, "message": f"told {status}", "metadata": {}}
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        return aiohttp.web.json_response(body, status=status, headers=given)

    return answer


def lines(*told: dict[str, Any] | bytes) -> Fault:
    async def answer(_: Any) -> aiohttp.web.StreamResponse:
        body = b"".join(
            line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in told
        )
        return aiohttp.web.Response(body=body)

    return answer


async def never(_: Any) -> aiohttp.web.StreamResponse:
    await asyncio.sleep(3_600)
    raise AssertionError


def expired() -> dict[str, Any]:
    return {"kind": "Status", "code": 410, "reason": "Expired", "metadata": {"namespace": "ns"}}


def pod(name: str, ip: str = "10.0.0.1", **changes: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "metadata": {
            "name": name,
            "namespace": "ns",
            "uid": f"uid-{name}",
            "resourceVersion": "7",
            "labels": {"llm-d.ai/inference-serving": "true", "llm-d.ai/role": "both"},
            "annotations": {},
        },
        "spec": {"containers": [{"name": "engine"}]},
        "status": {"phase": "Running", "podIP": ip, "conditions": [{"type": "Ready", "status": "True"}]},
    }
    for path, value in changes.items():
        at = made
        *parents, last = path.split("__")
        for key in parents:
            at = at[key]
        at[last] = value
    return made


class Recorder:
    """What a coordinator is told, in short."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def handle(self, event: Event) -> list[Action]:
        match event:
            case EndpointSeen(endpoint):
                self.told.append(f"seen {endpoint.id} {endpoint.address}")
            case EndpointGone(endpoint_id):
                self.told.append(f"gone {endpoint_id}")
            case EndpointDraining(endpoint_id):
                self.told.append(f"draining {endpoint_id}")
            case ModelsReplaced():
                pass
            case _:
                raise AssertionError(event)
        return []


class Bench:
    """The feed over pods, applied whenever these change."""

    def __init__(self, api: KubeApi, server: ApiServer, policy: Path, pool: str | None) -> None:
        self.server = server
        self.recorder = Recorder()
        self.troubles: list[tuple[str, WatchTrouble, str]] = []
        self.changed = asyncio.Event()
        hooks = FollowHooks(
            self.changed.set, lambda what, why, detail, _: self.troubles.append((what, why, detail))
        )
        wanted = PodsWanted("ns", "llm-d.ai/inference-serving=true", pool)
        limits = WatchLimits(backoff_s=0.02, backoff_s_max=0.1)
        self.pods = PodsSource(
            api, wanted, hooks=hooks, clock=time.monotonic, rng=random.Random(1), limits=limits
        )
        self.feed = DeclaredFeed(self.recorder, PolicyRegistry(policy), self.pods)
        self.feed.load_first()

    def trouble(self, what: str, why: WatchTrouble, detail: str, _: float) -> None:
        self.troubles.append((what, why, detail))

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self.pods.run())
            while True:
                await self.changed.wait()
                self.changed.clear()
                await self.feed.poll()

    async def until(self, is_so: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not is_so():
                await asyncio.sleep(0.005)

    async def told(self, *expected: str) -> None:
        """Wait until just this was told since the last call."""
        async with asyncio.timeout(DEADLINE_S):
            while self.recorder.told[: len(expected)] != list(expected):
                assert len(self.recorder.told) <= len(expected), self.recorder.told
                await asyncio.sleep(0.005)
        assert self.recorder.told == list(expected)
        self.recorder.told.clear()

    async def expire(self) -> None:
        """Have the open watch end with an ERROR, once the server has it."""
        async with asyncio.timeout(DEADLINE_S):
            while not self.troubles:
                await self.server.tell("ERROR", expired())
                await asyncio.sleep(0.02)


class Wire:
    """A wire to the API server that can be cut, and mended."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self.port = 0

    async def mend(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def cut(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        await self._server.wait_closed()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._port)
        self._writers |= {writer, back}
        with suppress(OSError):
            async with asyncio.TaskGroup() as group:
                group.create_task(_pipe(reader, back))
                group.create_task(_pipe(there, writer))
        self._writers -= {writer, back}


async def _pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while chunk := await reader.read(1 << 16):
            writer.write(chunk)
            await writer.drain()
    writer.close()


def kubeconfig(folder: Path, port: int) -> Path:
    path = folder / "kubeconfig"
    path.write_text(f"""\
apiVersion: v1
kind: Config
current-context: c
contexts: [{{name: c, context: {{cluster: c, user: u, namespace: ns}}}}]
clusters: [{{name: c, cluster: {{server: "http://127.0.0.1:{port}"}}}}]
users: [{{name: u, user: {{token: bearer-token}}}}]
""")
    return path


@asynccontextmanager
async def serving() -> AsyncIterator[tuple[ApiServer, int]]:
    async with ApiServer() as server, Server(server) as listener:
        server.resources["v1/pods"] = {}
        server.resources["inference.networking.k8s.io/v1/inferencepools"] = {}
        yield server, listener.port


@asynccontextmanager
async def benched(
    folder: Path, *pods: dict[str, Any], pool: str | None = None, deadline_s: float = 5.0
) -> AsyncIterator[tuple[Bench, Wire]]:
    (folder / "policy.yaml").write_text(POLICY)
    async with serving() as (server, port):
        for given in pods:
            server.objects[PODS, "ns", given["metadata"]["name"]] = given
        wire = Wire(port)
        await wire.mend()
        environ = {"KUBECONFIG": str(kubeconfig(folder, wire.port))}
        try:
            async with KubeApi(deadline_s=deadline_s, environ=environ) as api, asyncio.TaskGroup() as group:
                bench = Bench(api, server, folder / "policy.yaml", pool)
                task = group.create_task(bench.run())
                try:
                    yield bench, wire
                finally:
                    task.cancel()
        finally:
            await wire.cut()


async def test_pods_come_change_drain_and_go(tmp_path: Path) -> None:
    async with benched(tmp_path, pod("a")) as (bench, _):
        await bench.told("seen picked/a 10.0.0.1:8000")
        await bench.server.put(pod("b", "10.0.0.2", status__conditions=[]))
        await bench.server.put(pod("b", "10.0.0.2"))
        await bench.told("seen picked/b 10.0.0.2:8000")
        await bench.server.put(pod("b", "10.0.0.2", metadata__annotations={"pdcoord.io/port": "9"}))
        await bench.told("seen picked/b 10.0.0.2:9")
        await bench.server.put(pod("a", metadata__deletionTimestamp="2026-01-01T00:00:00Z"))
        await bench.told("draining picked/a")
        await bench.server.remove("a")
        await bench.told("gone picked/a")
        query = bench.server.queries[0]
        assert query == {"labelSelector": "llm-d.ai/inference-serving=true", "limit": "200"}
        assert bench.server.queries[1]["allowWatchBookmarks"] == "true"


async def test_a_pod_that_loses_its_readiness_drains_and_comes_back(tmp_path: Path) -> None:
    async with benched(tmp_path, pod("a")) as (bench, _):
        await bench.told("seen picked/a 10.0.0.1:8000")
        await bench.server.put(pod("a", status__conditions=[{"type": "Ready", "status": "False"}]))
        await bench.told("draining picked/a")
        await bench.server.put(pod("a"))
        await bench.told("seen picked/a 10.0.0.1:8000")


async def test_one_bad_pod_takes_no_other_out(tmp_path: Path) -> None:
    bad = pod("bad", "10.0.0.9", metadata__annotations={"pdcoord.io/kv-port": "many"})
    other = pod("other", "10.0.0.8", metadata__labels={"app": "x"})
    same = pod("same", "10.0.0.1")
    async with benched(tmp_path, bad, other, pod("a"), same) as (bench, _):
        await bench.told("seen picked/a 10.0.0.1:8000")
        shown = "\n".join(str(problem) for problem in bench.feed.warnings)
        assert 'pod ns/bad: has pdcoord.io/kv-port="many", expected a whole number from 1 to 65535' in shown
        assert "pod ns/other: is picked by no pool's selector" in shown
        assert "pod ns/same: has address 10.0.0.1:8000, which pod a has" in shown
        left_out = {reason: count for reason, count in bench.pods.left_out.items() if count}
        assert left_out == {SkipReason.BAD_ANNOTATION: 1, SkipReason.UNPICKED: 1, SkipReason.REPEATED: 1}
        assert bench.feed.problems == {}


@pytest.mark.parametrize("form", ["status", "event", "event in a watch that is open"])
async def test_an_expired_watch_is_listed_anew_and_nothing_flaps(tmp_path: Path, form: str) -> None:
    async with benched(tmp_path, pod("a"), pod("b", "10.0.0.2")) as (bench, wire):
        await bench.told("seen picked/a 10.0.0.1:8000", "seen picked/b 10.0.0.2:8000")
        await bench.until(lambda: bench.server.asked["WATCH pods"] == 1)
        if form == "event in a watch that is open":
            await bench.expire()
        else:
            fault = refusal(410) if form == "status" else lines({"type": "ERROR", "object": expired()})
            bench.server.faults.append(fault)
            # What happens while nobody watches is seen by the list.
            server = bench.server
            del server.objects[PODS, "ns", "b"]
            server.objects[PODS, "ns", "c"] = pod("c", "10.0.0.3")
            await wire.cut()
            await wire.mend()
            await bench.told("gone picked/b", "seen picked/c 10.0.0.3:8000")
        await bench.until(lambda: bench.server.asked["LIST pods"] >= 2)
        await bench.server.put(pod("d", "10.0.0.4"))
        await bench.told("seen picked/d 10.0.0.4:8000")
        assert WatchTrouble.EXPIRED in {why for _, why, _ in bench.troubles}


async def test_a_server_that_is_slow_throttles_fails_or_talks_nonsense_is_asked_again(tmp_path: Path) -> None:
    async with benched(tmp_path, deadline_s=0.5) as (bench, _):
        await bench.until(lambda: bench.server.asked["WATCH pods"] == 1)
        bench.server.faults += [
            refusal(429, Retry_After="1"),
            never,
            refusal(500),
            lines(b"{no json\n"),
            lines(b'{"type": 3}\n'),
            lines(b"[]\n"),
            refusal(403),
        ]
        await bench.expire()
        await bench.until(lambda: not bench.server.faults)
        await bench.server.put(pod("a"))
        await bench.told("seen picked/a 10.0.0.1:8000")
        why = [trouble for _, trouble, _ in bench.troubles]
        assert why[:4] == [
            WatchTrouble.EXPIRED,
            WatchTrouble.THROTTLED,
            WatchTrouble.TIMEOUT,
            WatchTrouble.STATUS,
        ]
        assert {WatchTrouble.UNREADABLE, WatchTrouble.DENIED} <= set(why)
        assert any("told 403" in detail for _, _, detail in bench.troubles)


async def test_a_server_that_is_gone_leaves_the_last_state_in_force(tmp_path: Path) -> None:
    async with benched(tmp_path, pod("a")) as (bench, wire):
        await bench.told("seen picked/a 10.0.0.1:8000")
        await bench.until(lambda: bench.server.asked["WATCH pods"] == 1)
        await wire.cut()
        await bench.until(lambda: WatchTrouble.UNREACHABLE in {why for _, why, _ in bench.troubles})
        assert bench.recorder.told == []
        (follower,) = bench.pods.followers
        silent_s = follower.silent_s()
        assert silent_s is not None
        await bench.until(lambda: (follower.silent_s() or 0.0) > silent_s)
        bench.server.objects[PODS, "ns", "b"] = pod("b", "10.0.0.2")
        await wire.mend()
        await bench.told("seen picked/b 10.0.0.2:8000")


async def test_lists_are_read_page_by_page(tmp_path: Path) -> None:
    def page(name: str, ip: str, rest: str) -> Fault:
        async def answer(request: Any) -> aiohttp.web.StreamResponse:
            body = {"metadata": {"resourceVersion": "9", "continue": rest}, "items": [pod(name, ip), 3]}
            return aiohttp.web.json_response(body)

        return answer

    async with benched(tmp_path, deadline_s=5.0) as (bench, _):
        bench.server.faults += [page("a", "10.0.0.1", "more"), page("b", "10.0.0.2", "")]
        await bench.told("seen picked/a 10.0.0.1:8000", "seen picked/b 10.0.0.2:8000")
        assert [query.get("continue") for query in bench.server.queries[:2]] == [None, "more"]


def inference_pool(ports: list[int], **labels: str) -> dict[str, Any]:
    return {
        "metadata": {"name": "fleet", "namespace": "ns"},
        "spec": {
            "selector": {"matchLabels": labels},
            "targetPorts": [{"number": port} for port in ports],
            "endpointPickerRef": {"name": "picker"},
        },
    }


async def test_an_inference_pool_gives_selector_and_ports(tmp_path: Path) -> None:
    async with benched(tmp_path, pod("a"), pool="fleet") as (bench, _):
        await bench.until(lambda: bool(bench.feed.problems))
        assert "InferencePool ns/fleet: does not exist" in str(next(iter(bench.feed.problems.values()))[0])
        await bench.server.put(inference_pool([8000, 8001], app="x"), POOLS)
        await bench.told("seen picked/a_0 10.0.0.1:8000", "seen picked/a_1 10.0.0.1:8001")
        assert bench.feed.problems == {}
        asked = [query["labelSelector"] for query in bench.server.queries if "labelSelector" in query]
        assert set(asked) == {"app=x"}
        await bench.server.put(inference_pool([9000], app="x"), POOLS)
        await bench.until(lambda: "seen picked/a 10.0.0.1:9000" in bench.recorder.told)
        assert sorted(bench.recorder.told[:2]) == ["gone picked/a_0", "gone picked/a_1"]
        bench.recorder.told.clear()
        await bench.server.put(inference_pool([], app="x"), POOLS)
        await bench.until(lambda: bool(bench.feed.problems))
        (problem,) = next(iter(bench.feed.problems.values()))
        assert "spec.targetPorts" in str(problem)
        assert "last terms stay in force" in str(problem)
        await bench.server.put(inference_pool([9000], app="y"), POOLS)
        await bench.until(lambda: bench.server.queries[-1].get("labelSelector") == "app=y")
        assert bench.recorder.told == []


async def test_a_token_that_is_refused_is_read_again(tmp_path: Path) -> None:
    async with serving() as (server, port):
        path = kubeconfig(tmp_path, port)
        of = Collection("", "v1", "pods", "ns")
        async with KubeApi(environ={"KUBECONFIG": str(path)}) as api:
            server.faults.append(refusal(401))
            with pytest.raises(KubeError) as caught:
                await api.list_page(of, size=5)
            assert caught.value.trouble is WatchTrouble.DENIED
            assert "bearer-token" not in str(caught.value)
            path.write_text(path.read_text().replace("bearer-token", "other-token"))
            server.faults.append(refusal(401))
            with pytest.raises(KubeError):
                await api.list_page(of, size=5)
            await api.list_page(of, size=5)
        tokens = [request.headers.get("Authorization") for request in server[action.LIST]]
        assert tokens == ["Bearer bearer-token", "Bearer bearer-token", "Bearer other-token"]
