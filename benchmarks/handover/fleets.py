"""The pairs that are measured: a prefill engine, a decode engine, and the sidecar beside the latter."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import yaml

from benchmarks.handover.http1 import answers
from pdcoord.sim.ports import free_ports

READY_S_MAX = 240.0
STOP_S_MAX = 10.0
MODEL = "bench/handover"
HOST = "127.0.0.1"
ROOT = Path(__file__).resolve().parents[2]
VLLM_PYTHON = Path(os.environ.get("PDCOORD_E2E_VLLM_PYTHON") or ROOT / ".venv-vllm" / "bin" / "python")

# No step of the emulator takes longer than these, so that what is left is the hand-over.
EMULATED_SPEED = {
    "prefill_base_ms": 5,
    "prefill_ms_per_token": 0.05,
    "step_base_ms": 5,
    "step_us_per_sequence": 10,
    "step_ns_per_context_token": 1,
}
EMULATED_KV_BYTES_PER_TOKEN = 131_072
EMULATED_LINK_GBIT_PER_S = 100.0


@dataclass(frozen=True, slots=True)
class Pair:
    """Where to send requests.

    Attributes:
        kv_port: side channel of the prefill engine.
        transfer_metric: the decode engine's histogram of seconds in which KV bytes moved.
    """

    model: str
    prefill: str
    decode: str
    sidecar: str
    kv_port: int
    transfer_metric: str


@dataclass(frozen=True, slots=True)
class Started:
    """One process, named, with its log."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path


class StartError(Exception):
    """A process did not serve in time; carries the end of what it wrote."""


@contextmanager
def running(
    name: str, command: Sequence[str | Path], folder: Path, environment: Mapping[str, str] | None = None
) -> Iterator[Started]:
    log = folder / f"{name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(word) for word in command],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
    try:
        yield Started(name, process, log)
    finally:
        # The whole group: an engine has processes of its own.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S_MAX)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_ready(started: Started, address: str, path: str) -> None:
    """Wait until a server answers 200.

    Raises:
        StartError: if it ends before that, or does not in time.
    """
    deadline_s = time.monotonic() + READY_S_MAX
    while not answers(address, path):
        if started.process.poll() is not None or time.monotonic() > deadline_s:
            tail = started.log.read_bytes()[-2_000:].decode(errors="replace")
            raise StartError(f"{started.name} does not serve:\n{tail}")
        time.sleep(0.1)


def own(command: str) -> Path:
    """One of our own commands, of the environment that runs this."""
    return Path(sys.executable).parent / command


@contextmanager
def sidecar(folder: Path, prefill: str, kv_port: int, decode: str) -> Iterator[str]:
    port, metrics_port = free_ports(2)
    command = [
        *(own("pdcoord-sidecar"), "--host", HOST, "--port", str(port), "--engine", decode),
        *("--allow", f"{prefill}/{kv_port}", "--metrics-port", str(metrics_port), "--log-level", "error"),
    ]
    with running("sidecar", command, folder) as started:
        wait_ready(started, f"{HOST}:{metrics_port}", "/readyz")
        yield f"{HOST}:{port}"


@contextmanager
def emulated(folder: Path) -> Iterator[Pair]:
    """Two emulated engines with unlike layouts."""
    prefill_port, prefill_side, decode_port, decode_side = free_ports(4)
    common = {
        "speed": EMULATED_SPEED,
        "step_tokens_max": 2_048,
        "link_gbit_per_s": EMULATED_LINK_GBIT_PER_S,
        "prefix_caching": False,
        "handshake_s": 0.0,
    }
    engines = [
        {"name": "prefill", "profile": "intel-gaudi3-8b", "role": "prefill", "port": prefill_port}
        | {"side_channel_port": prefill_side, **common},
        {"name": "decode", "profile": "nvidia-h100-8b", "role": "decode", "port": decode_port}
        | {"side_channel_port": decode_side, **common},
    ]
    fleet = {
        "apiVersion": "pdcoord.io/v1alpha1",
        "kind": "EmulatedFleet",
        "seed": 1,
        "model": MODEL,
        "engines": engines,
    }
    path = folder / "fleet.yaml"
    path.write_text(yaml.safe_dump(fleet))
    prefill, decode = f"{HOST}:{prefill_port}", f"{HOST}:{decode_port}"
    with ExitStack() as stack:
        for name, address in (("prefill", prefill), ("decode", decode)):
            command = [own("pdcoord"), "emulate", path, "--engine", name]
            started = stack.enter_context(running(name, command, folder))
            wait_ready(started, address, "/health")
        address = stack.enter_context(sidecar(folder, prefill, prefill_side, decode))
        yield Pair(MODEL, prefill, decode, address, prefill_side, "vllm:nixl_xfer_time_seconds_sum")
