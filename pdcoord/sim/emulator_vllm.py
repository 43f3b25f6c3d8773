"""One emulated engine, told what it is by the command line and the environment of `vllm serve` 0.32.

So a pod that was made for vLLM runs it unchanged, but for the image and the variable that names a profile.
"""

import argparse
import json
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from pydantic import ValidationError

from pdcoord.policy.yamltext import FaultsError
from pdcoord.sim.emulator import run_engines
from pdcoord.sim.fleetfile import EmulatedFleet
from pdcoord.sim.profiles import PROFILES

COMMAND = "pdcoord emulate-vllm"
PROFILE = "PDCOORD_EMULATED_PROFILE"
"""The variable that names the profile: what a real server would learn from its device."""
_SEED = 7
# Ports of vLLM 0.32 where nothing is said.
_NIXL_PORT = 5_600
_KV_PORT = 14_579
# Where consumers of an emulated engine greet it when its KV port is taken by a real transfer agent.
_TICKET_PORT = 5_600
_CONNECTORS = {"PdcoordConnector": "pdcoord", "NixlConnector": "nixl"}


class ServeError(ValueError):
    """A command line that no engine can be made of; the message names the flag or variable."""


def fleet_of(arguments: Sequence[str], environment: Mapping[str, str], host_name: str) -> EmulatedFleet:
    """The fleet of the one engine that such a command line starts; flags of no meaning here are ignored.

    Args:
        arguments: what follows `vllm`.
        host_name: the pod's, which becomes the engine's.

    Raises:
        ServeError: if a flag or a variable that counts has no use.
    """
    given = _parsed(arguments)
    profile = environment.get(PROFILE, "")
    if profile not in PROFILES:
        raise ServeError(f'{PROFILE} is "{profile}", expected one of {", ".join(PROFILES)}')
    engine: dict[str, Any] = {
        "name": host_name[:63].lower(),
        "profile": profile,
        "host": given.host,
        "advertise_host": environment.get("VLLM_HOST_IP"),
        "port": given.port,
        "context_tokens_max": given.max_model_len,
        "running_max": given.max_num_seqs,
        "step_tokens_max": given.max_num_batched_tokens,
        "shutdown_timeout_s": given.shutdown_timeout,
        "layout": _layout(profile, given.block_size),
        **_kv(given.kv_transfer_config, environment),
        **_events(given.kv_events_config),
    }
    document = {
        "apiVersion": "pdcoord.io/v1alpha1",
        "kind": "EmulatedFleet",
        "seed": _SEED,
        "model": given.served_model_name or given.model,
        "engines": [{key: value for key, value in engine.items() if value is not None}],
    }
    try:
        return EmulatedFleet.model_validate_json(json.dumps(document))
    except (ValidationError, FaultsError) as error:
        raise ServeError(f"this makes no emulated engine: {error}") from error


def main(arguments: Sequence[str], out: TextIO | None = None) -> int:
    """Run the engine until SIGTERM; the exit status, 2 if it could not be started."""
    stream = sys.stdout if out is None else out
    try:
        fleet = fleet_of(arguments, os.environ, socket.gethostname())
    except ServeError as error:
        sys.stderr.write(f"{COMMAND}: not started: {error}\n")
        return 2
    return run_engines(fleet, fleet.engines, stream, COMMAND)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ServeError(message)


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(prog="vllm", add_help=False, allow_abbrev=False)
    parser.add_argument("command", choices=["serve"])
    parser.add_argument("model")
    parser.add_argument("--served-model-name")
    parser.add_argument("--host", default="0.0.0.0")  # noqa: S104  # as vLLM's own server in a pod
    parser.add_argument("--port", type=int, default=8_000)
    parser.add_argument("--block-size", type=int)
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--max-num-seqs", type=int)
    parser.add_argument("--max-num-batched-tokens", type=int)
    parser.add_argument("--shutdown-timeout", type=int)
    parser.add_argument("--kv-transfer-config", type=_json)
    parser.add_argument("--kv-events-config", type=_json)
    return parser.parse_known_args(list(arguments))[0]


def _json(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"is {text!r}, expected a JSON object")
    return value


def _layout(profile: str, block_tokens: int | None) -> dict[str, Any] | None:
    """The profile's layout with another block size, or None where it has that one."""
    layout = PROFILES[profile].layout
    if block_tokens in {None, layout.block_tokens}:
        return None
    return {"block_tokens": block_tokens, "order": layout.order.value, "dtype": layout.dtype.value}


def _kv(config: dict[str, Any] | None, environment: Mapping[str, str]) -> dict[str, Any]:
    if config is None:
        return {"connector": "none"}
    name = config.get("kv_connector")
    if name not in _CONNECTORS:
        raise ServeError(f"kv_connector is {name!r}, expected one of {', '.join(_CONNECTORS)}")
    extra = config.get("kv_connector_extra_config", {})
    common = {
        "connector": _CONNECTORS[name],
        "kv_load_failure_policy": config.get("kv_load_failure_policy"),
    }
    if name == "NixlConnector":
        port = int(environment.get("VLLM_NIXL_SIDE_CHANNEL_PORT", _NIXL_PORT))
        return common | {"side_channel_port": port, "lease_s": extra.get("kv_lease_duration")}
    return common | {
        "side_channel_port": _TICKET_PORT,
        "kv_port": config.get("kv_port", _KV_PORT),
        "kv_key_file": environment.get("PDCOORD_KV_KEY_FILE"),
        "lease_s": extra.get("lease_s"),
    }


def _events(config: dict[str, Any] | None) -> dict[str, Any]:
    if config is None or not config.get("enable_kv_cache_events"):
        return {}
    return {
        "kv_events_port": _port(config.get("endpoint", "tcp://*:5557")),
        "kv_events_replay_port": _port(config.get("replay_endpoint")),
    }


def _port(endpoint: str | None) -> int | None:
    if endpoint is None:
        return None
    port = endpoint.rpartition(":")[2]
    if not port.isdecimal():
        raise ServeError(f"--kv-events-config names {endpoint!r}, expected tcp://HOST:PORT")
    return int(port)
