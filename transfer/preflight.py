"""Checks whether a node can move KV: devices, libraries and limits, a remedy with whatever is not ok.

`python -m transfer.preflight` needs nothing but the standard library; what is not installed is a finding.
"""

import argparse
import importlib
import importlib.util
import json
import os
import resource
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from transfer.errors import SettingError
from transfer.roce import (
    ETHERNET,
    STATE_ACTIVE,
    RdmaPort,
    RoceSettings,
    problems,
    read_ports,
)

PORT_DEFAULT = 14_579
MEMLOCK_BYTES_MIN = 1 << 30
"""Least locked memory beside RDMA: a staging buffer is pinned while it is registered."""

SHM_BYTES_MIN = 1 << 30
HUGE_STAGING_BYTES = 256 << 20
PATH_MTU_WANTED = 4_096
PROBE_S = 30.0
SHM = "/dev/shm"  # noqa: S108  # looked at, not written to


class Level(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Line:
    """One finding; `remedy` is empty if there is nothing to mend."""

    level: Level
    subject: str
    finding: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Wants:
    """What the node is meant for.

    Attributes:
        needs_rdma: missing RDMA is a failure, not a warning.
        key_file: of the side channel; empty: not checked.
        root: of the file system, for /sys and /proc.
    """

    roce: RoceSettings
    needs_rdma: bool = False
    host: str = "0.0.0.0"  # noqa: S104  # where an agent would listen
    port: int = PORT_DEFAULT
    key_file: str = ""
    root: Path = Path("/")


def rdma_lines(wants: Wants) -> Iterator[Line]:
    """Ports, their GIDs and MTUs, and what the settings ask of them."""
    missing = Level.FAIL if wants.needs_rdma else Level.WARN
    ports = read_ports(wants.root)
    active = [port for port in ports if port.state == STATE_ACTIVE]
    if not ports:
        remedy = (
            "load the NIC's driver, or expose the devices to this container (/dev/infiniband, host network)"
        )
        yield Line(missing, "rdma", "no device in /sys/class/infiniband", remedy)
    elif not active:
        yield Line(missing, "rdma", "no port is active", "bring a link up: `rdma link` tells the states")
    if ports and not (wants.root / "dev/infiniband").is_dir():
        remedy = "mount /dev/infiniband, or ask the RDMA device plugin for a device"
        yield Line(missing, "rdma verbs", "no /dev/infiniband: devices are seen but cannot be used", remedy)
    for port in ports:
        yield from _port_lines(port)
    for problem in problems(wants.roce, wants.root):
        yield Line(Level.FAIL, f"setting {problem.field}", str(problem.value), problem.remedy)


def _port_lines(port: RdmaPort) -> Iterator[Line]:
    about = f"{port.link_layer or 'unknown link layer'}, {port.rate or 'unknown rate'}"
    if port.state != STATE_ACTIVE:
        state = port.state or "of unknown state"
        yield Line(
            Level.WARN, port.name, f"{state} ({about})", "bring its link up, or leave it out of devices"
        )
        return
    numa = "" if port.numa_node is None else f", NUMA node {port.numa_node}"
    yield Line(Level.OK, port.name, f"active, {about}{numa}")
    if port.link_layer != ETHERNET:
        return
    gid = port.suggested_gid
    if gid is None:
        remedy = "give its network interface an address, and enable RoCE v2"
        yield Line(Level.WARN, f"{port.name} GID", "none is RoCE v2", remedy)
    else:
        which = "IPv4" if gid.is_routable_v4 else "IPv6"
        yield Line(Level.OK, f"{port.name} GID", f"index {gid.index} is RoCE v2 of an {which} address")
    if port.path_mtu_bytes is not None and port.path_mtu_bytes < PATH_MTU_WANTED:
        finding = f"interface {port.interface_mtu_bytes} bytes, so RoCE packets of {port.path_mtu_bytes}"
        remedy = "set the interface and its switch to 9000 for packets of 4096"
        yield Line(Level.WARN, f"{port.name} MTU", finding, remedy)
    elif port.path_mtu_bytes is not None:
        yield Line(Level.OK, f"{port.name} MTU", f"RoCE packets of {port.path_mtu_bytes} bytes")


# Each probe loads libraries in a process of its own: two versions of UCX in one may hang.
_NIXL_PROBE = """
import json, os
os.environ.setdefault("NIXL_LOG_LEVEL", "FATAL")
from nixl import _api
agent = _api.nixl_agent("preflight", _api.nixl_agent_config(enable_prog_thread=False, backends=[]))
found = {}
for plugin in agent.get_plugin_list():
    try:
        found[plugin] = agent.agent.getPluginParams(plugin)[1]
    except Exception:
        found[plugin] = None
print("FOUND" + json.dumps(found), flush=True)
os._exit(0)
"""

_UCXX_PROBE = """
import json, os
import ucxx
print("FOUND" + json.dumps([ucxx.__version__, ".".join(map(str, ucxx.get_ucx_version()))]), flush=True)
os._exit(0)
"""


def _probe(script: str) -> tuple[Any, str]:
    """What a script finds, or None and why not."""
    try:
        ended = subprocess.run(  # noqa: S603  # this interpreter, a text of this module
            [sys.executable, "-c", script], capture_output=True, text=True, timeout=PROBE_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, str(error)
    for line in ended.stdout.splitlines():
        if line.startswith("FOUND"):
            return json.loads(line.removeprefix("FOUND")), ""
    told = ended.stderr.strip().splitlines()
    return None, told[-1][:200] if told else f"exit status {ended.returncode}"


def library_lines() -> Iterator[Line]:
    """NIXL with its plugins and the memory they reach, ucxx, UCX's transports."""
    yield from nixl_lines(*_probe(_NIXL_PROBE))
    found, reason = _probe(_UCXX_PROBE)
    if found is None:
        remedy = "only needed for the backend ucx: install ucxx-cu12 or ucxx-cu13"
        yield Line(Level.OK, "ucxx", f"not usable ({reason}); {remedy}")
    else:
        yield Line(Level.OK, "ucxx", f"{found[0]} with UCX {found[1]}")
    yield from transport_lines(*_ucx_info())


def nixl_lines(found: dict[str, list[str] | None] | None, reason: str) -> Iterator[Line]:
    """Findings on NIXL from its plugins with their memory types; None where a plugin cannot be loaded."""
    if found is None:
        remedy = "install nixl, or the accelerator vendor's build of it; without it the backend tcp is left"
        yield Line(Level.WARN, "NIXL", f"not usable: {reason}", remedy)
        return
    usable = {name: kinds for name, kinds in found.items() if kinds is not None}
    if not usable:
        yield Line(Level.WARN, "NIXL", "no plugin can be loaded", "set NIXL_PLUGIN_DIR, or reinstall nixl")
        return
    if "UCX" not in usable:
        remedy = "name another one in the backend's `plugin`, or install a NIXL with UCX"
        yield Line(Level.WARN, "NIXL", f"no plugin UCX; there are {', '.join(sorted(usable))}", remedy)
    for name, kinds in sorted(usable.items()):
        # What moves bytes between two processes' memories reaches two memories, files and stores do not.
        memories = sorted(kind.removesuffix("_SEG") for kind in kinds)
        yield Line(Level.OK, f"NIXL {name}", f"handles {', '.join(memories)}")
    if broken := sorted(name for name, kinds in found.items() if kinds is None):
        yield Line(Level.OK, "NIXL", f"installed but not loadable here: {', '.join(broken)}")


def _ucx_info() -> tuple[str | None, str]:
    """What `ucx_info -d` prints, of the system or of the libucx package; None and why not."""
    command, library_path = shutil.which("ucx_info"), None
    spec = importlib.util.find_spec("libucx")
    if command is None and spec is not None and spec.submodule_search_locations:
        folder = Path(spec.submodule_search_locations[0])
        command, library_path = str(folder / "bin/ucx_info"), str(folder / "lib")
    if command is None:
        return None, "ucx_info is not installed"
    environment = dict(os.environ) | ({"LD_LIBRARY_PATH": library_path} if library_path else {})
    try:
        ended = subprocess.run(  # noqa: S603  # a program of UCX, no shell
            [command, "-d"], capture_output=True, text=True, timeout=PROBE_S, check=False, env=environment
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, str(error)
    return ended.stdout, ""


def transport_lines(text: str | None, reason: str) -> Iterator[Line]:
    """Findings from what `ucx_info -d` prints (UCX 1.21): transports and devices by turns."""
    if text is None:
        yield Line(Level.OK, "UCX transports", f"not told: {reason}; NIXL's own UCX brings no ucx_info")
        return
    pairs = sorted(set(_transports(text)))
    if pairs:
        yield Line(Level.OK, "UCX transports", ", ".join(f"{name}/{device}" for name, device in pairs))
    else:
        remedy = "see UCX_TLS and UCX_NET_DEVICES in the environment"
        yield Line(Level.WARN, "UCX transports", "ucx_info lists none", remedy)


def _transports(text: str) -> Iterator[tuple[str, str]]:
    transport = ""
    for line in text.splitlines():
        name, colon, value = line.strip("# ").partition(":")
        if colon and name.strip() == "Transport":
            transport = value.strip()
        elif colon and name.strip() == "Device" and transport:
            yield transport, value.strip()


def memory_lines(wants: Wants) -> Iterator[Line]:
    """Locked memory, /dev/shm, huge pages."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    yield memlock_line(soft, has_rdma=wants.needs_rdma or bool(read_ports(wants.root)))
    try:
        shm = shutil.disk_usage(wants.root / "dev/shm")
    except OSError as error:
        reason = error.strerror or str(error)
        yield Line(Level.WARN, SHM, f"cannot be looked at ({reason})", "mount a tmpfs there")
    else:
        yield shm_line(shm.free)
    yield huge_page_line(_read(wants.root / "sys/kernel/mm/transparent_hugepage/enabled"))


def memlock_line(limit_bytes: int, *, has_rdma: bool) -> Line:
    """RLIMIT_MEMLOCK against what registered memory needs."""
    if limit_bytes == resource.RLIM_INFINITY:
        return Line(Level.OK, "locked memory", "unlimited")
    told = f"{limit_bytes >> 10} KiB"
    if limit_bytes >= MEMLOCK_BYTES_MIN or not has_rdma:
        return Line(Level.OK, "locked memory", told + ("" if has_rdma else ", which matters with RDMA only"))
    remedy = "RDMA pins the staging buffer: `ulimit -l unlimited`, LimitMEMLOCK=infinity, or CAP_IPC_LOCK"
    return Line(Level.FAIL, "locked memory", told, remedy)


def shm_line(free_bytes: int) -> Line:
    """Room for shared memory between processes of a pod."""
    told = f"{free_bytes >> 20} MiB free"
    if free_bytes >= SHM_BYTES_MIN:
        return Line(Level.OK, SHM, told)
    remedy = "mount an emptyDir with medium Memory there, or start the container with --shm-size=1g"
    return Line(Level.WARN, SHM, told, remedy)


def huge_page_line(setting: str) -> Line:
    """Transparent huge pages make registering and copying a large staging buffer cheaper."""
    if "[never]" not in setting:
        return Line(Level.OK, "huge pages", f"transparent: {setting or 'unknown'}")
    remedy = f"for staging above {HUGE_STAGING_BYTES >> 20} MiB: set transparent_hugepage/enabled to madvise"
    return Line(Level.WARN, "huge pages", "transparent huge pages are off", remedy)


def processor_lines(wants: Wants) -> Iterator[Line]:
    """Cores this process may use, and NUMA nodes."""
    core_count = len(os.sched_getaffinity(0))
    nodes = list((wants.root / "sys/devices/system/node").glob("node[0-9]*"))
    told = f"{core_count} cores, {len(nodes) or 1} NUMA nodes"
    if core_count >= 2:
        yield Line(Level.OK, "processors", told)
    else:
        yield Line(Level.WARN, "processors", told, "give the engine a second core: packing runs beside it")
    numas = {port.numa_node for port in read_ports(wants.root) if port.state == STATE_ACTIVE} - {None}
    if len(nodes) > 1 and numas:
        near = ", ".join(str(node) for node in sorted(n for n in numas if n is not None))
        yield Line(
            Level.OK, "NIC locality", f"active RDMA ports are on NUMA node {near}: start engines there"
        )


def access_lines(wants: Wants) -> Iterator[Line]:
    """The side channel's port and key."""
    yield port_line(wants.host, wants.port)
    if wants.key_file:
        yield key_line(wants.key_file)
    else:
        remedy = "set PDCOORD_KV_KEY_FILE to a file with a shared secret: openssl rand -hex 32"
        yield Line(Level.WARN, "key file", "none: peers are not authenticated", remedy)


def port_line(host: str, port: int) -> Line:
    """Whether an agent could listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
    except OSError as error:
        remedy = "stop what listens there (`ss -ltnp`), or give another `port`"
        return Line(
            Level.FAIL, "side channel", f"{host}:{port} cannot be bound: {error.strerror or error}", remedy
        )
    return Line(Level.OK, "side channel", f"{host}:{port} is free")


def key_line(path: str) -> Line:
    """Whether the key is there and nobody else's to read."""
    try:
        mode = stat.S_IMODE(Path(path).stat().st_mode)
        length = len(Path(path).read_bytes().strip())
    except OSError as error:
        reason = error.strerror or str(error)
        return Line(Level.FAIL, "key file", f"{path} cannot be read: {reason}", "mount the secret there")
    if mode & (stat.S_IROTH | stat.S_IWOTH):
        return Line(
            Level.FAIL, "key file", f"{path} has mode {mode:04o}", "chmod o-rwx (secret: defaultMode 0440)"
        )
    if length < 16:
        remedy = "write 16 bytes at least: openssl rand -hex 32"
        return Line(Level.FAIL, "key file", f"{path} holds {length} bytes", remedy)
    return Line(Level.OK, "key file", f"{path}, mode {mode:04o}")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""


CHECKS: tuple[Callable[[Wants], Iterable[Line]], ...] = (
    rdma_lines,
    lambda _: library_lines(),
    memory_lines,
    processor_lines,
    access_lines,
)


def inspect(wants: Wants) -> list[Line]:
    """All findings on this node, in the order of the checks."""
    return [line for check in CHECKS for line in check(wants)]


def printed(lines: Sequence[Line]) -> str:
    """Findings for people, one a line, each remedy below its finding."""
    width = max((len(line.subject) for line in lines), default=0)
    text = []
    for line in lines:
        text.append(f"{line.level:<4}  {line.subject:<{width}}  {line.finding}")
        if line.remedy:
            text.append(f"{'':<4}  {'':<{width}}  -> {line.remedy}")
    return "\n".join(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the findings; 1 if one is a failure, 2 if the arguments are wrong, else 0."""
    parser = argparse.ArgumentParser("preflight", description="Check whether this node can move KV.")
    parser.add_argument("--require", choices=["rdma"], action="append", default=[], help="fail without it")
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    parser.add_argument("--devices", default="", help="devices that will be used, as in mlx5_0:1,mlx5_1:1")
    parser.add_argument("--transports", default="", help="UCX transports, as in rc,ud,self,sm")
    parser.add_argument("--gid-index", type=int, help="GID index that will be used")
    parser.add_argument("--host", default="0.0.0.0", help="address of the side channel")  # noqa: S104  # as in Wants
    parser.add_argument("--port", type=int, default=PORT_DEFAULT, help="port of the side channel")
    parser.add_argument("--key-file", default=os.environ.get("PDCOORD_KV_KEY_FILE", ""), help="shared secret")
    given = parser.parse_args(arguments)
    try:
        roce = RoceSettings(
            devices=tuple(filter(None, given.devices.split(","))),
            transports=tuple(filter(None, given.transports.split(","))),
            gid_index=given.gid_index,
        )
    except SettingError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    lines = inspect(Wants(roce, "rdma" in given.require, given.host, given.port, given.key_file))
    text = json.dumps([asdict(line) for line in lines], indent=2) if given.json else printed(lines)
    sys.stdout.write(f"{text}\n")
    return 1 if any(line.level is Level.FAIL for line in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
