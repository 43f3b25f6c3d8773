"""What is compared: how each proxy is started in front of the fake engine, and what is asked of it."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pdcoord.sim.ports import free_ports

BINARIES = Path(sys.executable).parent
PEER_ENVIRONMENT = Path(".venv-bench")

# One colocated pool: what the gateway does per token does not depend on how a request is served.
_POLICY = """\
apiVersion: pdcoord.io/v1alpha1
kind: PoolPolicy
metadata: {{name: bench}}
model:
  name: bench/llama
  bytes_per_token: 4.0
  prefix: {{block_tokens: 64, blocks_per_endpoint_max: 32768}}
pools:
  - name: engines
    role: both
    vendor: loopback
    engine: vllm
    connector: none
    layout: {{block_tokens: 64, order: NHD, dtype: bfloat16, tensor_parallel: 1, tiling: plain}}
    kv_bytes_per_token: 131072
    link_gbit_per_s: 100
    endpoints: [{{name: only, address: "127.0.0.1:{port}"}}]
    speed:
      prefill_base_ms: 8
      prefill_ms_per_token: 0.12
      prefill_ns_per_token_squared: 0
      step_base_ms: 10
      step_us_per_sequence: 50
      step_ns_per_context_token: 20
    cost_per_hour: 1.0
    limits: {{in_flight_max: 4096, context_tokens_max: 131072}}
"""


@dataclass(frozen=True, slots=True)
class Site:
    """Where one run happens.

    Attributes:
        engine_port: of the fake engine that streams.
        prefill_port: of a second one, for what insists on two.
        folder: for files that a contender is to be given.
    """

    engine_port: int
    prefill_port: int
    folder: Path


@dataclass(frozen=True, slots=True)
class Launch:
    """A command and how to know that it serves.

    Attributes:
        port: where it serves; None if it prints "ready PORT" as its first line.
        ready_path: answered with 200 once it serves.
    """

    command: list[str]
    port: int | None = None
    ready_path: str = ""


@dataclass(frozen=True, slots=True)
class Contender:
    """One row of the table.

    Attributes:
        process: rows of the same process share one that runs.
        header_of: adds a request header, as "name: value", that asks for what the row is about.
        expected: what the head of an answer holds if it was served as the row says.
        is_held_to_bar: whether the row must stay below the bar.
        needs: files without which it cannot run.
    """

    name: str
    process: str
    launch: Callable[[Site], Launch]
    header_of: Callable[[Site], list[str]] = lambda _site: []
    expected: str = "200 OK"
    is_held_to_bar: bool = False
    needs: tuple[Path, ...] = ()


def _module(name: str) -> Callable[[Site], Launch]:
    def launch(site: Site) -> Launch:
        arguments = ["--upstream-port", str(site.engine_port)]
        return Launch([sys.executable, "-m", f"benchmarks.relay.{name}", *arguments])

    return launch


def _sidecar(site: Site) -> Launch:
    port, metrics_port = free_ports(2)
    engine, prefill = f"127.0.0.1:{site.engine_port}", f"127.0.0.1:{site.prefill_port}"
    command = [
        str(BINARIES / "pdcoord-sidecar"),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--engine",
        engine,
    ]
    command += ["--allow", prefill, "--metrics-port", str(metrics_port)]
    return Launch(command, port, "/health")


def _gateway(site: Site) -> Launch:
    policy = site.folder / "policy.yaml"
    policy.write_text(_POLICY.format(port=site.engine_port), encoding="utf-8")
    port, admin_port = free_ports(2)
    command = [str(BINARIES / "pdcoord"), "serve", "--policy", str(policy), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--admin-port", str(admin_port)]
    return Launch(command, port, "/readyz")


def _router(name: str, *arguments: str) -> Callable[[Site], Launch]:
    def launch(site: Site) -> Launch:
        port, metrics_port = free_ports(2)
        urls = {
            "ENGINE": f"http://127.0.0.1:{site.engine_port}",
            "PREFILL": f"http://127.0.0.1:{site.prefill_port}",
        }
        command = [str(PEER_ENVIRONMENT / "bin" / name), *(urls.get(each, each) for each in arguments)]
        command += ["--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(metrics_port)]
        return Launch([*command, "--policy", "round_robin", "--log-level", "error"], port, "/health")

    return launch


def _split(site: Site) -> list[str]:
    return [f"x-prefiller-host-port: 127.0.0.1:{site.prefill_port}"]


def _resumable(_site: Site) -> list[str]:
    return ['x-pdcoord-plan: {"resume_tries_max": 3}']


SPLICE = Contender("splice", "splice", _module("splice"))
_SIDECAR = (BINARIES / "pdcoord-sidecar",)
_GATEWAY = (BINARIES / "pdcoord",)
OURS = (
    Contender("wire", "wire", _module("bare")),
    Contender(
        "sidecar", "sidecar", _sidecar, expected='"mode":"colocated"', is_held_to_bar=True, needs=_SIDECAR
    ),
    Contender(
        "sidecar-split",
        "sidecar",
        _sidecar,
        _split,
        expected='"mode":"split"',
        is_held_to_bar=True,
        needs=_SIDECAR,
    ),
    Contender(
        "sidecar-resumable",
        "sidecar",
        _sidecar,
        _resumable,
        expected='"mode":"colocated"',
        needs=_SIDECAR,
    ),
    Contender(
        "gateway", "gateway", _gateway, expected="x-pdcoord-decision: ", is_held_to_bar=True, needs=_GATEWAY
    ),
)
PEERS = (
    Contender(
        "sglang-router", "sglang-router", _router("sglang-router", "launch", "--worker-urls", "ENGINE")
    ),
    Contender("vllm-router", "vllm-router", _router("vllm-router", "--worker-urls", "ENGINE")),
    Contender(
        "vllm-router-pd",
        "vllm-router-pd",
        _router("vllm-router", "--vllm-pd-disaggregation", "--prefill", "PREFILL", "--decode", "ENGINE"),
    ),
)
