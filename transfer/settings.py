"""What an agent is told at start: addresses, key, staging, deadlines and bounds, each checked at once."""

import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from transfer.errors import SettingError

ENV_PREFIX = "PDCOORD_KV_"
PORT_DEFAULT = 14579
"""vLLM 0.32's default `kv_port`; a rank listens at this port plus its rank."""

KEY_BYTES_MIN = 16
KEY_BYTES_MAX = 4_096
_MIB = 1 << 20

# (lowest, highest) of every number.
RANGES: dict[str, tuple[float, float]] = {
    "port": (0, 65_535),
    "staging_bytes": (64 << 10, 1 << 44),
    "pattern_bytes": (4 << 10, 64 * _MIB),
    "repack_threads": (1, 64),
    "chunk_tokens_max": (1, 1 << 20),
    "head_runs": (1, 64),
    "transfer_timeout_s": (0.05, 600.0),
    "prefill_timeout_s": (0.0, 600.0),
    "lease_s": (0.1, 3_600.0),
    "heartbeat_s": (0.05, 60.0),
    "handshake_timeout_s": (0.05, 60.0),
    "backoff_first_s": (0.01, 60.0),
    "backoff_max_s": (0.01, 300.0),
    "connections_max": (1, 65_536),
    "peers_max": (1, 65_536),
    "out_bytes_max": (1 * _MIB, 1 << 30),
    "transfers_max": (1, 1 << 20),
    "tcp_port": (0, 65_535),
    "tcp_lanes": (1, 16),
}


@dataclass(frozen=True, slots=True)
class AgentSettings:
    """Everything that an agent is told; RANGES bounds each number, both ends included.

    Attributes:
        listen_host: address that the side channel and the tcp backend listen at.
        advertise_host: address that peers dial. Empty, a wildcard or a loopback address: peers of this host
            only, others are refused with the reason.
        port: side channel port of rank 0, other ranks add their rank; 0 takes a free one.
        key: shared secret of all agents; empty: connections are not authenticated. Never shown.
        backends: names in order of preference, at least one.
        backend_options: by backend name, what that backend is told; unchecked here.
        transports: what the operator counts on, such as `rc` or `dc_mlx5`. A peer is degraded if none of
            them is part of the name of the transport in use, whatever its case; empty: any will do.
        staging_bytes: size of the staging buffer, which offers and landings share.
        staging_device: `cpu`, or a device as torch names it, or `auto`: the engine's device if the first
            backend reaches it, else pinned host memory.
        pattern_bytes: most that a probe reads; five times this is cut from the staging buffer, at most a
            sixth.
        repack_threads: threads that pack and unpack.
        chunk_tokens_max: tokens packed and offered as one.
        head_runs: cuts of a rank's heads, so that consumers of more ranks read only their own.
        transfer_timeout_s: longest time from the engine's asking for a prompt's KV to its last byte in place.
        prefill_timeout_s: with both legs sent at once, how much longer the decode leg waits, for the prompt
            to be computed; the sidecar ends the wait sooner when the prefill leg fails.
        lease_s: how long staged KV is kept for its readers; above `transfer_timeout_s`.
        heartbeat_s: time between signs of life on a connection; after three without one it is closed.
        handshake_timeout_s: longest time of a connect and of a handshake.
        backoff_first_s: how long an address that failed is not dialled again; doubled at each failure.
        backoff_max_s: bound of that.
        connections_max: side channel connections that are served at a time.
        peers_max: producers that are connected at a time.
        out_bytes_max: bytes that may wait to be sent on one connection of the side channel.
        transfers_max: hand-overs that are open at a time, each way.
        tcp_port: data port of the tcp backend's rank 0, other ranks add their rank; 0 takes a free one.
        tcp_lanes: connections to one peer of the tcp backend.

    Raises:
        SettingError: if a value is out of its range or contradicts another.
    """

    listen_host: str = "0.0.0.0"  # noqa: S104  # remote peers are refused unless advertise_host is theirs to dial
    advertise_host: str = ""
    port: int = PORT_DEFAULT
    key: bytes = field(default=b"", repr=False)
    backends: tuple[str, ...] = ("nixl", "tcp")
    backend_options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    transports: tuple[str, ...] = ()
    staging_bytes: int = 1024 * _MIB
    staging_device: str = "cpu"
    pattern_bytes: int = 4 * _MIB
    repack_threads: int = 2
    chunk_tokens_max: int = 512
    head_runs: int = 1
    transfer_timeout_s: float = 5.0
    prefill_timeout_s: float = 60.0
    lease_s: float = 20.0
    heartbeat_s: float = 5.0
    handshake_timeout_s: float = 2.0
    backoff_first_s: float = 0.1
    backoff_max_s: float = 5.0
    connections_max: int = 256
    peers_max: int = 256
    out_bytes_max: int = 8 * _MIB
    transfers_max: int = 4_096
    tcp_port: int = 0
    tcp_lanes: int = 1

    def __post_init__(self) -> None:
        for name, (lowest, highest) in RANGES.items():
            number = getattr(self, name)
            if not lowest <= number <= highest:
                raise SettingError(name, number, f"give a number in {lowest:g}..{highest:g}")
        if self.key and len(self.key) < KEY_BYTES_MIN:
            raise SettingError("key", f"{len(self.key)} bytes", f"give {KEY_BYTES_MIN} at least, or none")
        if not self.backends or not all(self.backends):
            raise SettingError("backends", self.backends, "name at least one backend, such as nixl or tcp")
        if len(set(self.backends)) < len(self.backends):
            raise SettingError("backends", self.backends, "name each backend once")
        if not self.staging_device:
            raise SettingError("staging_device", "", "give cpu, auto, or a device such as cuda:0")
        if self.transfer_timeout_s >= self.lease_s:
            raise SettingError(
                "transfer_timeout_s", self.transfer_timeout_s, f"give less than lease_s, {self.lease_s:g}"
            )
        if self.backoff_first_s > self.backoff_max_s:
            raise SettingError("backoff_first_s", self.backoff_first_s, f"at most {self.backoff_max_s:g}")

    def port_of_rank(self, rank: int) -> int:
        """The side channel port of a rank; 0 if any free one will do.

        Raises:
            SettingError: if it would be past the last port.
        """
        return _rank_port("port", self.port, rank)

    def tcp_port_of_rank(self, rank: int) -> int:
        """Like `port_of_rank`, of the tcp backend."""
        return _rank_port("tcp_port", self.tcp_port, rank)


def _rank_port(name: str, base: int, rank: int) -> int:
    if base == 0:
        return 0
    if base + rank > 65_535:
        raise SettingError(name, base, f"rank {rank} needs {base + rank}: give a lower port")
    return base + rank


def read_key_file(path: str) -> bytes:
    """The shared secret in a file, without white space at its ends.

    Raises:
        SettingError: if the file cannot be read, is open to everyone, or holds too few or too many bytes.
    """
    try:
        with Path(path).open("rb") as file:
            mode = stat.S_IMODE(Path(path).stat().st_mode)
            secret = file.read(KEY_BYTES_MAX + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no file name"
        raise SettingError("key_file", path, f"cannot be read ({reason}): give a readable file") from error
    if mode & (stat.S_IROTH | stat.S_IWOTH):
        remedy = f"mode {mode:04o} lets everyone at it: chmod o-rwx (a Kubernetes secret: defaultMode 0440)"
        raise SettingError("key_file", path, remedy)
    if len(secret) > KEY_BYTES_MAX:
        raise SettingError("key_file", path, f"is longer than {KEY_BYTES_MAX} bytes: is it a key?")
    secret = secret.strip()
    if len(secret) < KEY_BYTES_MIN:
        remedy = (
            f"holds {len(secret)} bytes: give {KEY_BYTES_MIN} at least, such as from openssl rand -hex 32"
        )
        raise SettingError("key_file", path, remedy)
    return secret


def _read_whole(name: str, value: object) -> int:
    if isinstance(value, str) and value.strip().isascii() and value.strip().isdigit():
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise SettingError(name, value, "give a whole number")


def _read_number(name: str, value: object) -> float:
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    raise SettingError(name, value, "give a number of seconds")


def _read_text(name: str, value: object) -> str:
    if isinstance(value, str):
        return value.strip()
    raise SettingError(name, value, "give a text")


def _read_names(name: str, value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    if isinstance(value, (list, tuple)) and all(isinstance(part, str) for part in value):
        return tuple(part.strip() for part in value)
    raise SettingError(name, value, "give a list of names")


def _read_options(name: str, value: object) -> Mapping[str, Mapping[str, Any]]:
    if isinstance(value, Mapping) and all(isinstance(part, Mapping) for part in value.values()):
        return {str(backend): dict(options) for backend, options in value.items()}
    raise SettingError(name, value, "give a mapping of options for each backend's name")


def _reader_of(name: str, default: object) -> Callable[[str, object], Any]:
    if name == "backend_options":
        return _read_options
    if isinstance(default, tuple):
        return _read_names
    if isinstance(default, str):
        return _read_text
    return _read_whole if isinstance(default, int) else _read_number


_FIELDS = {f.name: f.default for f in fields(AgentSettings) if f.name != "key"}


def settings_from_mapping(given: Mapping[str, Any], environ: Mapping[str, str]) -> AgentSettings:
    """Settings from what a person wrote for the engine, and from the environment for what that leaves out.

    Args:
        given: by field name; `key_file` in place of `key`.
        environ: PDCOORD_KV_ and the field in capitals, such as PDCOORD_KV_KEY_FILE; lists with commas.

    Raises:
        SettingError: if a key is unknown, or a value is of a wrong type or out of its range.
    """
    unknown = sorted(set(map(str, given)) - set(_FIELDS) - {"key_file"})
    if unknown:
        known = ", ".join(sorted([*_FIELDS, "key_file"]))
        raise SettingError(unknown[0], given.get(unknown[0]), f"no such setting; there are {known}")
    values: dict[str, Any] = {}
    for name, default in _FIELDS.items():
        value = given.get(name, None if name == "backend_options" else environ.get(ENV_PREFIX + name.upper()))
        if value is not None:
            values[name] = _reader_of(name, default)(name, value)
    key_file = given.get("key_file") or environ.get(f"{ENV_PREFIX}KEY_FILE")
    if key_file:
        values["key"] = read_key_file(_read_text("key_file", key_file))
    return AgentSettings(**values)
