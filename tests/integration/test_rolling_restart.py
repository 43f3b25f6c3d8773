"""Every part is restarted in turn under thirty streams, and no client sees more than a pause."""

import asyncio
import json
import random
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pdcoord.protocol.headers import HostPort
from pdcoord.sim.demo.processes import Processes
from pdcoord.sim.ports import free_ports
from pdcoord.wire.client import Client
from pdcoord.wire.errors import WireError

pytestmark = pytest.mark.timeout(400)

MODEL = "demo/llama-8b"
STREAMS = 30
OUTPUT_TOKENS = 60
STEP_MS = 20
WAIT_S = 60.0
# As a pod's grace period: longer than a stream takes.
GRACE_S = 60.0
# Past the grace period: what ends a prefill engine in time is neither the end of its patience nor of a lease.
PATIENCE_S, LEASE_S = 100, 120
# Longer than a client may take from asking for readiness to connecting.
NOTICE_S = 3
# Taken because a prefill pod or what it held was gone. Those for lateness are a busy machine's.
LOST = ("prefill-unreachable", "prefill-error", "prefill-no-ticket", "transfer-failed")
SPEED = {"prefill_base_ms": 2, "prefill_ms_per_token": 0.02, "step_base_ms": STEP_MS}
PREFILLS, DECODES, GATEWAYS = (
    tuple(f"{kind}-{index}" for index in range(2)) for kind in ("pre", "dec", "gw")
)
HEAD = {"apiVersion": "pdcoord.io/v1alpha1"}
JSON = [(b"content-type", b"application/json")]
# Greedy, so that what is lost is lost by the restart: with ignore_eos a token may have no text, and from text
# alone drawn ones are not continued then.
ASKED = {"model": MODEL, "ignore_eos": True, "temperature": 0}
Counts = dict[tuple[str, str], float]


@dataclass
class Link:
    """One connection to a gateway."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    @classmethod
    async def to(cls, address: HostPort) -> "Link":
        host, _, port = address.rpartition(":")
        return cls(*await asyncio.open_connection(host, int(port), limit=1 << 20))

    @property
    def is_open(self) -> bool:
        return not self.reader.at_eof() and not self.writer.is_closing()

    async def close(self) -> None:
        self.writer.close()
        with suppress(OSError):
            async with asyncio.timeout(WAIT_S):
                await self.writer.wait_closed()

    async def exchange(self, body: bytes, *, keeps: bool) -> tuple[bytes, bytes, str]:
        """Send a call once; head and body of the answer, and how it was cut short if it was."""
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
        head += "content-type: application/json\r\n" + ("" if keeps else "connection: close\r\n")
        told = raw = b""
        try:
            async with asyncio.timeout(WAIT_S):
                self.writer.write(head.encode() + b"\r\n" + body)
                told = (await self.reader.readuntil(b"\r\n\r\n")).lower()
                if b"transfer-encoding: chunked" not in told:
                    length = int(told.partition(b"content-length: ")[2].partition(b"\r\n")[0])
                    return told, await self.reader.readexactly(length), ""
                while size := int((await self.reader.readuntil(b"\r\n")), 16):
                    raw += (await self.reader.readexactly(size + 2))[:-2]
                await self.reader.readexactly(2)
        except (OSError, asyncio.IncompleteReadError) as error:
            has_begun = told or getattr(error, "partial", b"")
            return told, raw, f"broken off: {raw[-300:]!r}" if has_begun else "reset"
        return told, raw, ""


@dataclass
class Part:
    """One process that is restarted."""

    command: list[str]
    address: HostPort
    path: str
    env: dict[str, str] = field(default_factory=dict)
    metrics: HostPort | None = None


@dataclass
class Site:
    """All parts, and how many streams have come whole.

    Attributes:
        rounds: of each client, the streams that it has had.
        refusals: connections that a gateway refused while it was restarted, whose call the other one got.
        restarted: the part that is away.
    """

    folder: Path
    processes: Processes
    client: Client
    parts: dict[str, Part]
    outcomes: Counter[str] = field(default_factory=Counter)
    rounds: Counter[int] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    restarted: str = ""
    is_over: bool = False

    async def start(self, name: str) -> None:
        part = self.parts[name]
        await self.processes.start(name, part.command, part.env)
        await self.processes.wait_ready(name, part.address, part.path, self.client)

    async def get(self, address: HostPort, path: str) -> tuple[int, bytes]:
        with suppress(WireError):
            async with await self.client.request("GET", address, path, head_timeout_s=5.0) as response:
                return response.status, await response.read_all(timeout_s=5.0)
        return 0, b""

    async def healths(self) -> list[dict[str, str]]:
        """Of each gateway, what it finds each endpoint to be."""
        found = []
        for name in GATEWAYS:
            admin = HostPort(f"127.0.0.1:{self.parts[name].env['PDCOORD_ADMIN_PORT']}")
            _, raw = await self.get(admin, "/fleet")
            rows = json.loads(raw)["endpoints"] if raw else []
            found.append({row["address"]: row["health"] for row in rows})
        return found

    async def until_healths(self, are_so: Callable[[dict[str, str]], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not all(are_so(each) for each in await self.healths()):  # a process sets no event
                await asyncio.sleep(0.1)

    async def until_settled(self) -> None:
        """Both gateways find every endpoint ready."""
        wanted = len(PREFILLS) + len(DECODES)
        await self.until_healths(lambda found: list(found.values()) == ["ready"] * wanted)

    async def until_served(self, streams: int) -> None:
        wanted = self.outcomes.total() + streams
        async with asyncio.timeout(WAIT_S):
            while self.outcomes.total() < wanted:  # clients set no event
                await asyncio.sleep(0.05)

    async def until_all_have_begun_anew(self) -> None:
        before = Counter(self.rounds)
        async with asyncio.timeout(WAIT_S):
            while any(self.rounds[index] == before[index] for index in range(STREAMS)):
                await asyncio.sleep(0.05)

    async def post(self, name: str, **fields: Any) -> dict[str, Any]:
        """What one engine itself answers."""
        body = json.dumps({**ASKED, **fields}).encode()
        async with await self.client.request(
            "POST",
            self.parts[name].address,
            "/v1/completions",
            headers=JSON,
            body=body,
            head_timeout_s=WAIT_S,
        ) as response:
            answer: dict[str, Any] = json.loads(await response.read_all(timeout_s=WAIT_S))
            assert response.status == 200, answer
            return answer

    async def leases(self, name: str) -> list[str]:
        status, raw = await self.get(self.parts[name].address, "/emulator/state")
        assert status == 200
        return [lease["request_id"] for lease in json.loads(raw)["leases"]]

    async def lost(self) -> Counts:
        """What tells that a prefill or its KV was lost, of all engines and sidecars."""
        found: Counts = {}
        for name in (*PREFILLS, *DECODES, *(f"sidecar-{each}" for each in DECODES)):
            part = self.parts[name]
            status, raw = await self.get(part.metrics or part.address, "/metrics")
            assert status == 200, name
            for line in raw.decode().splitlines():
                series, _, value = line.rpartition(" ")
                if line.startswith("#"):
                    continue
                is_rung = "rungs_total{" in series and any(f'"{each}"' in series for each in LOST)
                if is_rung or "failed_transfers_total" in series or "kv_expired_reqs_total" in series:
                    found[name, series] = float(value)
        return found

    async def alone(self, prompt: str) -> str:
        """What the model answers, undisturbed: of a prefill engine, asked whole."""
        answer = await self.post("reference", prompt=prompt, max_tokens=OUTPUT_TOKENS)
        text: str = answer["choices"][0]["text"]
        return text

    async def restart(self, name: str) -> int:
        """As a Deployment does it with a pod; the status that the old process ended with."""
        self.restarted = name
        before = await self.lost()
        if name in PREFILLS:
            status = await self.end_prefill(name, before)
        else:
            status = await self.processes.terminate(name, GRACE_S)
        await self.start(name)
        write_endpoints(self.folder, self.parts)
        await self.until_settled()
        if name in PREFILLS:
            left = {key: value for key, value in before.items() if key[0] != name}
            assert not rise(left, await self.lost()), "a prefill pod's end cost somebody a prefill"
        self.restarted = ""
        return status

    async def end_prefill(self, name: str, before: Counts) -> int:
        """Readiness first, exit last: it waits for KV that somebody is still to fetch."""
        address = self.parts[name].address
        write_endpoints(self.folder, self.parts, draining=name)
        await self.until_healths(lambda found: found.get(address) == "draining")
        await self.until_all_have_begun_anew()  # What had been sent here is over: a pod's preStop sleep.
        prompt = f"{name} " * 200
        asked = {"do_remote_decode": True}
        prefilled = await self.post(name, prompt=prompt, max_tokens=1, kv_transfer_params=asked)
        (held,) = await self.leases(name)
        process = self.processes[name]
        process.handle.send_signal(signal.SIGTERM)
        async with asyncio.timeout(WAIT_S):
            while not await self.refuses(name):
                await asyncio.sleep(0.05)  # a signal takes a moment
        await self.until_served(STREAMS // 2)
        assert not process.has_ended, "it has left what somebody is still to fetch"
        assert await self.leases(name) == [held]
        assert not rise(before, await self.lost()), "none of its leases has run out"
        ticket = prefilled["kv_transfer_params"]
        fetched = await self.post(
            DECODES[0], prompt=prompt, max_tokens=OUTPUT_TOKENS, kv_transfer_params=ticket
        )
        async with asyncio.timeout(GRACE_S):
            status = await process.handle.wait()
        assert fetched["choices"][0]["text"] == await self.alone(prompt)
        return status

    async def refuses(self, name: str) -> bool:
        """Whether an engine has been told to stop: it is healthy, and takes no new work."""
        answer = await self.post(name, prompt="x", max_tokens=1)
        is_refused: bool = answer["choices"][0]["finish_reason"] == "abort"
        return is_refused

    async def ready_gateway(self, rng: random.Random) -> HostPort:
        """As a Service does it: any gateway whose readiness says so."""
        while True:
            for name in rng.sample(GATEWAYS, len(GATEWAYS)):
                status, _ = await self.get(self.parts[name].address, "/readyz")
                if status == 200:
                    return self.parts[name].address
            await asyncio.sleep(0.05)

    async def run_client(self, index: int) -> None:
        """Stream after stream until the restarts are over; every other client keeps its connections."""
        rng = random.Random(index)
        links: dict[HostPort, Link] | None = {} if index % 2 else None
        try:
            while not self.is_over:
                prompt = f"{rng.getrandbits(64):x} " + "word " * rng.randrange(20, 400)
                text, error = await self.stream(await self.ready_gateway(rng), prompt, links)
                self.outcomes[error or "whole"] += 1
                self.rounds[index] += 1
                if not error and text != await self.alone(prompt):
                    self.wrong.append(prompt[:20])
        finally:
            for link in (links or {}).values():
                await link.close()

    async def connect(self, gateway: HostPort) -> tuple[HostPort, Link | None]:
        """A connection, to the other gateway if this one is away and refuses: a balancer's next try, once."""
        with suppress(ConnectionRefusedError):
            return gateway, await Link.to(gateway)
        name, other = sorted(GATEWAYS, key=lambda each: self.parts[each].address != gateway)
        if name != self.restarted:
            return gateway, None
        self.refusals[name] += 1
        with suppress(ConnectionRefusedError):
            return self.parts[other].address, await Link.to(self.parts[other].address)
        return gateway, None

    async def stream(
        self, gateway: HostPort, prompt: str, links: dict[HostPort, Link] | None
    ) -> tuple[str, str]:
        """Its text, and what was wrong; a call is sent once.

        Args:
            links: connections that are kept; None for a fresh one.
        """
        link = links.pop(gateway, None) if links else None
        if link is not None and not link.is_open:
            await link.close()
            link = None
        if link is None:
            gateway, link = await self.connect(gateway)
        if link is None:
            return "", "refused"
        keeps = False
        try:
            body = {**ASKED, "prompt": prompt, "max_tokens": OUTPUT_TOKENS, "stream": True}
            told, raw, error = await link.exchange(json.dumps(body).encode(), keeps=links is not None)
            keeps = links is not None and not error and b"connection: close" not in told
        finally:
            if not keeps:
                await link.close()
        if keeps and links is not None:
            links[gateway] = link
        if error or not told.startswith(b"http/1.1 200 "):
            return "", error or f"{told[:40]!r} {raw[:200]!r}"
        return read_stream(raw)


def rise(before: Counts, after: Counts) -> Counts:
    """What has grown; a process that was started anew counts from nought."""
    return {key: value for key, value in after.items() if value > before.get(key, 0.0)}


def read_stream(raw: bytes) -> tuple[str, str]:
    """The text of a stream, and what is wrong with it."""
    events = [line[6:] for line in raw.split(b"\n") if line.startswith(b"data: ")]
    if not events or events[-1] != b"[DONE]":
        return "", f"no end: {events[-1:]!r}"[:200]
    chunks = [msgspec.json.decode(event) for event in events[:-1]]
    if len({chunk.get("id") for chunk in chunks}) != 1:
        return "", f"several ids, or an error: {chunks[-1]}"[:200]
    return "".join(chunk["choices"][0]["text"] for chunk in chunks), ""


def lay_out(folder: Path) -> dict[str, Part]:
    names = ["reference", *PREFILLS, *DECODES]
    ports = iter(free_ports(2 * len(names) + 2 * len(DECODES) + 2 * len(GATEWAYS)))
    engines = {name: (next(ports), next(ports)) for name in names}
    sidecars = {name: (next(ports), next(ports)) for name in DECODES}
    gateways = {name: (next(ports), next(ports)) for name in GATEWAYS}
    fleet = [
        {
            "name": name,
            "profile": "nvidia-h100-8b",
            "role": {"pre": "prefill", "dec": "decode"}.get(name[:3], "both"),
            "port": port,
            "side_channel_port": side,
            "speed": SPEED,
            **({"shutdown_timeout_s": PATIENCE_S, "lease_s": LEASE_S} if name in PREFILLS else {}),
        }
        for name, (port, side) in engines.items()
    ]
    write(folder / "fleet.yaml", {"kind": "EmulatedFleet", "seed": 3, "model": MODEL, "engines": fleet})
    write(folder / "policy.yaml", policy(sidecars))
    parts = {
        name: Part(["pdcoord", "emulate", str(folder / "fleet.yaml"), "--engine", name], at(port), "/health")
        for name, (port, _) in engines.items()
    }
    for name, (port, metrics) in sidecars.items():
        command = [
            "pdcoord-sidecar",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--metrics-port",
            str(metrics),
        ]
        allowed = ",".join(at(engines[each][0]) for each in PREFILLS)
        command += ["--engine", at(engines[name][0]), "--allow", allowed]
        parts[f"sidecar-{name}"] = Part(command, at(port), "/health", metrics=at(metrics))
    for name, (port, admin) in gateways.items():
        env = {
            "PDCOORD_PORT": str(port),
            "PDCOORD_ADMIN_PORT": str(admin),
            "PDCOORD_POLICY": str(folder / "policy.yaml"),
            "PDCOORD_ENDPOINTS": str(folder / "endpoints.yaml"),
            "PDCOORD_DRAIN_NOTICE_S": str(NOTICE_S),
        }
        parts[name] = Part(["pdcoord", "serve"], at(port), "/livez", env)
    write_endpoints(folder, parts)
    return parts


def write_endpoints(folder: Path, parts: dict[str, Part], draining: str = "") -> None:
    """The prefill pods as an API server tells of them; one may be on its way out."""
    endpoints = [
        {"name": name, "address": parts[name].address, "labels": {"pool": "prefill"}, "is_draining": True}
        if name == draining
        else {"name": name, "address": parts[name].address, "labels": {"pool": "prefill"}}
        for name in PREFILLS
    ]
    write(folder / "endpoints.new", {"kind": "Endpoints", "endpoints": endpoints})
    (folder / "endpoints.new").replace(folder / "endpoints.yaml")


def at(port: int) -> HostPort:
    return HostPort(f"127.0.0.1:{port}")


def policy(sidecars: dict[str, tuple[int, int]]) -> dict[str, Any]:
    decodes = [{"name": str(i), "address": at(port)} for i, (port, _) in enumerate(sidecars.values())]

    def pool(role: str, **who: Any) -> dict[str, Any]:
        return {
            "name": role,
            "role": role,
            "vendor": "v",
            "engine": "vllm",
            "connector": "pdcoord",
            "layout": {"block_tokens": 16},
            "kv_bytes_per_token": 131_072,
            "link_gbit_per_s": 400,
            "speed": SPEED,
            **who,
        }

    return {
        "kind": "PoolPolicy",
        "metadata": {"name": "rolling"},
        "model": {"name": MODEL},
        "disaggregation": {"mode": "always"},
        # A second attempt that is cancelled leaves a lease that nobody comes for.
        "fallback": {"hedge": {"share_max": 0}},
        "pools": [
            pool("prefill", selector={"match_labels": {"pool": "prefill"}}),
            pool("decode", endpoints=decodes),
        ],
    }


def write(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps({**HEAD, **document}))


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with Client() as client, Processes(tmp_path) as processes:
        made = Site(tmp_path, processes, client, lay_out(tmp_path))
        for name in made.parts:
            await made.start(name)
        await made.until_settled()
        yield made


async def test_a_rolling_restart_of_all_parts_loses_nothing(site: Site) -> None:
    statuses: dict[str, int] = {}
    async with asyncio.TaskGroup() as group:
        for index in range(STREAMS):
            group.create_task(site.run_client(index))
        try:
            for name in [each for each in site.parts if each != "reference"]:
                statuses[name] = await site.restart(name)
                await site.until_served(STREAMS // 2)
        finally:
            site.is_over = True
    assert set(site.outcomes) == {"whole"}, site.outcomes
    assert site.wrong == []
    # Only who had asked for readiness just before; whoever asks later is sent to the other one.
    assert all(count <= STREAMS for count in site.refusals.values()), site.refusals
    assert set(statuses.values()) == {0}, statuses
