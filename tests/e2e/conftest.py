"""Starts two real vLLM servers, a sidecar and a gateway, once for all tests, and stops them whatever happens.

The servers run in an environment of their own, made by setup.sh; PDCOORD_E2E_VLLM_PYTHON names its
interpreter if it is not .venv-vllm/bin/python. Everything listens on loopback, on ports that are free.
"""

import http.client
import json
import os
import random
import re
import signal
import string
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from string import Template
from typing import Any

import pytest
from openai import OpenAI

from pdcoord.sim.ports import free_ports

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
MODEL = "tiny"
BLOCK_TOKENS = 128
MODEL_TOKENS_MAX = 4096

ENGINE_START_S = 480.0
START_S = 90.0
STOP_S = 10.0
REQUEST_S = 60.0
# Of one test without its fixtures, if it names no other; the slowest takes a tenth of it on two idle cores.
TEST_S = 180
TAIL_LINES = 40
# Of the prompts: in one of many two tokens are so nearly as likely that the cut of a batch decides. With the
# same prompts in each run that is so always or never.
SEED = 7
# This one leaves the prefill server dead.
LAST = "test_prefill_death.py"

ENGINE_ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # Bound, both servers would share one core.
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "VLLM_CPU_CI_ENV": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
    "HF_HUB_OFFLINE": "1",
    "UCX_TLS": "tcp,self,sm",
}
ENGINE_FLAGS = (
    *("--host", "127.0.0.1", "--served-model-name", MODEL),
    *("--max-model-len", str(MODEL_TOKENS_MAX), "--block-size", str(BLOCK_TOKENS), "--dtype", "bfloat16"),
    *("--enforce-eager", "--enable-prompt-tokens-details"),
    *("--disable-access-log-for-endpoints", "/metrics,/health"),
)
KV_TRANSFER_CONFIG = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}

processes_key = pytest.StashKey["Processes"]()


# Which tests run, and in what order.


def pytest_configure(config: pytest.Config) -> None:
    config.stash[processes_key] = Processes()


@pytest.hookimpl(trylast=True)  # After pytest-randomly has shuffled.
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ours = [item for item in items if item.path.is_relative_to(HERE)]
    for item in ours:
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TEST_S, func_only=True))
        if "e2e" not in config.getoption("markexpr"):
            item.add_marker(pytest.mark.skip(reason="needs real engines: run make e2e-vllm"))
    items.sort(key=lambda item: item.path.name == LAST)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        for process in item.config.stash[processes_key].started:
            report.sections.append((f"last lines of {process.log}", process.tail()))
    return report


# Processes.


@dataclass
class Process:
    """A process in a group of its own, with all it starts; its output goes to `log`."""

    name: str
    popen: subprocess.Popen[bytes]
    log: Path

    def tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-TAIL_LINES:])

    def assert_alive(self) -> None:
        status = self.popen.poll()
        assert status is None, f"{self.name} ended with status {status}:\n{self.tail()}"

    def kill(self) -> None:
        """End the whole group at once, as a machine's loss would."""
        self._signal(signal.SIGKILL)
        self.popen.wait(STOP_S)

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def stop(self) -> None:
        """Wait for the end, STOP_S at most, then end whatever is left of the group."""
        with suppress(subprocess.TimeoutExpired):
            self.popen.wait(STOP_S)
        self.kill()

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.popen.pid, number)


@dataclass
class Processes:
    """All that this session has started."""

    started: list[Process] = field(default_factory=list)

    def start(
        self, name: str, command: Sequence[str | Path], folder: Path, environment: Mapping[str, str]
    ) -> Process:
        log = folder / f"{name}.log"
        with log.open("wb") as output:
            popen = subprocess.Popen(
                [str(word) for word in command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                cwd=folder,
                start_new_session=True,
            )
        process = Process(name, popen, log)
        self.started.append(process)
        return process

    def stop_all(self) -> None:
        """All at once, then those that have not ended within STOP_S by force."""
        for process in self.started:
            process.terminate()
        for process in self.started:
            process.stop()
        self.started.clear()


@pytest.fixture(scope="session")
def processes(pytestconfig: pytest.Config) -> Iterator[Processes]:
    processes = pytestconfig.stash[processes_key]
    # So that a SIGTERM ends what was started too; by default Python would just be gone.
    handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
    yield processes
    processes.stop_all()
    signal.signal(signal.SIGTERM, handler)


def wait_until(condition: Callable[[], Any], deadline_s: float, what: str) -> None:
    """Wait for a condition; an assertion error names what did not come."""
    end_s = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end_s, f"not within {deadline_s:g} s: {what}"
        time.sleep(0.05)


# What the tests talk to.


@dataclass(frozen=True)
class Answer:
    """An HTTP answer as it came."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Http:
    """Plain HTTP to one of the servers."""

    port: int

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def call(
        self, path: str, body: Any = None, headers: Mapping[str, str] | None = None, method: str = ""
    ) -> Answer:
        connection = http.client.HTTPConnection(self.address, timeout=REQUEST_S)
        try:
            connection.request(
                method or ("GET" if body is None else "POST"),
                path,
                None if body is None else json.dumps(body),
                {"content-type": "application/json"} | dict(headers or {}),
            )
            response = connection.getresponse()
            names = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, names, response.read())
        finally:
            connection.close()

    def answers(self, path: str) -> bool:
        try:
            return self.call(path).status == 200
        except (OSError, http.client.HTTPException):
            return False

    def health(self) -> list[str]:
        """Of each endpoint, of a gateway's admin listener."""
        return [each["health"] for each in self.call("/fleet").json()["endpoints"]]

    def counter(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels."""
        total = 0.0
        for line in self.call("/metrics").body.decode().splitlines():
            match = re.fullmatch(rf"{re.escape(name)}(?:{{(.*)}})? (\S+)", line)
            if match is not None and all(
                f'{key}="{value}"' in (match[1] or "") for key, value in labels.items()
            ):
                total += float(match[2])
        return total


@dataclass(frozen=True)
class Engine(Http):
    """One vLLM server."""

    process: Process

    def tokens_alone(self, prompt: str, output_tokens: int) -> list[int]:
        """Greedy tokens that this engine gives when it does everything itself, out of no cache."""
        body = {
            "model": MODEL,
            "prompt": prompt,
            "max_tokens": output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            "cache_salt": f"alone-{random.SystemRandom().getrandbits(64)}",
        }
        answer = self.call("/v1/completions", body)
        assert answer.status == 200, answer.body
        tokens: list[int] = answer.json()["choices"][0]["token_ids"]
        return tokens

    @property
    def pulled_tokens(self) -> float:
        """Prompt tokens whose KV came from another engine."""
        return self.counter("vllm:prompt_tokens_by_source_total", source="external_kv_transfer")


@dataclass(frozen=True)
class Fleet:
    """Everything that runs: client -> gateway -> sidecar -> decode; the sidecar also calls prefill.

    Attributes:
        liar: the prefill server behind a door that puts an engine that is not there into its tickets.
    """

    prefill: Engine
    decode: Engine
    sidecar: Http
    gateway: Http
    admin: Http
    liar: Http

    def decision(self, request_id: str) -> dict[str, Any]:
        answer = self.admin.call(f"/decisions/{request_id}")
        assert answer.status == 200, answer.body
        decision: dict[str, Any] = answer.json()
        return decision


@dataclass(frozen=True)
class Words:
    """Makes prompts that no cache has seen; one character is one token."""

    rng: random.Random

    def prompt(self, tokens: int) -> str:
        return "".join(self.rng.choices(string.ascii_letters + string.digits + " ", k=tokens))


@pytest.fixture(scope="session")
def words() -> Words:
    return Words(random.Random(SEED))


@pytest.fixture(scope="session")
def engine_python() -> Path:
    path = Path(os.environ.get("PDCOORD_E2E_VLLM_PYTHON") or ROOT / ".venv-vllm" / "bin" / "python")
    assert path.exists(), f"{path} does not exist; run tests/e2e/setup.sh or set PDCOORD_E2E_VLLM_PYTHON"
    return path


@dataclass(frozen=True)
class Launcher:
    """Starts servers in the engines' environment, all on one model."""

    python: Path
    model: Path
    environment: dict[str, str]
    processes: Processes

    def begin(self, name: str, flags: Sequence[str], own: Mapping[str, str], folder: Path) -> Engine:
        """Start a server; flags override the common ones. It does not answer yet."""
        # Of the second one it makes its own rendezvous: chosen by the kernel, an outgoing connection of
        # somebody else could have it by the time that it is used.
        port, inner_port = free_ports(2)
        command = (self.python, "-P", HERE / "engine.py", "--model", self.model, *ENGINE_FLAGS)
        environment = self.environment | {"VLLM_PORT": str(inner_port)} | dict(own)
        process = self.processes.start(name, [*command, "--port", str(port), *flags], folder, environment)
        return Engine(port, process)

    def wait(self, *engines: Engine) -> None:
        for engine in engines:
            wait_for_start(engine, engine.process, "/health", ENGINE_START_S)

    def serve(self, command: Sequence[str | Path], ready: Http, folder: Path) -> Process:
        """Start a process of our own and wait until it is ready."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PDCOORD_")}
        process = self.processes.start(Path(command[0]).name, command, folder, environment)
        wait_for_start(ready, process, "/readyz", START_S)
        return process

    def make_model(self, folder: Path, *seed: int, is_adapter: bool = False) -> Path:
        """Write the tiny model to a folder that is not there yet; with a seed, one of other weights.

        Args:
            is_adapter: write a LoRA adapter of it instead.
        """
        own = [word for each in seed for word in ("--seed", str(each))]
        own += ["--adapter"] if is_adapter else []
        command = [self.python, "-P", HERE / "tiny_model.py", folder, *own]
        subprocess.run(command, check=True, env=self.environment, capture_output=True, timeout=ENGINE_START_S)
        return folder

    def gateway(self, policy: Path, gateway: Http, admin: Http, folder: Path) -> Process:
        """Start a gateway, and wait until it finds all endpoints of its policy ready."""
        command = [Path(sys.executable).parent / "pdcoord", "serve", "--policy", policy]
        command += ["--port", str(gateway.port), "--admin-port", str(admin.port)]
        process = self.serve(command, gateway, folder)
        # It is ready itself with one endpoint that decodes.
        wait_until(lambda: set(admin.health()) == {"ready"}, START_S, "the gateway finds all endpoints ready")
        return process

    def ports(self, count: int) -> list[Http]:
        return [Http(port) for port in free_ports(count)]


@pytest.fixture(scope="session")
def launcher(engine_python: Path, processes: Processes, tmp_path_factory: pytest.TempPathFactory) -> Launcher:
    hidden = {"PYTHONPATH", "VIRTUAL_ENV"}
    inherited = {name: value for name, value in os.environ.items() if name not in hidden}
    environment = inherited | ENGINE_ENVIRONMENT
    model = tmp_path_factory.mktemp("model") / "model"
    launcher = Launcher(engine_python, model, environment, processes)
    launcher.make_model(model)
    return launcher


@pytest.fixture(scope="session")
def engines(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, Engine]:
    """The prefill and the decode server, started at once; whatever ran before has had its time."""
    launcher.processes.stop_all()
    folder = tmp_path_factory.mktemp("engines")
    flags = ("--kv-transfer-config", json.dumps(KV_TRANSFER_CONFIG))
    prefill, decode = (
        launcher.begin(name, flags, {"VLLM_NIXL_SIDE_CHANNEL_PORT": str(side_port)}, folder)
        for name, side_port in zip(("prefill", "decode"), free_ports(2), strict=True)
    )
    launcher.wait(prefill, decode)
    return prefill, decode


@pytest.fixture(scope="session")
def liar(engines: tuple[Engine, Engine]) -> Iterator[Http]:
    prefill, _ = engines

    class Door(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            answer = prefill.call(self.path, asked)
            body = answer.json()
            body["kv_transfer_params"]["remote_engine_id"] = "no-such-engine"
            raw = json.dumps(body).encode()
            self.send_response(answer.status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # the base class's name
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Door) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield Http(server.server_address[1])
        server.shutdown()
        thread.join(STOP_S)


@pytest.fixture(scope="session")
def fleet(
    engines: tuple[Engine, Engine],
    liar: Http,
    launcher: Launcher,
    tmp_path_factory: pytest.TempPathFactory,
) -> Fleet:
    prefill, decode = engines
    folder = tmp_path_factory.mktemp("pdcoord")
    sidecar, sidecar_metrics, gateway, admin = launcher.ports(4)
    command = [
        Path(sys.executable).parent / "pdcoord-sidecar",
        *("--host", "127.0.0.1", "--port", str(sidecar.port), "--engine", decode.address),
        *("--allow", f"{prefill.address},{liar.address}", "--metrics-port", str(sidecar_metrics.port)),
    ]
    launcher.serve(command, sidecar_metrics, folder)
    policy = folder / "policy.yaml"
    text = Template((HERE / "policy.yaml").read_text())
    policy.write_text(text.substitute(prefill=prefill.address, decode=sidecar.address))
    launcher.gateway(policy, gateway, admin, folder)
    return Fleet(prefill, decode, sidecar, gateway, admin, liar)


@pytest.fixture(scope="session")
def client(fleet: Fleet) -> Iterator[OpenAI]:
    """The official client; it does not retry, so that every failure shows."""
    url = f"http://{fleet.gateway.address}/v1"
    with OpenAI(base_url=url, api_key="unused", max_retries=0, timeout=REQUEST_S) as client:
        yield client


@pytest.fixture(scope="session")
def wait() -> Callable[[Callable[[], Any], float, str], None]:
    return wait_until


def wait_for_start(server: Http, process: Process, path: str, deadline_s: float) -> None:
    def is_up() -> bool:
        process.assert_alive()
        return server.answers(path)

    wait_until(is_up, deadline_s, f"{process.name} answers {path}")
