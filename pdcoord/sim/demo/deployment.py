"""The demo's fleet: its emulated engines, the policy over them, and the command of every process."""

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from pdcoord.protocol.headers import HostPort
from pdcoord.sim.ports import free_ports
from pdcoord.sim.profiles import PROFILES, policy_layout, policy_speed

MODEL = "demo/llama-8b"
API_VERSION = "pdcoord.io/v1alpha1"
KV_BACKEND = "nixl" if importlib.util.find_spec("nixl") else "tcp"
"""What carries the real KV of the emulated engines: NIXL where it is installed."""


@dataclass(frozen=True, slots=True)
class _DemoPool:
    """Pods of one vendor and role; priced so that nobody takes the figures for a vendor's."""

    name: str
    profile: str
    role: str
    pod_count: int
    cost_per_hour: float


POOLS = (
    _DemoPool("gaudi-prefill", "intel-gaudi3-8b", "prefill", 2, 2.0),
    _DemoPool("nvidia-prefill", "nvidia-h100-8b", "prefill", 1, 3.0),
    _DemoPool("amd-decode", "amd-mi300x-8b", "decode", 2, 2.5),
)


@dataclass(frozen=True, slots=True)
class Canary:
    """A pair of unlike vendors that is to prove itself.

    Attributes:
        sidecar: of the decode pod.
    """

    prefill_name: str
    decode_name: str
    prefill: HostPort
    sidecar: HostPort
    kv_port: int


@dataclass(slots=True)
class Deployment:
    """Where everything listens and how it is started.

    Attributes:
        pods: where a load balancer without pdcoord would send requests.
        canaries: one pair for each pool that prefills.
        kv_ports: of every engine, where its transfer agent listens.
        victim: the process that the demo kills.
        ready_checks: address and path that answer 200 when a process is ready, by process.
    """

    model: str
    gateway: HostPort
    admin: HostPort
    victim: str
    pods: list[HostPort] = field(default_factory=list)
    canaries: list[Canary] = field(default_factory=list)
    kv_ports: dict[str, int] = field(default_factory=dict)
    commands: dict[str, list[str]] = field(default_factory=dict)
    ready_checks: dict[str, tuple[HostPort, str]] = field(default_factory=dict)

    def table(self) -> Table:
        """The fleet as a person would draw it."""
        table = Table(title="An emulated fleet of three vendors")
        for name in ("pool", "role", "pods", "prefill ms/token", "step ms", "KV block", "order"):
            table.add_column(name, justify="left" if name in {"pool", "role"} else "right")
        for pool in POOLS:
            profile = PROFILES[pool.profile]
            table.add_row(
                f"{pool.name} ({pool.profile})",
                pool.role,
                str(pool.pod_count),
                f"{profile.prefill_ms_per_token.value:.2f}",
                f"{profile.step_base_ms.value:.1f}",
                str(profile.layout.block_tokens),
                profile.layout.order.value,
            )
        return table


def lay_out(folder: Path, seed: int) -> Deployment:
    """Write the fleet and policy files into `folder` and say how to start everything."""
    names = [(pool, f"{pool.name}-{index}") for pool in POOLS for index in range(pool.pod_count)]
    ports = iter(free_ports(2 + 5 * len(names)))
    deployment = Deployment(
        model=MODEL,
        gateway=HostPort(f"127.0.0.1:{next(ports)}"),
        admin=HostPort(f"127.0.0.1:{next(ports)}"),
        victim="gaudi-prefill-0",
    )
    fleet_file, policy_file = folder / "fleet.yaml", folder / "policy.yaml"
    engines: list[dict[str, Any]] = []
    addresses: dict[str, HostPort] = {}
    for pool, name in names:
        engine_port, side_port, kv_port, pod_port, metrics_port = (next(ports) for _ in range(5))
        engines.append(
            {
                "name": name,
                "profile": pool.profile,
                "role": pool.role,
                "port": engine_port,
                "side_channel_port": side_port,
                "kv_port": kv_port,
                "kv_backend": KV_BACKEND,
            }
        )
        engine = HostPort(f"127.0.0.1:{engine_port}")
        addresses[name] = engine
        deployment.kv_ports[name] = kv_port
        deployment.commands[name] = ["pdcoord", "emulate", str(fleet_file), "--engine", name]
        deployment.ready_checks[name] = (engine, "/health")
        if pool.role == "decode":
            addresses[name] = HostPort(f"127.0.0.1:{pod_port}")
            deployment.commands[f"{name}-sidecar"] = [
                *("pdcoord-sidecar", "--host", "127.0.0.1", "--port", str(pod_port), "--engine", engine),
                *("--metrics-port", str(metrics_port)),
            ]
            deployment.ready_checks[f"{name}-sidecar"] = (addresses[name], "/health")
    # With its KV port: no unsigned plan may name another.
    prefills = [
        f"{addresses[name]}/{deployment.kv_ports[name]}" for pool, name in names if pool.role == "prefill"
    ]
    for name, command in deployment.commands.items():
        if name.endswith("-sidecar"):
            command += [word for address in prefills for word in ("--allow", address)]
    deployment.pods = list(addresses.values())
    deployment.canaries = _canaries(addresses, deployment.kv_ports)
    _dump(fleet_file, {"kind": "EmulatedFleet", "seed": seed, "model": MODEL, "engines": engines})
    _dump(policy_file, _policy(addresses))
    _add_gateway(deployment, policy_file)
    return deployment


def _canaries(addresses: dict[str, HostPort], kv_ports: dict[str, int]) -> list[Canary]:
    decode = next(f"{pool.name}-0" for pool in POOLS if pool.role == "decode")
    prefills = [f"{pool.name}-0" for pool in POOLS if pool.role == "prefill"]
    return [Canary(name, decode, addresses[name], addresses[decode], kv_ports[name]) for name in prefills]


def _add_gateway(deployment: Deployment, policy_file: Path) -> None:
    port, admin_port = (address.rpartition(":")[2] for address in (deployment.gateway, deployment.admin))
    deployment.commands["gateway"] = [
        *("pdcoord", "serve", "--policy", str(policy_file)),
        *("--port", port, "--admin-port", admin_port),
    ]
    deployment.ready_checks["gateway"] = (deployment.gateway, "/readyz")


def _policy(addresses: dict[str, HostPort]) -> dict[str, Any]:
    return {
        "kind": "PoolPolicy",
        "metadata": {"name": "demo"},
        "model": {"name": MODEL, "aliases": ["demo"]},
        "pools": [_pool(pool, addresses) for pool in POOLS],
        "disaggregation": {"mode": "auto", "uncached_tokens_min": 256},
    }


def _pool(pool: _DemoPool, addresses: dict[str, HostPort]) -> dict[str, Any]:
    profile = PROFILES[pool.profile]
    return {
        "name": pool.name,
        "role": pool.role,
        "vendor": profile.vendor,
        "engine": "vllm",
        "connector": "pdcoord",
        "layout": policy_layout(profile.layout),
        "kv_bytes_per_token": profile.kv_bytes_per_token,
        "link_gbit_per_s": profile.link_gbit_per_s.value,
        "endpoints": [
            {"name": name, "address": str(address)}
            for name, address in addresses.items()
            if name.startswith(pool.name)
        ],
        "speed": policy_speed(profile),
        "cost_per_hour": pool.cost_per_hour,
    }


def _dump(path: Path, document: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump({"apiVersion": API_VERSION, **document}, sort_keys=False))
