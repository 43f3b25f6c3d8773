"""The fleet under chaos: emulated prefill and decode engines, sidecars and two gateways, each a process."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.chaos.programs import Part
from pdcoord.protocol.headers import HostPort, format_host_port
from pdcoord.sim.ports import free_ports

MODEL = "org/model"
SEED = 5
STEP_MS = 15
PREFILLS = ("prefill-0", "prefill-1")
DECODES = ("decode-0", "decode-1", "decode-2")
GATEWAYS = ("gateway-0", "gateway-1")
LEASE_S = 5.0
DRAIN_S = 4.0
STALL_S = 1.5
ANSWER_S = 20.0
"""Longest wait for an answer in one piece: nothing else tells of an engine that is silent in its middle."""
_SPEED = {"prefill_base_ms": 3, "prefill_ms_per_token": 0.02, "step_base_ms": STEP_MS}
_HEAD = {"apiVersion": "pdcoord.io/v1alpha1"}
LOOPBACK = "127.0.0.1"
_UCX = {"UCX_TLS": "tcp,self", "NIXL_LOG_LEVEL": "WARN"}
"""Hosts that are namespaces still share memory, and UCX would find out: KV goes through their cables."""


def hosts_of(part: str) -> str:
    """The pod that a part lives in: a sidecar in its engine's."""
    return part.removesuffix("-sidecar")


def lay_out(
    folder: Path,
    hosts: Mapping[str, str] | None = None,
    prefixes: Mapping[str, Sequence[str]] | None = None,
    *,
    kv_backend: str | None = None,
) -> list[Part]:
    """Write the fleet and the policy into `folder`; every part, in the order to start them.

    Args:
        hosts: address of each pod; all on loopback if not given.
        prefixes: what precedes the commands of a pod.
        kv_backend: what engines hand real KV over with; without one they have none.
    """
    hosts, prefixes = hosts or {}, prefixes or {}
    pods = (*PREFILLS, *DECODES)
    ports = iter(free_ports(3 * len(pods) + 2 * len(DECODES) + 2 * len(GATEWAYS)))
    engines = {name: (hosts.get(name, LOOPBACK), next(ports), next(ports), next(ports)) for name in pods}
    specs = [
        {
            "name": name,
            "profile": "nvidia-h100-8b" if name.endswith("0") else "amd-mi300x-8b",
            "role": name.partition("-")[0],
            "host": host,
            "port": port,
            "side_channel_port": side,
            **({"kv_port": kv, "kv_always": True, "kv_backend": kv_backend} if kv_backend else {}),
            "layout": {"block_tokens": 16},
            "kv_blocks": 4_096,
            "context_tokens_max": 8_192,
            "speed": _SPEED,
            "lease_s": LEASE_S,
            "handshake_s": 0.01,
            "pull_timeout_s": 5.0,
            "shutdown_timeout_s": DRAIN_S,
        }
        for name, (host, port, side, kv) in engines.items()
    ]
    fleet = {"kind": "EmulatedFleet", "seed": SEED, "model": MODEL, "engines": specs}
    (folder / "fleet.yaml").write_text(json.dumps({**_HEAD, **fleet}))
    parts = []
    for name, (host, port, *side_ports) in engines.items():
        address = format_host_port(host, port)
        command = ["pdcoord", "emulate", str(folder / "fleet.yaml"), "--engine", name]
        prefix = prefixes.get(name, ())
        ready = (address, "/health")
        kind, env = name.partition("-")[0], _UCX if kv_backend == "nixl" else {}
        parts.append(Part(name, kind, command, address, ready, address, env, prefix, tuple(side_ports)))
    parts += [_sidecar(name, engines, next(ports), next(ports), prefixes) for name in DECODES]
    served = [part.address for part in parts if part.kind in {"prefill", "sidecar"}]
    policy = _policy(served[: len(PREFILLS)], served[len(PREFILLS) :])
    (folder / "policy.yaml").write_text(json.dumps({**_HEAD, **policy}))
    for name in GATEWAYS:
        host, port, admin = hosts.get(name, LOOPBACK), next(ports), next(ports)
        env = {
            "PDCOORD_HOST": host,
            "PDCOORD_PORT": str(port),
            "PDCOORD_ADMIN_PORT": str(admin),
            "PDCOORD_POLICY": str(folder / "policy.yaml"),
            "PDCOORD_DRAIN_NOTICE_S": "0.3",
            "PDCOORD_ANSWER_TIMEOUT_S": str(2 * ANSWER_S),
        }
        address, prefix = format_host_port(host, port), prefixes.get(name, ())
        ready = (address, "/livez")
        parts.append(Part(name, "gateway", ["pdcoord", "serve"], address, ready, address, env, prefix))
    return parts


def _sidecar(
    name: str,
    engines: Mapping[str, tuple[str, int, int, int]],
    port: int,
    metrics: int,
    prefixes: Mapping[str, Sequence[str]],
) -> Part:
    host, engine, _, _ = engines[name]
    allowed = [format_host_port(engines[each][0], engines[each][1]) for each in PREFILLS]
    command = [
        *("pdcoord-sidecar", "--host", host, "--port", str(port)),
        *("--metrics-host", host, "--metrics-port", str(metrics)),
        *("--engine", format_host_port(host, engine), "--allow", ",".join(allowed)),
        *("--drain-s", str(DRAIN_S), "--answer-ms", str(ANSWER_S * 1e3)),
    ]
    address, told = format_host_port(host, port), format_host_port(host, metrics)
    prefix = prefixes.get(name, ())
    return Part(f"{name}-sidecar", "sidecar", command, address, (told, "/livez"), told, prefix=prefix)


def _policy(prefills: Sequence[HostPort], decodes: Sequence[HostPort]) -> dict[str, Any]:
    def pool(role: str, addresses: Sequence[HostPort]) -> dict[str, Any]:
        return {
            "name": role,
            "role": role,
            "vendor": "v",
            "engine": "vllm",
            "connector": "pdcoord",
            "layout": {"block_tokens": 16},
            "kv_bytes_per_token": 131_072,
            "link_gbit_per_s": 100,
            "speed": _SPEED,
            "endpoints": [{"name": str(i), "address": each} for i, each in enumerate(addresses)],
        }

    return {
        "kind": "PoolPolicy",
        "metadata": {"name": "chaos"},
        # Few enough to be full soon, so that a soak sees what grows beyond its bounds.
        "model": {"name": MODEL, "prefix": {"blocks_per_endpoint_max": 1_024}},
        "disaggregation": {
            "mode": "always",
            "prefill_deadline_ms": 3_000,
            "transfer_deadline_ms": 3_000,
        },
        "fallback": {"resume": {"stall_ms_min": STALL_S * 1e3}, "budget": {"colocated_share_max": 1.0}},
        "pools": [pool("prefill", prefills), pool("decode", decodes)],
    }
