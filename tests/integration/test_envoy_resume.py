"""Streams behind a real Envoy outlive the engine that they began on: the sidecar goes on elsewhere."""

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub

from pdcoord.sim.ports import free_ports

ROOT = Path(__file__).resolve().parent.parent.parent
ENVOY = Path(sys.executable).with_name("envoy")
MODEL = "demo/llama-8b"
WAIT_S = 90.0
DECODES = ("decode-0", "decode-1")
MAIN = "import sys; from {} import main; sys.exit(main())"
COMMANDS = {"pdcoord": "pdcoord.cli", "pdcoord-sidecar": "sidecar.main"}
SPEED = {"prefill_base_ms": 1, "prefill_ms_per_token": 0.002, "step_base_ms": 12}
SLOW = {"prefill_base_ms": 1, "prefill_ms_per_token": 2.0, "step_base_ms": 12}
TOKENS = 120
EJECTED = "cluster.model_servers.outlier_detection.ejections_active"

pytestmark = [
    pytest.mark.skipif(not ENVOY.exists(), reason="needs envoy: pip install 'pdcoord[dev]'"),
    pytest.mark.timeout(300),  # Of the first one all processes' starts are a part.
]


@dataclass
class Stream:
    """What a client got of one stream."""

    status: int
    chunks: list[Any] = field(default_factory=list)
    is_done: bool = False

    @property
    def text(self) -> str:
        said = [choice for chunk in self.chunks for choice in chunk["choices"]]
        return "".join(choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in said)


@dataclass
class Site:
    """All processes of a small deployment, each of which can be killed and started again."""

    folder: Path
    ports: dict[str, int]
    commands: dict[str, list[str]] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def address(self, name: str) -> str:
        return f"127.0.0.1:{self.ports[name]}"

    def start(self, name: str) -> None:
        program, *words = self.commands[name]
        command = [program, *words]
        if program in COMMANDS:
            command = [sys.executable, "-c", MAIN.format(COMMANDS[program]), *words]
        with (self.folder / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self.environment},
            )

    def kill(self, name: str) -> None:
        self.running[name].kill()
        self.running.pop(name).wait()

    def make_whole(self) -> None:
        """Start whatever does not run, and wait until all of it serves."""
        for name in ("prefill", *(f"engine-{each}" for each in DECODES), *DECODES, "picker", "envoy"):
            if name not in self.running:
                self.start(name)
        for name in list(self.running):
            self.until(name, partial(self.is_well, name))

    def is_well(self, name: str) -> bool:
        if name == "picker":
            with grpc.insecure_channel(self.address("health")) as channel, suppress(grpc.RpcError, OSError):
                check = health_pb2.HealthCheckRequest(service="readiness")
                is_ready = HealthStub(channel).Check(check, timeout=2.0).status == 1
                # An engine that is back serves sooner than the picker looks at it again, and what the
                # picker finds dead no plan names for a stream to go on at.
                return is_ready and set(self.health()) == {"ready"}
            return False
        path = "/readyz" if name == "envoy" else "/health"
        with suppress(OSError, http.client.HTTPException):
            is_up = self.get(path, name)[0] == 200
            # Whom Envoy found dead it leaves out for some seconds after it is back.
            return is_up and (name != "envoy" or self.ejected_count() == 0)
        return False

    def health(self) -> list[str]:
        """Of each endpoint, as the picker has it."""
        endpoints = json.loads(self.get("/fleet", "picker-admin")[1])["endpoints"]
        return [each["health"] for each in endpoints]

    def ejected_count(self) -> int:
        return int(self.get(f"/stats?filter=^{EJECTED}$", "admin")[1].decode().partition(":")[2] or 0)

    def until(self, name: str, is_so: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + WAIT_S
        while not is_so():
            log = (self.folder / f"{name}.log").read_text(errors="replace")[-4_000:]
            assert self.running[name].poll() is None, f"{name} ended:\n{log}"
            assert time.monotonic() < deadline_s, f"{name} is not as it should be:\n{log}"
            time.sleep(0.05)

    def get(self, path: str, at: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.ports[at], timeout=WAIT_S)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def stream(
        self, path: str, body: dict[str, Any], *, at: str = "envoy", after: int = 0, do: Callable[[], None]
    ) -> Stream:
        """Read a stream to its end, and do something after so many chunks."""
        connection = http.client.HTTPConnection("127.0.0.1", self.ports[at], timeout=WAIT_S)
        try:
            raw = json.dumps({"model": MODEL, "stream": True, "max_tokens": TOKENS, "temperature": 0, **body})
            connection.request("POST", path, raw.encode(), {"content-type": "application/json"})
            response = connection.getresponse()
            told = Stream(response.status)
            while line := response.readline():
                if line.startswith(b"data: [DONE]"):
                    told.is_done = True
                elif line.startswith(b"data: "):
                    told.chunks.append(json.loads(line.removeprefix(b"data: ")))
                    if len(told.chunks) == after:
                        do()
            return told
        finally:
            connection.close()

    def metric(self, name: str, line: str) -> float:
        """A sample of a sidecar."""
        rows = self.get("/metrics", f"metrics-{name}")[1].decode().splitlines()
        found = [row for row in rows if row.startswith(f"pdcoord_sidecar_{line} ")]
        return float(found[0].rpartition(" ")[2]) if found else 0.0

    def serving(self) -> str:
        """The decode endpoint whose engine has the only stream."""
        pages = {name: self.get("/metrics", f"engine-{name}")[1].decode().splitlines() for name in DECODES}
        (name,) = [
            name
            for name, rows in pages.items()
            for row in rows
            if row.startswith("vllm:num_requests_running") and float(row.rpartition(" ")[2]) > 0
        ]
        return name

    def end(self) -> None:
        for process in self.running.values():
            process.send_signal(signal.SIGCONT)
            process.terminate()
        for process in self.running.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(10.0)
            process.kill()
            process.wait()


def dump(path: Path, document: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump({"apiVersion": "pdcoord.io/v1alpha1", **document}, sort_keys=False))


def lay_out(folder: Path) -> Site:
    names = ["prefill", "side", "picker", "health", "metrics", "picker-admin", "envoy", "admin"]
    names += [f"{kind}{name}" for name in DECODES for kind in ("", "engine-", "metrics-")]
    site = Site(folder, dict(zip(names, free_ports(len(names)), strict=True)))
    ports = site.ports
    prefill = {"profile": "intel-gaudi3-8b", "role": "prefill", "side_channel_port": ports["side"]}
    lay_engine(site, "prefill", prefill)
    for name in DECODES:
        lay_engine(site, f"engine-{name}", {"profile": "amd-mi300x-8b", "role": "decode"})
        peers = [f"{site.address(other)}/decode" for other in DECODES if other != name]
        site.commands[name] = [
            *("pdcoord-sidecar", "--host", "127.0.0.1", "--port", str(ports[name]), "--metrics-port"),
            *(str(ports[f"metrics-{name}"]), "--engine", site.address(f"engine-{name}")),
            *("--allow", ",".join([site.address("prefill"), *peers])),
        ]
    dump(folder / "policy.yaml", policy(site))
    site.commands["picker"] = [
        *("pdcoord", "extproc", f"--policy={folder / 'policy.yaml'}", "--no-secure-serving"),
        *(f"--grpc-port={ports['picker']}", f"--grpc-health-port={ports['health']}"),
        f"--metrics-port={ports['metrics']}",
    ]
    site.environment = {"PDCOORD_ADMIN_PORT": str(ports["picker-admin"]), "PDCOORD_DRAIN_NOTICE_S": "0"}
    (folder / "envoy.yaml").write_text(yaml.safe_dump(configuration(site), sort_keys=False))
    site.commands["envoy"] = [str(ENVOY), "-c", str(folder / "envoy.yaml"), "--use-dynamic-base-id"]
    site.commands["envoy"] += ["--concurrency", "1"]
    return site


def lay_engine(site: Site, name: str, more: dict[str, Any]) -> None:
    """Each in a process of its own, so that one can be killed."""
    engine = {"name": name, "speed": SPEED, "port": site.ports[name], "context_tokens_max": 8_192, **more}
    dump(
        site.folder / f"{name}.yaml",
        {"kind": "EmulatedFleet", "seed": 7, "model": MODEL, "engines": [engine]},
    )
    site.commands[name] = ["pdcoord", "emulate", str(site.folder / f"{name}.yaml")]


def policy(site: Site) -> dict[str, Any]:
    def pool(name: str, vendor: str, preset: str, endpoints: list[str], **more: Any) -> dict[str, Any]:
        return {
            "name": name,
            "role": name,
            "vendor": vendor,
            "engine": "vllm",
            "connector": "pdcoord",
            "layout": {"preset": preset},
            "kv_bytes_per_token": 131_072,
            "link_gbit_per_s": 100,
            "endpoints": [{"name": each, "address": site.address(each)} for each in endpoints],
            "limits": {"context_tokens_max": 8_192},
            **more,
        }

    return {
        "kind": "PoolPolicy",
        "metadata": {"name": "demo"},
        "model": {"name": MODEL},
        "pools": [
            pool("prefill", "intel-gaudi", "intel-gaudi", ["prefill"], speed=SPEED),
            # Believed slow, so that a long prompt is worth a split.
            pool("decode", "amd", "amd-aiter-unified", list(DECODES), speed=SLOW),
        ],
        "disaggregation": {"mode": "always"},
        # Nobody is put out here: whoever is stands behind all others where a stream may go on.
        "fallback": {"resume": {"stall_ms_min": 1_500}, "quarantine": {"share_max": 0}},
        # Requests are counted here, and the first one is to be split.
        "canary": {"mode": "off"},
    }


def configuration(site: Site) -> dict[str, Any]:
    """deploy/envoy's own file with this place's addresses."""
    text: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "envoy" / "envoy.yaml").read_text())
    resources = text["static_resources"]
    text["admin"]["address"]["socket_address"] = socket_address(site, "admin")
    (listener,) = resources["listeners"]
    listener["address"]["socket_address"] = socket_address(site, "envoy")
    clusters = {each["name"]: each for each in resources["clusters"]}
    for cluster, members in {"picker": ["picker"], "model_servers": list(DECODES)}.items():
        endpoints: list[dict[str, Any]] = [
            {"address": {"socket_address": socket_address(site, member)}} for member in members
        ]
        if cluster == "picker":
            endpoints[0]["health_check_config"] = {"port_value": site.ports["health"]}
        clusters[cluster]["load_assignment"]["endpoints"] = [
            {"lb_endpoints": [{"endpoint": each} for each in endpoints]}
        ]
    return text


def socket_address(site: Site, name: str) -> dict[str, Any]:
    return {"address": "127.0.0.1", "port_value": site.ports[name]}


@pytest.fixture(scope="module")
def whole_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = lay_out(tmp_path_factory.mktemp("site"))
    try:
        yield site
    finally:
        site.end()


@pytest.fixture
def site(whole_site: Site) -> Site:
    whole_site.make_whole()
    return whole_site


def nothing() -> None:
    pass


CALLS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "word " * 1_500},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "word " * 1_500}]},
}


@pytest.mark.parametrize(("path", "has_ids"), [("/v1/completions", False), ("/v1/chat/completions", True)])
def test_a_stream_outlives_the_engine_beneath_its_sidecar(site: Site, path: str, *, has_ids: bool) -> None:
    """kill -9 in mid-stream: the client has one stream, with the very tokens of one that nobody disturbed."""
    body = dict(CALLS[path])
    if has_ids:  # Else a text is made tokens of anew, and their count may differ from what was generated.
        body |= {"return_token_ids": True, "stream_options": {"include_usage": True}}
    undisturbed = site.stream(path, body, do=nothing)
    assert undisturbed.is_done
    killed: list[str] = []

    def kill() -> None:
        killed.append(site.serving())
        site.kill(f"engine-{killed[0]}")

    told = site.stream(path, body, after=40, do=kill)
    check(told, undisturbed)
    assert site.metric(killed[0], 'resumes_total{outcome="ok",reason="decode-error"}') >= 1


def test_a_stream_outlives_an_engine_that_hangs(site: Site) -> None:
    """SIGSTOP: its connections are up and it says nothing; found by progress."""
    undisturbed = site.stream("/v1/completions", CALLS["/v1/completions"], do=nothing)
    stopped: list[str] = []

    def stop() -> None:
        stopped.append(f"engine-{site.serving()}")
        site.running[stopped[0]].send_signal(signal.SIGSTOP)

    try:
        told = site.stream("/v1/completions", CALLS["/v1/completions"], after=40, do=stop)
    finally:
        site.running[stopped[0]].send_signal(signal.SIGCONT)
    check(told, undisturbed)
    name = stopped[0].removeprefix("engine-")
    assert site.metric(name, 'resumes_total{outcome="ok",reason="decode-stalled"}') == 1


def check(told: Stream, undisturbed: Stream) -> None:
    assert (told.status, told.is_done) == (200, True), told.chunks[-1:]
    assert told.text == undisturbed.text
    assert len({chunk["id"] for chunk in told.chunks}) == 1
    reasons, expected = (
        [
            choice["finish_reason"]
            for chunk in stream.chunks
            for choice in chunk["choices"]
            if choice["finish_reason"]
        ]
        for stream in (told, undisturbed)
    )
    assert reasons == expected
    usages, expected_usages = (
        [
            (chunk["usage"]["prompt_tokens"], chunk["usage"]["completion_tokens"])
            for chunk in stream.chunks
            if chunk.get("usage")
        ]
        for stream in (told, undisturbed)
    )
    assert usages == expected_usages
    ids, expected_ids = (
        [
            each
            for chunk in stream.chunks
            for choice in chunk["choices"]
            for each in choice.get("token_ids") or ()
        ]
        for stream in (told, undisturbed)
    )
    assert ids == expected_ids
