"""The fleet under load: emulated engines with room for few, their sidecars and a gateway, each a process."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pdcoord.protocol.headers import HostPort
from pdcoord.sim.demo.processes import Process, Processes
from pdcoord.sim.ports import free_ports
from pdcoord.wire.client import Client

MODEL = "org/model"
RUNNING_MAX = 4
STEP_MS = 40.0
OUTPUT_TOKENS = 16
DECODE_COUNT = 2
TTFT_S = 4.0
"""The objective: an answer whose first token comes later is no goodput."""
WAIT_S = 2.0
WAITING_MAX = 64

_HEAD = {"apiVersion": "pdcoord.io/v1alpha1"}
_SPEED = {"prefill_base_ms": 5, "prefill_ms_per_token": 0.02, "step_base_ms": STEP_MS}


def capacity_per_s() -> float:
    """Requests a second that the decode engines can serve, by arithmetic; the ramp measures it."""
    return DECODE_COUNT * RUNNING_MAX / (OUTPUT_TOKENS * STEP_MS / 1e3)


@dataclass(slots=True)
class Fleet:
    """What was started, and where.

    Attributes:
        processes: by what they are: gateway, sidecars, engines.
    """

    gateway: HostPort
    processes: dict[str, Process] = field(default_factory=dict)

    def rss_bytes(self) -> dict[str, int]:
        """Resident memory of each process now."""
        return {name: rss_bytes(process.pid) for name, process in self.processes.items()}


def rss_bytes(pid: int) -> int:
    """Resident memory of a process, 0 if it is gone (proc(5), VmRSS)."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    line = next((line for line in text.splitlines() if line.startswith("VmRSS:")), "VmRSS: 0 kB")
    return int(line.split()[1]) * 1024


def open_files(pid: int) -> int:
    """File descriptors that a process has open; 0 if it is gone."""
    try:
        return len(list(Path(f"/proc/{pid}/fd").iterdir()))
    except OSError:
        return 0


async def start_fleet(folder: Path, processes: Processes, client: Client) -> Fleet:
    """Start everything and wait until it serves.

    Raises:
        DemoError: if a process does not become ready.
    """
    names = ["prefill-0", *(f"decode-{index}" for index in range(DECODE_COUNT))]
    ports = iter(free_ports(4 * len(names) + 2))
    engines = {name: (next(ports), next(ports)) for name in names}
    sidecars = {name: (next(ports), next(ports)) for name in names[1:]}
    gateway, admin = next(ports), next(ports)
    _write(folder / "fleet.yaml", _fleet(engines))
    _write(folder / "policy.yaml", _policy(engines, sidecars))
    fleet = Fleet(HostPort(f"127.0.0.1:{gateway}"))

    async def start(name: str, command: Sequence[str], port: int, path: str) -> None:
        fleet.processes[name] = await processes.start(name, command)
        await processes.wait_ready(name, HostPort(f"127.0.0.1:{port}"), path, client)

    await start(
        "engines", ["pdcoord", "emulate", str(folder / "fleet.yaml")], engines[names[-1]][0], "/health"
    )
    for name, (port, metrics) in sidecars.items():
        command = ["pdcoord-sidecar", "--host", "127.0.0.1", "--port", str(port)]
        command += ["--metrics-port", str(metrics), "--engine", f"127.0.0.1:{engines[name][0]}"]
        command += ["--allow", f"127.0.0.1:{engines[names[0]][0]}"]
        await start(f"sidecar-{name}", command, port, "/health")
    command = ["pdcoord", "serve", "--policy", str(folder / "policy.yaml"), "--host", "127.0.0.1"]
    command += ["--port", str(gateway), "--admin-port", str(admin)]
    await start("gateway", command, gateway, "/readyz")
    return fleet


def _fleet(engines: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    listed = [
        {
            "name": name,
            "profile": "nvidia-h100-8b",
            "role": name.partition("-")[0],
            "port": port,
            "side_channel_port": side,
            "speed": _SPEED,
            "running_max": RUNNING_MAX,
        }
        for name, (port, side) in engines.items()
    ]
    return {"kind": "EmulatedFleet", "seed": 1, "model": MODEL, "engines": listed}


def _policy(
    engines: Mapping[str, tuple[int, int]], sidecars: Mapping[str, tuple[int, int]]
) -> dict[str, Any]:
    at = {"prefill": {"prefill-0": engines["prefill-0"]}, "decode": sidecars}
    pools = [
        {
            "name": role,
            "role": role,
            "vendor": "v",
            "engine": "vllm",
            "connector": "pdcoord",
            "layout": {"block_tokens": 16},
            "kv_bytes_per_token": 131_072,
            "link_gbit_per_s": 400,
            "speed": _SPEED,
            "limits": {"in_flight_max": RUNNING_MAX if role == "decode" else 64},
            "endpoints": [
                {"name": name, "address": f"127.0.0.1:{port}"} for name, (port, _) in listed.items()
            ],
        }
        for role, listed in at.items()
    ]
    return {
        "kind": "PoolPolicy",
        "metadata": {"name": "m"},
        "model": {"name": MODEL},
        "disaggregation": {"mode": "always"},
        "slo": {"ttft_ms": TTFT_S * 1e3},
        "admission": {"wait_ms_max": WAIT_S * 1e3, "requests_max": WAITING_MAX},
        "pools": pools,
    }


def _write(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps({**_HEAD, **document}))
