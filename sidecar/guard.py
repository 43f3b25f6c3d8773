"""Decides whom the sidecar may dial and which headers may pass: nothing that is not on the list."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec

from pdcoord.protocol.errors import Refusal, RefusedError, RefuseReason
from pdcoord.protocol.headers import (
    PLAN,
    PREFILLER_HOST_PORT,
    PREFIX,
    REQUEST_ID,
    HostPort,
    format_host_port,
    is_request_id,
    is_routing,
    parse_host_port,
)
from pdcoord.protocol.plans import (
    DialectName,
    PlanHeader,
    PlanHeaderError,
    PlannedLoad,
    PrefillTarget,
    decode_plan,
)
from pdcoord.protocol.signing import PLAN_SIGNATURE, SKEW_S_MAX, Doubt, Steering
from pdcoord.wire.files import read_regular
from sidecar.errors import SettingsError

LEG = PREFIX + b"leg"
"""Sidecar to engine: `prefill` on a prefill leg, so that a sidecar in front of that engine lets it ask for
a ticket. A routing header: stripped from clients by the gateway."""
PREFILL_LEG = b"prefill"

# Past these a header is not a plan but an attack on the ladder's bound or on our memory.
PREFILLS_MAX = 8
RESUMES_MAX = 8
RESUME_TRIES_MAX = 16
DEADLINE_MS_MAX = 3_600_000.0
ALLOW_FILE_BYTES_MAX = 1 << 22

Headers = list[tuple[bytes, bytes]]

UNSIGNED_PATHS = frozenset(
    {
        "/metrics",
        "/version",
        "/v1/models",
        "/tokenize",
        "/detokenize",
        "/v1/chat/completions/render",
        "/v1/completions/render",
    }
)
"""What a sidecar with keys serves without a signature: what coordinators ask of engines outside any call. No
engine computes a token for it."""

# Ours to set. Compressed answers could not be read for their first output nor for their usage.
_REPLACED = frozenset({REQUEST_ID, b"host", b"content-length", b"accept-encoding"})


def normal_address(text: str) -> HostPort:
    """One spelling for each address: a lower-case host without a final dot, IPv6 in brackets.

    Raises:
        ValueError: if it is not host:port.
    """
    host, port = parse_host_port(text)
    return format_host_port(host.lower().rstrip("."), port)


def read_target(text: str) -> PrefillTarget:
    """A target as lists name it: `host:port`, or `host:port/kv_port` where the KV port is its own.

    Raises:
        ValueError: if it is neither.
    """
    address, slash, port = text.strip().partition("/")
    if not slash:
        return PrefillTarget(address=normal_address(address))
    _, kv_port = parse_host_port(f"kv:{port}")
    return PrefillTarget(address=normal_address(address), kv_port=kv_port)


@dataclass(frozen=True, slots=True)
class Peer:
    """A decode endpoint at which streams may go on, as lists name it: `host:port/decode`. Never probed."""

    address: HostPort


def read_entry(text: str) -> PrefillTarget | Peer:
    """An entry of the allowlist: a prefill target, or a decode endpoint.

    Raises:
        ValueError: if it is neither.
    """
    address, _, role = text.strip().partition("/")
    return Peer(normal_address(address)) if role == "decode" else read_target(text)


class Told(Protocol):
    """What coordinators name: prefill targets, and decode endpoints at which streams may go on."""

    def get(self, address: HostPort) -> PrefillTarget | None: ...

    def targets(self) -> Iterable[PrefillTarget]: ...

    def has_decode(self, address: HostPort) -> bool: ...


class Allowlist:
    """Whom this sidecar may dial; host and port both count. Empty means nobody.

    Attributes:
        path: a file with one entry a line; `#` begins a comment. None if there is no file.
    """

    def __init__(
        self, entries: Iterable[PrefillTarget | Peer] = (), *, path: Path | None = None, is_open: bool = False
    ) -> None:
        """Reads the file.

        Raises:
            SettingsError: if the file cannot be read or has a line that is no entry.
        """
        self.path = path
        self._fixed, self._fixed_peers = _sorted_out(entries)
        self._file_peers: frozenset[HostPort] = frozenset()
        self._from_file: dict[HostPort, PrefillTarget] = {}
        self._is_open = is_open
        self._told: Told | None = None
        self._stamp: tuple[int, int, int] | None = None
        self.reload()

    def __len__(self) -> int:
        return len(self.targets())

    def follow(self, told: "Told") -> None:
        """From now on whatever coordinators name is listed too."""
        self._told = told

    def allows_decode(self, address: HostPort) -> bool:
        """Whether a stream may go on there: a prefill target may well decode too."""
        if self.allows(address) or address in self._fixed_peers or address in self._file_peers:
            return True
        return self._told is not None and self._told.has_decode(address)

    def allows(self, address: HostPort) -> bool:
        """Whether a prefill leg may go there."""
        if self._is_open or address in self._fixed or address in self._from_file:
            return True
        return self._told is not None and self._told.get(address) is not None

    def targets(self) -> list[PrefillTarget]:
        """Each address once; the file goes before the command line, both before what is told."""
        told = {} if self._told is None else {target.address: target for target in self._told.targets()}
        return list((told | self._fixed | self._from_file).values())

    def allows_ports(self, target: PrefillTarget, *, kv_port: int, bootstrap_port: int) -> bool:
        """Whether a target's other ports are those that lists give it, or the usual ones where none does."""
        if self._is_open:
            return True
        told = None if self._told is None else self._told.get(target.address)
        listed = [self._from_file.get(target.address), self._fixed.get(target.address), told]
        kv_ports = {each.kv_port for each in listed if each is not None} - {None} or {kv_port}
        bootstrap_ports = {each.bootstrap_port for each in listed if each is not None} - {None}
        return target.kv_port in {None, *kv_ports} and target.bootstrap_port in {
            None,
            *(bootstrap_ports or {bootstrap_port}),
        }

    def kv_port(self, address: HostPort) -> int | None:
        """The KV port that the list gives a target; None if it gives none."""
        target = self._from_file.get(address) or self._fixed.get(address)
        if target is None and self._told is not None:
            target = self._told.get(address)
        return None if target is None else target.kv_port

    def reload(self) -> bool:
        """Read the file again if it has changed; True if the list was replaced.

        Raises:
            SettingsError: as when it was first read; the last good list stays.
        """
        if self.path is None:
            return False
        try:
            stat = self.path.stat()
            stamp = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
            if stamp == self._stamp:
                return False
            self._stamp = stamp  # A bad file is reported once, not at every look.
            text = read_regular(self.path, ALLOW_FILE_BYTES_MAX).decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise SettingsError(
                "--allow-file", str(self.path), f"cannot be read ({reason}); name a readable text file"
            ) from error
        if len(text) > ALLOW_FILE_BYTES_MAX:
            remedy = f"is longer than {ALLOW_FILE_BYTES_MAX} bytes; name a list of targets"
            raise SettingsError("--allow-file", str(self.path), remedy)
        self._from_file, self._file_peers = _sorted_out(_read_lines(text, str(self.path)))
        return True


def _sorted_out(
    entries: Iterable[PrefillTarget | Peer],
) -> tuple[dict[HostPort, PrefillTarget], frozenset[HostPort]]:
    """Prefill targets by address, and the addresses of peers."""
    listed = list(entries)
    targets = {each.address: each for each in listed if isinstance(each, PrefillTarget)}
    return targets, frozenset(each.address for each in listed if isinstance(each, Peer))


def _read_lines(text: str, name: str) -> list[PrefillTarget | Peer]:
    entries = []
    for number, line in enumerate(text.splitlines(), start=1):
        entry = line.partition("#")[0].strip()
        if not entry:
            continue
        try:
            entries.append(read_entry(entry))
        except ValueError as error:
            remedy = (
                f"line {number}: {error}; write one host:port, host:port/kv_port or host:port/decode a line"
            )
            raise SettingsError("--allow-file", name, remedy) from error
    return entries


@dataclass(frozen=True, slots=True)
class Asked:
    """What the headers of a request ask for.

    Attributes:
        plan: its prefills and resumes are in normal spelling; no prefills means nobody asked for a split.
        refused: those of its prefills that the allowlist turns down.
        refused_resumes: those of its resumes.
        is_prefill_leg: another sidecar sends this as a prefill leg.
        is_counted: it is work that coordinators are told of; another sidecar tells of prefill legs.
    """

    plan: PlanHeader
    refused: frozenset[HostPort] = frozenset()
    refused_resumes: frozenset[HostPort] = frozenset()
    is_prefill_leg: bool = False
    is_counted: bool = False


class Seal(Protocol):
    """Tells whether headers come from somebody who shares a key."""

    def doubt(self, what: Steering, signature: bytes | None) -> Doubt | None: ...


@dataclass(frozen=True, slots=True)
class Guard:
    """Reads routing headers and filters all headers.

    Attributes:
        dialect, is_colocated_allowed, prefill_deadline_ms, transfer_deadline_ms: what a request without
            x-pdcoord-plan gets.
        make_request_id: gives a fresh request id.
        bootstrap_port, kv_port: of a prefill target that names none, and the only ones that an unsigned plan
            may name where no list gives others.
        seal: with it only signed requests are served, but for UNSIGNED_PATHS.
        count_doubt: told of each that is not.
    """

    allowlist: Allowlist
    dialect: DialectName
    is_colocated_allowed: bool
    prefill_deadline_ms: float
    transfer_deadline_ms: float
    make_request_id: Callable[[], str]
    bootstrap_port: int
    kv_port: int
    seal: Seal | None = None
    count_doubt: Callable[[Doubt], None] | None = None

    def check_signature(self, method: str, target: str, headers: Headers) -> None:
        """Let in whoever shares a key, if there are keys.

        Args:
            target: path and query as they came.

        Raises:
            RefusedError: 403, unless what the headers ask for is signed, just now, for this method, target
                and request's id.
        """
        doubt = self._doubt(method, target, headers)
        if doubt is None or target.partition("?")[0] in UNSIGNED_PATHS:
            return
        if self.count_doubt is not None:
            self.count_doubt(doubt)
        message = (
            f"This sidecar serves signed plans only, and the signature is {doubt}; send the request to the "
            f"gateway, which signs with a shared key and a clock that is right within {SKEW_S_MAX} s."
        )
        raise RefusedError(Refusal(RefuseReason.PLAN_UNSIGNED, message))

    def _doubt(self, method: str, target: str, headers: Headers) -> Doubt | None:
        if self.seal is None:
            return None
        signatures = [value for name, value in headers if name == PLAN_SIGNATURE]
        if len(signatures) > 1:
            return Doubt.MALFORMED
        plan, prefills, leg = (
            b",".join(value for name, value in headers if name == wanted)
            for wanted in (PLAN, PREFILLER_HOST_PORT, LEG)
        )
        call = (method.encode("latin-1"), target.encode("latin-1"), self.request_id(headers))
        what = Steering(*call, plan=plan, prefills=prefills, leg=leg)
        return self.seal.doubt(what, signatures[0] if signatures else None)

    def read(self, headers: Headers) -> Asked:
        """What the request asks for.

        Raises:
            RefusedError: 400 for a header that cannot be read, 403 if a foreign one names a target that
                is not on the allowlist.
        """
        plans = [value for name, value in headers if name == PLAN]
        if plans:
            return self._read_plan(plans)
        named = [value for name, value in headers if name == PREFILLER_HOST_PORT]
        plan = PlanHeader(
            prefills=self._read_foreign(named),
            dialect=self.dialect,
            # SGLang's decode engines refuse a call without a rendezvous: it would hide the real failure.
            is_colocated_allowed=self.is_colocated_allowed and self.dialect is not DialectName.SGLANG,
            prefill_deadline_ms=self.prefill_deadline_ms,
            transfer_deadline_ms=self.transfer_deadline_ms,
        )
        is_prefill_leg = not named and (LEG, PREFILL_LEG) in headers
        return Asked(plan, is_prefill_leg=is_prefill_leg, is_counted=not is_prefill_leg)

    def read_load(self, method: str, target: str, headers: Headers) -> PlannedLoad | None:
        """What the plan of a call that is never split says of its load, if there is one that can be read."""
        plans = [value for name, value in headers if name == PLAN]
        if not plans or self._doubt(method, target, headers) is not None:
            return None
        try:
            return decode_plan(plans[0]).load
        except PlanHeaderError:
            return None

    def request_id(self, headers: Headers) -> bytes:
        """The client's own id if it is fit to be passed on and logged, else a fresh one."""
        for name, value in headers:
            if name == REQUEST_ID and is_request_id(value):
                return value
        return self.make_request_id().encode("ascii")

    def _read_plan(self, plans: list[bytes]) -> Asked:
        if len(plans) > 1:
            raise _invalid(PLAN, "is given more than once; send it once")
        try:
            plan = decode_plan(plans[0])
            targets = tuple(self._normal_target(target) for target in plan.prefills)
            resumes = tuple(dict.fromkeys(normal_address(address) for address in plan.resumes))
        except PlanHeaderError as error:
            raise _invalid(PLAN, f"cannot be executed ({error})") from error
        except ValueError as error:
            raise _invalid(PLAN, f"names a target that cannot be dialled ({error})") from error
        if len(targets) > PREFILLS_MAX:
            raise _invalid(PLAN, f"names {len(targets)} prefill targets; name at most {PREFILLS_MAX}")
        if len(resumes) > RESUMES_MAX or plan.resume_tries_max > RESUME_TRIES_MAX:
            most = f"at most {RESUMES_MAX} endpoints and {RESUME_TRIES_MAX} tries"
            raise _invalid(PLAN, f"asks for more resuming than is done here; ask for {most}")
        longest_ms = max(plan.prefill_deadline_ms, plan.transfer_deadline_ms, plan.resume_stall_ms)
        if not longest_ms <= DEADLINE_MS_MAX:
            raise _invalid(
                PLAN, f"has a deadline of {longest_ms:g} ms; at most {DEADLINE_MS_MAX:g} may be asked"
            )
        plan = msgspec.structs.replace(plan, prefills=targets, resumes=resumes)
        refused = frozenset(target.address for target in targets if not self._allows(target))
        refused_resumes = frozenset(each for each in resumes if not self.allowlist.allows_decode(each))
        return Asked(plan, refused, refused_resumes, is_counted=True)

    def _allows(self, target: PrefillTarget) -> bool:
        """Whether a plan may name it; whoever shares a key is believed what ports it has."""
        if not self.allowlist.allows(target.address):
            return False
        ports = {"kv_port": self.kv_port, "bootstrap_port": self.bootstrap_port}
        return self.seal is not None or self.allowlist.allows_ports(target, **ports)

    def _read_foreign(self, values: list[bytes]) -> tuple[PrefillTarget, ...]:
        targets: dict[HostPort, PrefillTarget] = {}
        for text in b",".join(values).decode("latin-1").split(","):
            if not text.strip():
                continue
            try:
                address = normal_address(text)
            except ValueError as error:
                raise _invalid(PREFILLER_HOST_PORT, f"cannot be read ({error})") from error
            if not self.allowlist.allows(address):
                raise RefusedError(
                    Refusal(
                        RefuseReason.TARGET_NOT_ALLOWED,
                        f"x-prefiller-host-port names {address}, which is not on this sidecar's allowlist; "
                        "add it with --allow or --allow-file.",
                    )
                )
            targets.setdefault(
                address, PrefillTarget(address=address, kv_port=self.allowlist.kv_port(address))
            )
        return tuple(targets.values())[:PREFILLS_MAX]

    def _normal_target(self, target: PrefillTarget) -> PrefillTarget:
        for name, port in (("bootstrap_port", target.bootstrap_port), ("kv_port", target.kv_port)):
            if port is not None and not 0 < port <= 65_535:
                raise ValueError(f"{name} is {port}, expected 1..65535")
        address = normal_address(target.address)
        kv_port = self.allowlist.kv_port(address) if target.kv_port is None else target.kv_port
        return PrefillTarget(address=address, bootstrap_port=target.bootstrap_port, kv_port=kv_port)


def _invalid(header: bytes, what: str) -> RefusedError:
    name = header.decode("ascii")
    return RefusedError(Refusal(RefuseReason.INVALID_FIELD, f"The header {name} {what[:300]}.", name))


def for_engine(headers: Headers, request_id: bytes) -> Headers:
    """The client's headers as a leg carries them; hop-by-hop ones are the wire's to drop."""
    kept = [(name, value) for name, value in headers if name not in _REPLACED and not is_routing(name)]
    return [*kept, (REQUEST_ID, request_id)]


def for_client(headers: Headers) -> Headers:
    """An engine's end-to-end headers without those that are ours to set."""
    return [(name, value) for name, value in headers if name != REQUEST_ID and not name.startswith(PREFIX)]
