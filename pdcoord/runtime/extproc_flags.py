"""The flags of `pdcoord extproc`: its own, and those that manifests made for other endpoint pickers pass.

Names: gateway-api-inference-extension 1.5 and llm-d-router ebab6879. They are written as Go's flag package
takes them: one dash or two, a value behind `=` or a blank, a boolean alone for true.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn


class FlagError(ValueError):
    """A flag that is not known, or its value cannot be used; the message names it."""


# Flags of other pickers that change nothing here, with why.
IGNORED: dict[str, str] = {
    name: why
    for why, names in {
        "logs are JSON; PDCOORD_LOG_LEVEL sets the level": (
            "zap-encoder zap-log-level zap-devel zap-stacktrace-level zap-time-encoding v logtostderr vmodule"
        ),
        "the policy says which engine a pool has, and with it the metrics' names": (
            "total-queued-requests-metric total-running-requests-metric kv-cache-usage-percentage-metric "
            "lora-info-metric cache-info-metric"
        ),
        "engines are scraped where the policy or a pod's annotations say": (
            "model-server-metrics-scheme model-server-metrics-path model-server-metrics-port "
            "model-server-metrics-https-insecure-skip-verify"
        ),
        "PDCOORD_SCRAPE_INTERVAL_S and its neighbours bound how engines are scraped": (
            "refresh-metrics-interval refresh-prometheus-metrics-interval metrics-staleness-threshold"
        ),
        "the policy decides": "config-file config-text",
        "replicas share their load over the control stream and need no leader": "ha-enable-leader-election",
        "health is served wherever the picker is": "health-checking",
        "metrics are served without authentication": "metrics-endpoint-auth",
        "certificates are looked at again at each handshake": "enable-cert-reload",
        "traces follow the standard OTEL_* variables": "tracing",
        "there is none": "enable-pprof pool-group destination-endpoint-hint-key "
        "destination-endpoint-hint-metadata-namespace",
    }.items()
    for name in names.split()
}

# Each of ours, with the setting that it stands for.
_SETTINGS = {
    "policy": "PoolPolicy file",
    "endpoints": "endpoints file for pools with a selector",
    "host": "address to listen on",
    "grpc_port": "port for Envoy (9002)",
    "grpc_health_port": "port of grpc.health.v1 (9003)",
    "metrics_port": "port of GET /metrics (9090)",
    "cert_path": "folder with tls.crt and tls.key; without it a certificate is made at each start",
    "admin_host": "address of the admin listener (127.0.0.1)",
    "admin_port": "port of the admin listener (8081)",
    "log_level": "debug, info, warning or error",
    "fallbacks_max": "endpoints named behind the primary (2)",
    "drain_s": "how long calls may take to end when stopped (30)",
}
_PATHS = "a path that any endpoint may be sent whatever the method, beside the API's; once for each"
_SWITCHES = {
    "secure_serving": "TLS on the port for Envoy (true)",
    "conformance": "obey the header test-epp-endpoint-selection (false)",
}
_WORDS = {"true": "true", "t": "true", "1": "true", "false": "false", "f": "false", "0": "false"}


@dataclass(frozen=True, slots=True)
class Flags:
    """What the command line says.

    Attributes:
        settings: by field name; None where nothing was said.
        ignored: `--flag: why`, of flags that change nothing.
        help: the text that was asked for; "" if it was not.
    """

    settings: dict[str, str | bool | None] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    help: str = ""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise FlagError(message)


def read_flags(arguments: Sequence[str], environment: Mapping[str, str]) -> Flags:
    """Read a command line.

    `--pool-name` says that pods and policies are those of Kubernetes, unless files are named here or in the
    environment.

    Raises:
        FlagError: naming the flag.
    """
    parser = _make_parser()
    given = vars(parser.parse_args([_two_dashes(argument) for argument in arguments]))
    if given.pop("help"):
        return Flags(help=parser.format_help())
    ignored = tuple(f"--{name}: {why}" for name, why in IGNORED.items() if given.pop(f"ignored_{name}"))
    pool, namespace = given.pop("pool_name"), given.pop("pool_namespace")
    settings: dict[str, str | bool | None] = dict(given)
    settings["inference_pool"] = pool
    settings["pass_paths"] = ",".join(given["pass_paths"]) if given["pass_paths"] else None
    settings["kubernetes_namespace"] = namespace
    if pool is not None:
        if settings["endpoints"] is None and not environment.get("PDCOORD_ENDPOINTS"):
            settings["kubernetes_pods"] = True
        if settings["policy"] is None and not environment.get("PDCOORD_POLICY"):
            settings["kubernetes_policies"] = True
    return Flags(settings, ignored)


def _make_parser() -> _Parser:
    parser = _Parser(prog="pdcoord extproc", add_help=False, allow_abbrev=False)
    parser.description = "Pick endpoints for Envoy (ext_proc). Further settings are PDCOORD_* variables."
    parser.add_argument("--help", "-h", action="store_true", help="print this")
    for name, meaning in _SETTINGS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", dest=name, metavar="VALUE", help=meaning)
    parser.add_argument("--pass-paths", action="append", metavar="PATH", help=_PATHS)
    for name, meaning in _SWITCHES.items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(
            flag, dest=name, nargs="?", const="true", type=_switch, metavar="true|false", help=meaning
        )
        parser.add_argument(f"--no-{flag[2:]}", dest=name, action="store_const", const="false")
    parser.add_argument("--pool-name", metavar="NAME", help="InferencePool whose pods are picked from")
    parser.add_argument("--pool-namespace", metavar="NAME", help="its namespace")
    for name in IGNORED:
        parser.add_argument(
            f"--{name}", dest=f"ignored_{name}", nargs="?", const="true", help=argparse.SUPPRESS
        )
    return parser


def _switch(word: str) -> str:
    meaning = _WORDS.get(word.lower())
    if meaning is None:
        raise argparse.ArgumentTypeError(f"{word!r} is neither true nor false")
    return meaning


def _two_dashes(argument: str) -> str:
    """Go takes `-name` for `--name`; a number is a value."""
    is_short = argument.startswith("-") and not argument.startswith("--") and argument[1:2].isalpha()
    return f"-{argument}" if is_short and argument != "-h" else argument
