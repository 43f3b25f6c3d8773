"""A demo fleet scraped by a real Prometheus and traced by a real OTLP collector's protocol.

Every alert expression and every dashboard query is evaluated over what a running fleet shows, and one
request's spans are followed from the gateway through both engine legs by one trace id.
"""

import asyncio
import gzip
import json
import re
import shutil
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import pytest_asyncio
import yaml
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from pdcoord.protocol.headers import HostPort
from pdcoord.runtime.metricspec import bound_of
from pdcoord.sim.demo.deployment import Deployment, lay_out
from pdcoord.sim.demo.processes import Processes
from pdcoord.sim.ports import free_ports
from pdcoord.wire.client import Client
from pdcoord.wire.errors import WireError

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "monitoring"
WAIT_S = 60.0
POLL_S = 0.2
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
CLIENT_SPAN = "b7ad6b7169203331"
# In a healthy demo these have nothing to show: no failure, no line, no SGLang, no such connector or probe,
# no certificate.
MAY_BE_EMPTY = re.compile(
    r"sglang:|vllm:pdcoord_|vllm:nixl|path_bandwidth|path_latency|path_degraded|path_usable|probes_total"
    r"|rungs_total|waiting|wait_seconds|shed_total|prefix_tokens|tokenized|health!=|refusals_total"
    r"|scrape_failures|quarantined_endpoints|certificate_"
)
pytestmark = [pytest.mark.timeout(240), pytest.mark.asyncio(loop_scope="module")]


@dataclass(frozen=True)
class SeenSpan:
    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    attributes: dict[str, Any]
    events: tuple[str, ...]
    began_ns: int
    ended_ns: int


@dataclass
class Collector:
    """Takes OTLP over HTTP."""

    port: int = 0
    spans: list[SeenSpan] = field(default_factory=list)

    def take(self, raw: bytes) -> None:
        request = ExportTraceServiceRequest.FromString(raw)
        for resource in request.resource_spans:
            service = next(
                a.value.string_value for a in resource.resource.attributes if a.key == "service.name"
            )
            for scope in resource.scope_spans:
                self.spans += [self._span(service, span) for span in scope.spans]

    def _span(self, service: str, span: Any) -> SeenSpan:
        values = {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes}
        return SeenSpan(
            service,
            span.name,
            span.trace_id.hex(),
            span.span_id.hex(),
            span.parent_span_id.hex(),
            values,
            tuple(event.name for event in span.events),
            span.start_time_unix_nano,
            span.end_time_unix_nano,
        )


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                raw = gzip.decompress(raw)
            collector.take(raw)
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        collector.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield collector
        server.shutdown()
        thread.join()


@dataclass
class Fleet:
    """A running demo with a Prometheus beside it."""

    deployment: Deployment
    processes: Processes
    client: Client
    prometheus: HostPort
    folder: Path

    async def get(self, address: HostPort, path: str) -> Any:
        async with await self.client.request("GET", address, path, head_timeout_s=20.0) as response:
            body = await response.read_all(timeout_s=20.0, bytes_max=64 << 20)
            assert response.status == 200, (path, response.status, body[:500])
            return json.loads(body)

    async def query(self, expression: str) -> list[Any]:
        answer = await self.get(self.prometheus, f"/api/v1/query?query={quote(expression, safe='')}")
        assert answer["status"] == "success", answer
        assert not answer.get("warnings"), answer
        result: list[Any] = answer["data"]["result"]
        return result

    async def ask(self, content: str, *, headers: list[tuple[bytes, bytes]] | None = None) -> bytes:
        """One streamed chat; its decision header."""
        body = {
            "model": self.deployment.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": 8,
            "stream": True,
        }
        async with await self.client.request(
            "POST",
            self.deployment.gateway,
            "/v1/chat/completions",
            headers=[(b"content-type", b"application/json"), *(headers or [])],
            body=json.dumps(body).encode(),
            head_timeout_s=60.0,
        ) as response:
            raw = await response.read_all(timeout_s=60.0)
            assert response.status == 200, raw[:500]
            return response.header(b"x-pdcoord-decision") or b""

    def log(self, name: str) -> list[dict[str, Any]]:
        lines = self.processes[name].log.read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]


async def until(is_so: Any, what: str) -> Any:
    """Wait until an awaitable condition gives something true."""
    async with asyncio.timeout(WAIT_S):
        while True:
            try:
                if found := await is_so():
                    return found
            except WireError:
                pass
            await asyncio.sleep(POLL_S)
    raise AssertionError(what)


def prometheus_binary() -> str:
    own = ROOT / ".venv-tools" / "bin" / "prometheus"
    path = str(own) if own.exists() else shutil.which("prometheus")
    assert path is not None, "prometheus is not here: run `make tools`"
    return path


def scrape_config(deployment: Deployment) -> dict[str, Any]:
    def arguments(name: str, flag: str) -> str:
        command = deployment.commands[name]
        return command[command.index(flag) + 1]

    sidecars = [name for name in deployment.commands if name.endswith("-sidecar")]
    jobs = {
        "gateway": [str(deployment.gateway)],
        "sidecars": [f"127.0.0.1:{arguments(name, '--metrics-port')}" for name in sidecars],
        "engines": [
            str(address)
            for name, (address, _) in deployment.ready_checks.items()
            if name != "gateway" and not name.endswith("-sidecar")
        ],
    }
    return {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(FOLDER / "rules.yaml")],
        "scrape_configs": [
            {"job_name": job, "static_configs": [{"targets": targets, "labels": {"namespace": "demo"}}]}
            for job, targets in jobs.items()
        ],
    }


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fleet]:
    folder = tmp_path_factory.mktemp("fleet")
    deployment = lay_out(folder, seed=1)
    policy_file = folder / "policy.yaml"
    policy = yaml.safe_load(policy_file.read_text())
    # What splitting saves is learned from times of this busy machine; here it must not decide.
    policy["disaggregation"]["mode"] = "always"
    policy["slo"] = {"ttft_ms": 60_000, "tpot_ms": 10_000}
    policy_file.write_text(yaml.safe_dump(policy, sort_keys=False))
    config = folder / "prometheus.yml"
    config.write_text(yaml.safe_dump(scrape_config(deployment)))
    (port,) = free_ports(1)
    prometheus = HostPort(f"127.0.0.1:{port}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.port}")
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        with (folder / "prometheus.log").open("wb") as sink:
            scraper = await asyncio.create_subprocess_exec(
                prometheus_binary(),
                f"--config.file={config}",
                f"--storage.tsdb.path={folder / 'tsdb'}",
                f"--web.listen-address={prometheus}",
                "--log.level=warn",
                stdout=asyncio.subprocess.DEVNULL,
                stderr=sink,
            )
        async with Client() as client, Processes(folder) as processes:
            try:
                for name, command in deployment.commands.items():
                    await processes.start(name, command)
                for name, (address, path) in deployment.ready_checks.items():
                    await processes.wait_ready(name, address, path, client)
                yield Fleet(deployment, processes, client, prometheus, folder)
            finally:
                scraper.terminate()
                await scraper.wait()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(fleet: Fleet) -> Fleet:
    """The fleet after some traffic, of which Prometheus has seen the begin and the end."""
    await until(lambda: fleet.query("pdcoord_gateway_ready == 1"), "the first scrape")
    long = "word " * 3_000
    decisions = [await fleet.ask(f"{number} {long}") for number in range(4)]
    decisions += [await fleet.ask("What is a lease?") for _ in range(4)]
    assert any(decision.startswith(b"split") for decision in decisions), decisions
    assert any(decision.startswith(b"colocated") for decision in decisions), decisions
    counted = 'sum(pdcoord_gateway_requests_total{outcome="ok"}) >= 8'
    await until(lambda: fleet.query(counted), "a scrape behind the last request")
    await until(lambda: fleet.query("sum(pdcoord_sidecar_requests_total) >= 8"), "one of the sidecars")
    # A rate needs a second sample behind the first one that shows anything.
    rates = "sum(rate(pdcoord_sidecar_transfer_seconds_count[1m])) > 0"
    await until(lambda: fleet.query(rates), "a rate")
    return fleet


def dashboard_queries() -> list[tuple[str, str]]:
    return [
        (f"{path.stem}: {panel['title']} {target['refId']}", target["expr"])
        for path in sorted((FOLDER / "dashboards").glob("*.json"))
        for panel in json.loads(path.read_text())["panels"]
        for target in panel.get("targets", ())
    ]


async def test_every_dashboard_query_is_answered_with_data_where_data_must_be(served: Fleet) -> None:
    empty = []
    for where, query in dashboard_queries():
        expression = query.replace("$__rate_interval", "1m").replace("$model", ".*")
        if not await served.query(expression) and not MAY_BE_EMPTY.search(query):
            empty.append((where, expression))
    assert empty == []


async def test_every_alert_is_evaluated_and_none_fires_where_nothing_is_wrong(served: Fleet) -> None:
    async def groups() -> list[Any]:
        found: list[Any] = (await served.get(served.prometheus, "/api/v1/rules?type=alert"))["data"]["groups"]
        rules = [rule for group in found for rule in group["rules"]]
        return rules if all(rule["health"] == "ok" for rule in rules) else []

    rules = await until(groups, "all rules were evaluated")
    expected = [
        rule["alert"]
        for group in yaml.safe_load((FOLDER / "rules.yaml").read_text())["groups"]
        for rule in group["rules"]
    ]
    assert sorted(rule["name"] for rule in rules) == sorted(expected)
    assert {rule["name"]: rule["state"] for rule in rules if rule["state"] == "firing"} == {}
    assert all(not rule.get("lastError") for rule in rules)


async def test_labels_of_a_running_fleet_keep_to_their_bounds(served: Fleet) -> None:
    for series in await served.query('{__name__=~"pdcoord_gateway_.*"}'):
        labels = dict(series["metric"])
        name = re.sub("_(bucket|sum|count)$", "", labels.pop("__name__"))
        for label in labels.keys() - {"job", "instance", "namespace", "le"}:
            bound = bound_of(name, label)
            assert bound is not None, (name, label)
            assert not bound.values or labels[label] in bound.values, (name, label, labels[label])


async def test_a_split_request_is_one_trace_over_gateway_sidecar_and_both_engines(
    served: Fleet, collector: Collector
) -> None:
    key = (b"authorization", b"Bearer s3cret-key")
    parent = (b"traceparent", f"00-{TRACE_ID}-{CLIENT_SPAN}-01".encode())
    decision = await served.ask("secret-prompt " * 3_000, headers=[parent, key])
    assert decision.startswith(b"split")

    async def spans() -> dict[str, SeenSpan]:
        found = {span.name: span for span in collector.spans if span.trace_id == TRACE_ID}
        return found if {"POST /v1/chat/completions", "handoff", "stream"} <= found.keys() else {}

    by_name = await until(spans, "the spans were exported")
    call, attempt, handoff = (by_name[name] for name in ("POST /v1/chat/completions", "attempt", "handoff"))
    prefill, transfer, decode, stream = (by_name[n] for n in ("prefill", "transfer", "decode", "stream"))
    assert {span.service for span in (call, attempt)} == {"pdcoord-serve"}
    assert {span.service for span in (handoff, prefill, transfer, decode, stream)} == {"pdcoord-sidecar"}
    assert call.parent_id == CLIENT_SPAN
    assert attempt.parent_id == call.span_id
    assert handoff.parent_id == attempt.span_id
    assert prefill.parent_id == decode.parent_id == transfer.parent_id == handoff.span_id
    assert stream.parent_id == decode.span_id
    assert "first_byte" in call.events
    assert "first_output" in handoff.events
    ttft_s = call.attributes["gen_ai.response.time_to_first_chunk"]
    assert 0 < ttft_s <= (call.ended_ns - call.began_ns) / 1e9
    assert call.attributes["gen_ai.request.model"] == served.deployment.model
    assert call.attributes["gen_ai.usage.output_tokens"] == 8
    assert call.attributes["pdcoord.mode"] == "split"
    assert prefill.ended_ns <= transfer.ended_ns
    told = repr([span.attributes for span in collector.spans])
    assert "secret-prompt" not in told
    assert "s3cret-key" not in told

    legs = {}
    for name, (address, _) in served.deployment.ready_checks.items():
        if name == "gateway" or name.endswith("-sidecar"):
            continue
        state = await served.get(address, "/emulator/state")
        legs |= {each["leg"]: each for each in state["traced"] if each["trace_id"] == TRACE_ID}
    assert legs["prefill"]["span_id"] == prefill.span_id
    assert legs["decode"]["span_id"] == decode.span_id


async def test_log_lines_of_gateway_and_sidecar_share_request_and_trace(served: Fleet) -> None:
    await served.ask("One more.", headers=[(b"x-request-id", b"logged-1")])
    names = [name for name in served.deployment.commands if name == "gateway" or name.endswith("-sidecar")]

    async def lines() -> list[dict[str, Any]]:
        found = [
            line
            for name in names
            for line in served.log(name)
            if line.get("event") == "request.done" and line.get("id") == "logged-1"
        ]
        return found if len(found) == 2 else []

    first, second = await until(lines, "both have written their line")
    assert first["trace_id"] == second["trace_id"]
    assert re.fullmatch("[0-9a-f]{32}", first["trace_id"])


async def test_spans_that_were_sent_are_counted_and_none_was_lost(served: Fleet) -> None:
    await until(
        lambda: served.query('pdcoord_gateway_spans_total{what="exported"} > 0'), "the counter was scraped"
    )
    assert await served.query('pdcoord_gateway_spans_total{what=~"failed|dropped"} > 0') == []
