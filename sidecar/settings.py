"""The flags of the sidecar process, each with its environment variable, default and meaning."""

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.plans import KV_PORT, DialectName, PrefillTarget
from sidecar.agreement import check_together
from sidecar.errors import SettingsError
from sidecar.guard import DEADLINE_MS_MAX, Peer, normal_address, read_entry

ENV_PREFIX = "PDCOORD_SIDECAR_"
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?")
LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that a sidecar process is told; one attribute per flag, see FLAGS."""

    host: str
    port: int
    engine: HostPort
    dialect: DialectName
    allow: tuple[PrefillTarget | Peer, ...]
    allow_file: Path | None
    allow_any: bool
    metrics_host: str
    metrics_port: int
    drain_s: float
    stream_idle_ms: float
    answer_ms: float
    prefill_deadline_ms: float
    transfer_deadline_ms: float
    fallback_colocated: bool
    bootstrap_port: int
    kv_port: int
    kv_agent: HostPort | None
    kv_key_file: Path | None
    probe_interval_s: float
    body_bytes_max: int
    bodies_bytes_max: int
    live_max: int
    resume_bytes_max: int
    control: tuple[HostPort, ...]
    control_address: HostPort | None
    control_key_file: Path | None
    control_ca_file: Path | None
    control_cert_file: Path | None
    control_cert_key_file: Path | None
    allow_from_control: bool
    tls_cert_file: Path | None
    tls_key_file: Path | None
    tls_client_ca_file: Path | None
    upstream_ca_file: Path | None
    upstream_cert_file: Path | None
    upstream_cert_key_file: Path | None
    upstream_tls_name: str
    plan_keys_file: Path | None
    log_level: str


def _read_port(text: str) -> int:
    port = int(text) if text.isascii() and text.isdigit() else -1
    if not 0 <= port <= 65_535:
        raise ValueError("give a port in 0..65535; 0 lets the system pick one")
    return port


def _read_fixed_port(text: str) -> int:
    port = _read_port(text)
    if port == 0:
        raise ValueError("give a port in 1..65535")
    return port


def _read_address(text: str) -> HostPort:
    try:
        return normal_address(text)
    except ValueError as error:
        raise ValueError("give host:port, such as 127.0.0.1:8200 or [::1]:8200") from error


def _read_agent(text: str) -> HostPort | None:
    return _read_address(text) if text else None


def _read_coordinators(text: str) -> tuple[HostPort, ...]:
    return tuple(dict.fromkeys(_read_address(part) for part in text.split(",") if part.strip()))


def _read_entries(text: str) -> tuple[PrefillTarget | Peer, ...]:
    try:
        return tuple(read_entry(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise ValueError(
            "give host:port, such as 10.0.0.1:8000, host:port/kv_port where a KV port is not --kv-port, or "
            "host:port/decode"
        ) from error


def _read_host(text: str) -> str:
    host = text.strip().removeprefix("[").removesuffix("]")
    if not host or any(c.isspace() or c in "/@" for c in host):
        raise ValueError("give a host name or an address to listen on, such as 0.0.0.0 or ::")
    return host


def _read_name(text: str) -> str:
    name = text.strip()
    if name and not _NAME.fullmatch(name):
        raise ValueError("give a host's name, such as sidecar.pdcoord.svc")
    return name


def _read_dialect(text: str) -> DialectName:
    try:
        return DialectName(text)
    except ValueError as error:
        raise ValueError(f"give one of {', '.join(DialectName)}") from error


def _read_level(text: str) -> str:
    if text not in LOG_LEVELS:
        raise ValueError(f"give one of {', '.join(LOG_LEVELS)}")
    return text


def _read_yes_no(text: str) -> bool:
    if text not in {"yes", "no"}:
        raise ValueError("give yes or no")
    return text == "yes"


def _read_path(text: str) -> Path | None:
    return Path(text) if text else None


def _number(low: float, high: float, unit: str) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            raise ValueError(f"give a number of {unit} in {low:g}..{high:g}")
        return value

    return read


def _whole(low: int, high: int, unit: str) -> Callable[[str], int]:
    def read(text: str) -> int:
        count = int(text) if text.isascii() and text.isdigit() and len(text) < 15 else -1
        if not low <= count <= high:
            raise ValueError(f"give a whole number of {unit} in {low}..{high}")
        return count

    return read


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag; its variable is ENV_PREFIX and its name in capitals.

    Attributes:
        metavar: what stands for the value in help; empty for a switch, which takes none.
        default: as it would be written on the command line.
        read: value of a text; raises ValueError saying what to give instead.
    """

    name: str
    metavar: str
    default: str
    read: Callable[[str], Any]
    meaning: str
    is_repeatable: bool = False

    @property
    def attribute(self) -> str:
        return self.name.removeprefix("--").replace("-", "_")

    @property
    def variable(self) -> str:
        return ENV_PREFIX + self.attribute.upper()


_MILLISECONDS = _number(1, DEADLINE_MS_MAX, "milliseconds")

FLAGS: tuple[Flag, ...] = (
    Flag("--host", "HOST", "0.0.0.0", _read_host, "address that requests come in on"),  # noqa: S104  # a pod's own
    Flag("--port", "PORT", "8000", _read_port, "port that requests come in on"),
    Flag("--engine", "HOST:PORT", "127.0.0.1:8200", _read_address, "the engine beside this sidecar"),
    Flag(
        "--dialect",
        "DIALECT",
        "nixlv2",
        _read_dialect,
        "how requests without x-pdcoord-plan are handed over: nixlv2 (vLLM, one leg after the other), "
        "pdcoord (vLLM with our connector, both at once) or sglang",
    ),
    Flag(
        "--allow",
        "HOST:PORT[/KV_PORT|/decode][,...]",
        "",
        _read_entries,
        "prefill targets that may be dialled and, with /decode, decode endpoints at which streams may go on; "
        "repeatable; with none given here or in the file, none may",
        is_repeatable=True,
    ),
    Flag(
        "--allow-file",
        "FILE",
        "",
        _read_path,
        "more of them, one a line, `#` begins a comment; read again within a second of a change",
    ),
    Flag(
        "--allow-any", "", "no", _read_yes_no, "let any prefill target be dialled; as a variable, yes or no"
    ),
    Flag(
        "--metrics-host", "HOST", "127.0.0.1", _read_host, "address of /metrics, /paths, /livez and /readyz"
    ),
    Flag("--metrics-port", "PORT", "9400", _read_port, "port of /metrics, /paths, /livez and /readyz"),
    Flag(
        "--drain-s",
        "SECONDS",
        "30",
        _number(0, 86_400, "seconds"),
        "how long running requests may go on after SIGTERM",
    ),
    Flag(
        "--stream-idle-ms",
        "MS",
        "60000",
        _MILLISECONDS,
        "longest time in which an answer that has begun may make no progress",
    ),
    Flag(
        "--answer-ms",
        "MS",
        "600000",
        _MILLISECONDS,
        "longest wait for the first output where no transfer deadline applies: colocated calls, and calls "
        "that are not streamed, whose first output comes after the whole generation",
    ),
    Flag(
        "--prefill-deadline-ms",
        "MS",
        "60000",
        _MILLISECONDS,
        "longest wait for a prefill leg's answer, for requests without x-pdcoord-plan",
    ),
    Flag(
        "--transfer-deadline-ms",
        "MS",
        "20000",
        _MILLISECONDS,
        "longest wait from a good prefill leg to a stream's first output, for requests without "
        "x-pdcoord-plan; keep it below the KV lease (vLLM: 30 s)",
    ),
    Flag(
        "--fallback-colocated",
        "yes|no",
        "yes",
        _read_yes_no,
        "whether requests without x-pdcoord-plan may end on the engine's own prefill; never in sglang, "
        "whose decode engines cannot",
    ),
    Flag(
        "--bootstrap-port",
        "PORT",
        "8998",
        _read_fixed_port,
        "sglang: rendezvous port of a prefill target that names none",
    ),
    Flag(
        "--kv-port",
        "PORT",
        str(KV_PORT),
        _read_fixed_port,
        "pdcoord: KV side channel of a prefill target that names none",
    ),
    Flag(
        "--kv-agent",
        "HOST:PORT",
        "",
        _read_agent,
        "KV side channel of this pod's own engine; with it every allowed target is probed, see Paths",
    ),
    Flag(
        "--kv-key-file",
        "FILE",
        "",
        _read_path,
        "file with the key that the side channels share; none if they have none",
    ),
    Flag(
        "--probe-interval-s",
        "SECONDS",
        "30",
        _number(1, 86_400, "seconds"),
        "time between two probes of a target that answers; one that does not is asked sooner",
    ),
    Flag("--body-bytes-max", "BYTES", "67108864", _whole(1_024, 1 << 30, "bytes"), "longest request body"),
    Flag(
        "--bodies-bytes-max",
        "BYTES",
        "268435456",
        _whole(1_024, 1 << 40, "bytes"),
        "bodies of all requests being read or served together; one that finds no room gets 429",
    ),
    Flag(
        "--live-max",
        "COUNT",
        "4096",
        _whole(1, 1_000_000, "requests"),
        "requests being read or served; one more gets 429",
    ),
    Flag(
        "--resume-bytes-max",
        "BYTES",
        "268435456",
        _whole(0, 1 << 40, "bytes"),
        "what is kept of all running streams together, so that they can be continued; a stream that finds no "
        "room is passed on all the same",
    ),
    Flag(
        "--control",
        "HOST:PORT[,...]",
        "",
        _read_coordinators,
        "coordinators that are told of every request; repeatable; a name stands for all its addresses, "
        "looked up again and again; see control.md",
        is_repeatable=True,
    ),
    Flag(
        "--control-address",
        "HOST:PORT",
        "",
        _read_agent,
        "this sidecar as endpoints name it; else the local address that reaches the coordinator, and --port",
    ),
    Flag(
        "--control-key-file",
        "FILE",
        "",
        _read_path,
        "file with the key that sidecars and coordinators share; each side proves that it has it",
    ),
    Flag(
        "--control-ca-file",
        "FILE",
        "",
        _read_path,
        "PEM file of who signs coordinators' certificates; with it control streams are encrypted",
    ),
    Flag("--control-cert-file", "FILE", "", _read_path, "PEM file of this sidecar's own certificate chain"),
    Flag("--control-cert-key-file", "FILE", "", _read_path, "PEM file of that certificate's key"),
    Flag(
        "--allow-from-control",
        "",
        "no",
        _read_yes_no,
        "let the prefill targets and decode endpoints be dialled that proven coordinators name; as a "
        "variable, yes or no",
    ),
    Flag(
        "--tls-cert-file",
        "FILE",
        "",
        _read_path,
        "PEM file of this sidecar's certificate chain; with it both listeners speak TLS only, see tls.md",
    ),
    Flag("--tls-key-file", "FILE", "", _read_path, "PEM file of that certificate's key"),
    Flag(
        "--tls-client-ca-file",
        "FILE",
        "",
        _read_path,
        "PEM file of who signs clients' certificates; with it whoever sends requests needs one, and whoever "
        "reads metrics does not",
    ),
    Flag(
        "--upstream-ca-file",
        "FILE",
        "",
        _read_path,
        "PEM file of who signs the certificates of prefill pods and other sidecars; with it they are spoken "
        "to over TLS only; the own engine never is",
    ),
    Flag("--upstream-cert-file", "FILE", "", _read_path, "PEM file of the certificate shown to them"),
    Flag("--upstream-cert-key-file", "FILE", "", _read_path, "PEM file of that certificate's key"),
    Flag(
        "--upstream-tls-name",
        "NAME",
        "",
        _read_name,
        "the name that all their certificates bear, in place of the host that is dialled",
    ),
    Flag(
        "--plan-keys-file",
        "FILE",
        "",
        _read_path,
        "keys shared with the gateway, one a line as NAME:SECRET; with it only signed plans are served",
    ),
    Flag("--log-level", "LEVEL", "info", _read_level, "least level that is logged: " + ", ".join(LOG_LEVELS)),
)


class _Parser(argparse.ArgumentParser):
    """argparse whose own complaints are SettingsErrors too."""

    def error(self, message: str) -> NoReturn:
        raise SettingsError("command line", message, "see pdcoord-sidecar --help")


def parse(arguments: Sequence[str], environment: Mapping[str, str]) -> Settings:
    """Settings from the command line, then the environment, then the defaults.

    Raises:
        SettingsError: naming the flag or variable, its value and what to give instead.
    """
    parser = _Parser(
        prog="pdcoord-sidecar",
        description="Hands requests over beside a decode engine: prefill elsewhere, decode here.",
        epilog=f"Each flag can also be given as {ENV_PREFIX}NAME, such as {ENV_PREFIX}ALLOW. "
        "`--describe flags` (headers, states, rules, transitions, metrics) prints the reference instead.",
        allow_abbrev=False,
    )
    for flag in FLAGS:
        shown = f"{flag.meaning} (default: {flag.default or 'none'})"
        if not flag.metavar:
            parser.add_argument(flag.name, action="store_const", const="yes", help=shown)
        elif flag.is_repeatable:
            parser.add_argument(flag.name, action="append", metavar=flag.metavar, help=shown)
        else:
            parser.add_argument(flag.name, metavar=flag.metavar, help=shown)
    given = parser.parse_args(arguments)
    values = {flag.attribute: _value(flag, given, environment) for flag in FLAGS}
    check_together(values)
    return Settings(**values)


def _value(flag: Flag, given: argparse.Namespace, environment: Mapping[str, str]) -> Any:
    source, text = flag.name, getattr(given, flag.attribute)
    if isinstance(text, list):
        text = ",".join(text)
    if text is None:
        source, text = flag.variable, environment.get(flag.variable)
        if text is not None and text.startswith("tcp://"):
            # Kubernetes gives pods beside a Service named pdcoord-sidecar such a ..._PORT.
            text = None
    if text is None:
        source, text = flag.name, flag.default
    try:
        return flag.read(text)
    except ValueError as error:
        raise SettingsError(source, text, str(error)) from error
