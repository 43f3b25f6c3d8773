"""RoCE and UCX settings, the environment that UCX reads them from, and their check against this node."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from transfer.errors import SettingError

ROCE_V2 = "RoCE v2"
ETHERNET = "Ethernet"
STATE_ACTIVE = "ACTIVE"
# An Ethernet frame of RoCE v2 carries up to 68 bytes beside its payload (IPv6, UDP, BTH, RETH, ICRC).
ROCE_HEADER_BYTES = 68
PATH_MTUS = (4096, 2048, 1024, 512, 256)
GIDS_MAX = 1_024
"""Most GID entries that are read of one port."""

_RDMA_DEVICE = re.compile(r"[A-Za-z][\w.-]*(:[1-9]\d*)?")
_RDMA_TRANSPORT = re.compile(r"\\?(rc|ud|dc|ib|srd|gga)(_\w+)?(:aux)?")
# Named without an alias these bring no transport to connect with: UCX then reports that no active message
# transport is there (UCX 1.21, `ucx_info -cf`, UCX_TLS: rc_v and rc_x "use ud for bootstrap").
_NEEDS_AUXILIARY = frozenset({"rc_verbs", "rc_mlx5", "dc_mlx5"})
_AUXILIARY = re.compile(r"\\?(ud(_\w+)?|tcp|ib|all|rc|rc_v|rc_x|dc|dc_x|srd)(:aux)?")


@dataclass(frozen=True, slots=True)
class RoceSettings:
    """What UCX is told of the network; what is left out stays with UCX and its environment.

    Attributes:
        devices: RDMA devices with port, such as `mlx5_0:1` (without a port, port 1), or network interfaces.
        transports: value of UCX_TLS, such as `rc`, `ud`, `tcp`, `self`, `sm`, `cuda_copy`, `rocm_copy`.
        gid_index: index of the GID to use on every port; it must be RoCE v2 on Ethernet.
        traffic_class: the IP header's traffic class, DSCP times 4; switches choose their queue by it.
        service_level: InfiniBand service level, also the 802.1p priority.
        rails: devices that one read is spread over.

    Raises:
        SettingError: if a value is out of its range.
    """

    devices: tuple[str, ...] = ()
    transports: tuple[str, ...] = ()
    gid_index: int | None = None
    traffic_class: int | None = None
    service_level: int | None = None
    rails: int | None = None

    def __post_init__(self) -> None:
        for device in self.devices:
            if not _RDMA_DEVICE.fullmatch(device):
                raise SettingError("devices", device, "name devices as in mlx5_0:1 or eth0")
        for transport in self.transports:
            if not re.fullmatch(r"[\\^]?[a-z][a-z0-9_]*(:aux)?", transport):
                raise SettingError(
                    "transports", transport, "name UCX transports, such as rc, ud, tcp, self, sm"
                )
        for name, highest in (("gid_index", GIDS_MAX - 1), ("traffic_class", 255), ("service_level", 15)):
            number = getattr(self, name)
            if number is not None and not 0 <= number <= highest:
                raise SettingError(name, number, f"give a number in 0..{highest}")
        if self.rails is not None and not 1 <= self.rails <= 16:
            raise SettingError("rails", self.rails, "give a number in 1..16")

    def environment(self) -> dict[str, str]:
        """The variables that UCX 1.21 reads these settings from, without those that are left out."""
        values: dict[str, object] = {
            "UCX_NET_DEVICES": ",".join(_with_port(device) for device in self.devices) or None,
            "UCX_TLS": ",".join(self.transports) or None,
            "UCX_IB_GID_INDEX": self.gid_index,
            "UCX_IB_TRAFFIC_CLASS": self.traffic_class,
            "UCX_IB_SL": self.service_level,
            "UCX_MAX_RMA_RAILS": self.rails,
            "UCX_MAX_RNDV_RAILS": self.rails,
        }
        return {name: str(value) for name, value in values.items() if value is not None}

    @property
    def asks_for_rdma(self) -> bool:
        """Whether bytes that TCP carries would be a surprise."""
        names_rdma = any(_RDMA_TRANSPORT.fullmatch(transport) for transport in self.transports)
        return names_rdma or any(is_rdma_name(device) for device in self.devices)


def is_rdma_name(device: str) -> bool:
    """Whether a device's name is one of RDMA: with a port, or as drivers name them, not as interfaces are."""
    return ":" in device or bool(
        re.match(r"(mlx\d|bnxt_re|irdma|hns|rdmap|efa|ionic|rocep|rxe|erdma)", device)
    )


def _with_port(device: str) -> str:
    return f"{device}:1" if is_rdma_name(device) and ":" not in device else device


def roce_from_mapping(given: Mapping[str, Any]) -> RoceSettings:
    """Settings from what a person wrote: lists of names or text with commas, whole numbers.

    Raises:
        SettingError: if a key is unknown or a value is of a wrong type or out of its range.
    """
    values: dict[str, Any] = {}
    known = {field.name for field in fields(RoceSettings)}
    for name, value in given.items():
        if name not in known:
            raise SettingError(name, value, f"no such setting; there are {', '.join(sorted(known))}")
        values[name] = _names(name, value) if name in {"devices", "transports"} else _whole(name, value)
    return RoceSettings(**values)


def _names(name: str, value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    if isinstance(value, Sequence) and all(isinstance(part, str) for part in value):
        return tuple(part.strip() for part in value)
    raise SettingError(name, value, "give a list of names")


def _whole(name: str, value: object) -> int | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    if isinstance(value, str) and value.strip().isascii() and value.strip().isdigit():
        return int(value)
    raise SettingError(name, value, "give a whole number")


@dataclass(frozen=True, slots=True)
class Gid:
    """One address of a port: `kind` is as sysfs says, `IB/RoCE v1` or `RoCE v2`."""

    index: int
    value: str
    kind: str
    interface: str

    @property
    def is_routable_v4(self) -> bool:
        """Whether it holds an IPv4 address, the usual choice for RoCE v2."""
        return self.kind == ROCE_V2 and self.value.startswith("0000:0000:0000:0000:0000:ffff:")


@dataclass(frozen=True, slots=True)
class RdmaPort:
    """One port of an RDMA device as sysfs shows it.

    Attributes:
        state: such as ACTIVE, DOWN, INIT; empty if unknown.
        link_layer: `Ethernet` (RoCE) or `InfiniBand`.
        interface_mtu_bytes: MTU of the network interface behind it; None without one.
        numa_node: of the device, None if unknown.
    """

    device: str
    number: int
    state: str
    link_layer: str
    rate: str
    gids: tuple[Gid, ...]
    interface_mtu_bytes: int | None
    numa_node: int | None

    @property
    def name(self) -> str:
        return f"{self.device}:{self.number}"

    @property
    def path_mtu_bytes(self) -> int | None:
        """Largest RoCE payload that the interface's MTU leaves room for."""
        if self.interface_mtu_bytes is None:
            return None
        room = self.interface_mtu_bytes - ROCE_HEADER_BYTES
        return next((mtu for mtu in PATH_MTUS if mtu <= room), None)

    @property
    def suggested_gid(self) -> Gid | None:
        """The RoCE v2 GID that most networks route: of an IPv4 address, else the first."""
        second_version = [gid for gid in self.gids if gid.kind == ROCE_V2]
        return next((gid for gid in second_version if gid.is_routable_v4), next(iter(second_version), None))


def read_ports(root: Path = Path("/")) -> tuple[RdmaPort, ...]:
    """All ports of all RDMA devices under `root`/sys/class/infiniband, by name."""
    folder = root / "sys/class/infiniband"
    ports = [
        _read_port(root, device, number)
        for device in _children(folder)
        for number in _children(device / "ports")
        if number.name.isdigit()
    ]
    return tuple(sorted(ports, key=lambda port: (port.device, port.number)))


def _children(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        # A GID without an address answers a read with EINVAL.
        return ""


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if re.fullmatch(r"-?\d{1,9}", text) else None


def _read_port(root: Path, device: Path, port: Path) -> RdmaPort:
    gids = tuple(_read_gids(port))
    interfaces = [gid.interface for gid in gids if gid.interface]
    mtu_bytes = _number(root / "sys/class/net" / interfaces[0] / "mtu") if interfaces else None
    numa_node = _number(device / "device/numa_node")
    return RdmaPort(
        device=device.name,
        number=int(port.name),
        state=_text(port / "state").rpartition(":")[2].strip(),
        link_layer=_text(port / "link_layer"),
        rate=_text(port / "rate"),
        gids=gids,
        interface_mtu_bytes=mtu_bytes,
        # The kernel says -1 where the platform has one node or does not tell.
        numa_node=None if numa_node is None or numa_node < 0 else numa_node,
    )


def _read_gids(port: Path) -> Iterator[Gid]:
    indices = sorted(int(path.name) for path in _children(port / "gids") if path.name.isdigit())
    for index in indices[:GIDS_MAX]:
        value = _text(port / "gids" / str(index))
        if value.replace("0", "").replace(":", ""):
            kind = _text(port / "gid_attrs/types" / str(index))
            yield Gid(index, value, kind, _text(port / "gid_attrs/ndevs" / str(index)))


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a setting cannot work on this node."""

    field: str
    value: object
    remedy: str


def problems(settings: RoceSettings, root: Path = Path("/")) -> list[Problem]:
    """What of the settings this node cannot do, worst first; empty if all can work."""
    ports = {port.name: port for port in read_ports(root)}
    found = [problem for device in settings.devices for problem in _device_problems(device, ports, root)]
    chosen = [ports[name] for name in map(_with_port, settings.devices) if name in ports]
    if settings.gid_index is not None:
        found += _gid_problems(settings.gid_index, chosen or list(ports.values()))
    found += _transport_problems(settings, ports)
    return found


def _device_problems(device: str, ports: Mapping[str, RdmaPort], root: Path) -> list[Problem]:
    port = ports.get(_with_port(device))
    if port is not None:
        if port.state == STATE_ACTIVE:
            return []
        return [
            Problem("devices", device, f"its port is {port.state or 'of unknown state'}: bring its link up")
        ]
    if not is_rdma_name(device) and (root / "sys/class/net" / device).exists():
        return []
    there = ", ".join(ports) or "no RDMA device"
    remedy = f"not on this node, which has {there}: name one of them, or expose the device to this container"
    return [Problem("devices", device, remedy)]


def _gid_problems(index: int, ports: Sequence[RdmaPort]) -> list[Problem]:
    if not ports:
        return [Problem("gid_index", index, "there is no RDMA port here: leave it out")]
    return [problem for port in ports if (problem := _gid_problem(index, port)) is not None]


def _gid_problem(index: int, port: RdmaPort) -> Problem | None:
    gid = next((gid for gid in port.gids if gid.index == index), None)
    suggested = port.suggested_gid
    choice = f"use {suggested.index}" if suggested else "give the interface an address first"
    if gid is None:
        return Problem("gid_index", index, f"{port.name} has no GID there: {choice}")
    if port.link_layer == ETHERNET and gid.kind != ROCE_V2:
        return Problem(
            "gid_index", index, f"on {port.name} it is {gid.kind or 'unknown'}, not RoCE v2: {choice}"
        )
    return None


def _transport_problems(settings: RoceSettings, ports: Mapping[str, RdmaPort]) -> list[Problem]:
    names = settings.transports
    found = []
    if (
        names
        and not any(_AUXILIARY.fullmatch(name) for name in names)
        and _NEEDS_AUXILIARY.intersection(names)
    ):
        remedy = "brings nothing to connect with: add ud, or write rc in place of rc_verbs or rc_mlx5"
        found.append(Problem("transports", ",".join(names), remedy))
    only_rdma = bool(names) and all(_RDMA_TRANSPORT.fullmatch(name) or name == "self" for name in names)
    if only_rdma and not ports:
        remedy = "there is no RDMA device here: add tcp, or expose the device to this container"
        found.append(Problem("transports", ",".join(names), remedy))
    return found


def check(settings: RoceSettings, root: Path = Path("/")) -> None:
    """See that the settings can work on this node.

    Raises:
        SettingError: with the first thing that cannot.
    """
    for problem in problems(settings, root):
        raise SettingError(problem.field, problem.value, problem.remedy)
