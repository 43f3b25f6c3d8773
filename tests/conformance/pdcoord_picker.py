"""`pdcoord extproc` over emulated engines, for the suite or by hand: prints a line of JSON once it is ready.

    python pdcoord_picker.py FOLDER [--no-engines]

Runs until its standard input ends. Logs and files are left in FOLDER.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub

from pdcoord.sim.ports import free_ports

WAIT_S = 60.0
STOP_S = 10.0
FLEET = """\
apiVersion: pdcoord.io/v1alpha1
kind: EmulatedFleet
seed: 7
model: demo/llama-8b
engines:
  - {{name: prefill, profile: intel-gaudi3-8b, role: prefill, port: {prefill}}}
  - {{name: decode-0, profile: amd-mi300x-8b, role: decode, port: {decode-0}}}
  - {{name: decode-1, profile: amd-mi300x-8b, role: decode, port: {decode-1}}}
  - {{name: decode-2, profile: amd-mi300x-8b, role: decode, port: {decode-2}}}
  - {{name: small, profile: nvidia-a100-8b, role: both, port: {small}}}
"""
POLICY = """\
apiVersion: pdcoord.io/v1alpha1
kind: PoolPolicy
metadata: {{name: llama}}
model: {{name: demo/llama-8b, aliases: [demo]}}
pools:
  - name: prefill
    role: prefill
    vendor: intel-gaudi
    engine: vllm
    connector: pdcoord
    layout: {{preset: intel-gaudi}}
    kv_bytes_per_token: 131072
    link_gbit_per_s: 100
    endpoints: [{{name: prefill, address: "{prefill}"}}]
    speed: {{prefill_base_ms: 8, prefill_ms_per_token: 0.1}}
  - name: decode
    role: decode
    vendor: amd
    engine: vllm
    connector: pdcoord
    layout: {{preset: amd-aiter-unified}}
    kv_bytes_per_token: 131072
    link_gbit_per_s: 100
    endpoints:
      - {{name: decode-0, address: "{decode-0}"}}
      - {{name: decode-1, address: "{decode-1}"}}
      - {{name: decode-2, address: "{decode-2}"}}
    speed: {{prefill_base_ms: 8, prefill_ms_per_token: 1.0, step_base_ms: 12}}
disaggregation: {{mode: always}}
canary: {{mode: off}}  # no sidecar stands before these engines
---
apiVersion: pdcoord.io/v1alpha1
kind: PoolPolicy
metadata: {{name: small}}
model: {{name: demo/small}}
pools:
  - name: small
    role: both
    vendor: nvidia
    engine: vllm
    connector: none
    kv_bytes_per_token: 131072
    endpoints: [{{name: small, address: "{small}"}}]
    speed: {{prefill_base_ms: 8, prefill_ms_per_token: 0.2, step_base_ms: 12}}
    limits: {{in_flight_max: 1}}
admission: {{wait_ms_max: 0}}
"""
BODY_BYTES_MAX = 2 << 20
ENGINES = tuple(line.split()[2].strip(",") for line in FLEET.splitlines() if "profile:" in line)
MAIN = "import sys; from pdcoord.cli import main; sys.exit(main())"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--no-engines", action="store_true", help="nobody listens where engines should be")
    options = parser.parse_args()
    with running(options.folder, has_engines=not options.no_engines) as target:
        sys.stdout.write(json.dumps(target) + "\n")
        sys.stdout.flush()
        sys.stdin.read()
    return 0


@contextmanager
def running(folder: Path, *, has_engines: bool) -> Iterator[dict[str, object]]:
    """What the suite is to know of the picker, once it is ready or, without engines, alive."""
    ports = free_ports(4 + len(ENGINES))
    addresses = [f"127.0.0.1:{port}" for port in ports]
    engines = dict(zip(ENGINES, addresses[4:], strict=True))
    (folder / "policy.yaml").write_text(POLICY.format(**engines))
    (folder / "fleet.yaml").write_text(FLEET.format(**{name: engines[name][10:] for name in ENGINES}))
    flags = [f"--policy={folder / 'policy.yaml'}", "--no-secure-serving", f"--grpc-port={ports[0]}"]
    flags += [f"--grpc-health-port={ports[1]}", f"--metrics-port={ports[2]}"]
    environment = {
        "PDCOORD_ADMIN_PORT": str(ports[3]),
        "PDCOORD_BODY_BYTES_MAX": str(BODY_BYTES_MAX),
        "PDCOORD_BODY_TIMEOUT_S": "5",
        "PDCOORD_DRAIN_NOTICE_S": "0",
    }
    children: list[subprocess.Popen[bytes]] = []
    try:
        if has_engines:
            children.append(start(folder, "emulate", str(folder / "fleet.yaml")))
        children.append(start(folder, "extproc", *flags, **environment))
        await_health(addresses[1], "readiness" if has_engines else "liveness", children[-1], folder)
        yield {
            "address": addresses[0],
            "health": addresses[1],
            "endpoints": [engines[name] for name in ENGINES if name.startswith("decode")],
            "model": "demo/llama-8b",
            "alias": "demo",
            "model_full": "demo/small",
            "body_bytes_max": BODY_BYTES_MAX,
            "has_body_deadline": True,
        }
    finally:
        for child in children:
            child.terminate()
        for child in children:
            with suppress(subprocess.TimeoutExpired):
                child.wait(STOP_S)
            child.kill()
            child.wait()


def start(folder: Path, command: str, *words: str, **environment: str) -> subprocess.Popen[bytes]:
    """A command of pdcoord; what it writes goes to a file of the command's name."""
    with (folder / f"{command}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-c", MAIN, command, *words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, **environment},
        )


def await_health(address: str, service: str, picker: subprocess.Popen[bytes], folder: Path) -> None:
    deadline_s = time.monotonic() + WAIT_S
    with grpc.insecure_channel(address) as channel:
        stub = HealthStub(channel)
        while picker.poll() is None and time.monotonic() < deadline_s:
            with suppress(grpc.RpcError):
                answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=2.0)
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            time.sleep(0.05)
    raise SystemExit(f"not ready, status {picker.poll()}:\n{(folder / 'extproc.log').read_text()}")


if __name__ == "__main__":
    sys.exit(main())
