"""The UCX library of this process: which one is loaded, what it is told, and what it says it uses.

UCX reads its settings from the environment when it is loaded and when a context is made, so they are put
there for that long only. What carries a one-sided read it tells in its log alone (UCX_PROTO_INFO, UCX 1.21),
so the log goes to memory, from where it is read back.
"""

import contextlib
import ctypes
import functools
import importlib.util
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from transfer.errors import SettingError

_log = logging.getLogger(__name__)
_environment_lock = threading.Lock()

LOG_BYTES_MAX = 4 << 20
"""Most of UCX's log that is read at a time; what is older is skipped."""

LINES_FORWARDED_MAX = 1_000
"""Most warnings of UCX that one process passes on to its own log."""

TABLES_MAX = 4_096


def loaded_libraries(name: str, maps: str | None = None) -> frozenset[Path]:
    """Files of a shared library, such as `libucp`, that this process has mapped.

    Args:
        name: of the library.
        maps: text of /proc/self/maps, read if not given.
    """
    text = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace") if maps is None else maps
    pattern = rf"\s(/\S*/{re.escape(name)}(?:-[0-9a-f]+)?\.so[.\d]*)(?: \(deleted\))?$"
    return frozenset(Path(found).resolve() for found in re.findall(pattern, text, re.MULTILINE))


def bundled_folder(package: str) -> Path | None:
    """The folder in which a package brings UCX along; None if it is not there or uses the system's."""
    with contextlib.suppress(ImportError, ValueError):
        spec = importlib.util.find_spec(package)
        for place in (spec.submodule_search_locations or []) if spec else []:
            folder = Path(place).resolve()
            for candidate in (folder.parent / f"{folder.name}.libs", folder / "lib"):
                if any(candidate.glob("libucp*.so*")):
                    return candidate
    return None


def refuse_second_ucx(user: str, packages: tuple[str, ...], *, is_allowed: bool) -> None:
    """See that loading `user` would not bring a second UCX into the process.

    Two versions of UCX in one process were seen to hang (ai-dynamo/nixl 1668).

    Args:
        user: whose UCX is about to be loaded, for the message.
        packages: the packages that may bring it.
        is_allowed: go on regardless, with a warning.

    Raises:
        SettingError: if another one is loaded already.
    """
    folders = {folder for package in packages if (folder := bundled_folder(package)) is not None}
    others = sorted(path for path in loaded_libraries("libucp") if folders and path.parent not in folders)
    if not others:
        return
    if is_allowed:
        _log.warning("%s brings a second UCX beside %s: two in one process may hang", user, others[0])
        return
    remedy = (
        f"this process has loaded {others[0]}, and {user} brings its own UCX; two in one process may hang: "
        "use one of them, build both on one UCX, or set allow_second_ucx"
    )
    raise SettingError("backends", user, remedy)


@contextlib.contextmanager
def ucx_environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Have variables in the environment for as long as UCX reads them.

    Raises:
        SettingError: if the environment has one of them with another value.
    """
    with _environment_lock:
        for name, value in variables.items():
            present = os.environ.get(name)
            if present is not None and present != value:
                remedy = f"the environment says {present!r}: unset it there, or leave the setting out"
                raise SettingError(name, value, remedy)
        added = [name for name in variables if name not in os.environ]
        os.environ.update({name: variables[name] for name in added})
        try:
            yield
        finally:
            for name in added:
                os.environ.pop(name, None)


@dataclass(frozen=True, slots=True)
class ReadTable:
    """How one worker reads remote memory, as UCX chose it for peers of one kind.

    Attributes:
        worker: name of the worker, which NIXL makes that of its agent.
        scope: `self`, `intra-node` or `inter-node`.
        lanes: transport and device of large reads, such as `rc_mlx5/mlx5_0:1`, or `cma/memory`.
        is_emulated: whether the peer's processor takes part (reads sent as messages).
    """

    worker: str
    scope: str
    lanes: tuple[str, ...]
    is_emulated: bool


_PREFIX = re.compile(r"^\[[^\]]*\] \[[^\]]*\]\s*")
_HEAD = re.compile(r"\|\s*(\S.*?) (self|intra-node|inter-node) cfg#\d+\s*(?:\|.*)?$")
_LANE = re.compile(r"\b([a-z][a-z0-9_]*/[\w.:\-]+)")
_COMPLAINT = re.compile(r"\b(WARN|ERROR|FATAL)\b\s*(.*)")


class TableReader:
    """Gathers the read tables of a UCX log, line by line.

    A table is framed by rulers of `+--+`; its head names worker, scope and operation, its rows are
    `| range | description | lanes |`. Only the last row counts: it holds the largest reads.
    """

    def __init__(self) -> None:
        self.tables: list[ReadTable] = []
        self._head: tuple[str, str] | None = None
        self._is_read = False
        self._row: tuple[str, str] | None = None

    def take(self, line: str) -> None:
        text = _PREFIX.sub("", line).strip()
        if not text.startswith("|"):
            return
        head = _HEAD.match(text)
        if head:
            self._finish()
            self._head = (head[1], head[2])
            return
        if "remote memory read" in text:
            self._is_read = True
            return
        cells = [cell.strip() for cell in text.strip("|").split("|")]
        if self._head and self._is_read and len(cells) == 3 and ".." in cells[0]:
            self._row = (cells[1], cells[2])

    def finish(self) -> None:
        """The log has ended for now: what stands there is complete, UCX writes a table at once."""
        self._finish()

    def _finish(self) -> None:
        if self._head and self._row and len(self.tables) < TABLES_MAX:
            description, config = self._row
            lanes = tuple(dict.fromkeys(_LANE.findall(config)))
            is_emulated = "software emulation" in description or "fragment" in description
            table = ReadTable(*self._head, lanes, is_emulated)
            if table not in self.tables:
                self.tables.append(table)
        self._head, self._is_read, self._row = None, False, None


class UcxLog:
    """The log of this process's UCX, in memory; one per process, as UCX opens it once when it is loaded."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._file: int | None = None
        self._read_bytes = 0
        self._reader = TableReader()
        self._forwarded = 0

    def environment(self) -> dict[str, str]:
        """What makes UCX tell how it reads; {} where it is too late or a person directs its log."""
        chosen = os.environ.keys() & {"UCX_LOG_FILE", "UCX_PROTO_INFO"}
        with self._lock:
            if self._file is None and (chosen or loaded_libraries("libucs")):
                return {}
            if self._file is None:
                self._file = os.memfd_create("ucx-log")
            return {
                "UCX_LOG_FILE": f"/proc/self/fd/{self._file}",
                "UCX_PROTO_INFO": "*get*",
            }

    def tables(self) -> tuple[ReadTable, ...]:
        """All read tables so far; passes UCX's own warnings on to the log of this process."""
        with self._lock:
            if self._file is not None:
                _flush_ucx_log()
                self._take_new(self._file)
            return tuple(self._reader.tables)

    def _take_new(self, file: int) -> None:
        end = os.fstat(file).st_size
        begin = max(self._read_bytes, end - LOG_BYTES_MAX)
        text = os.pread(file, end - begin, begin).decode(errors="replace")
        self._read_bytes = end
        for line in text.splitlines():
            complaint = _COMPLAINT.search(line)
            if complaint and self._forwarded < LINES_FORWARDED_MAX:
                self._forwarded += 1
                _log.warning("UCX says: %s", complaint[2])
            self._reader.take(line)
        self._reader.finish()
        # UCX goes on at its own offset: the pages before it are given back, the file is sparse from there.
        os.ftruncate(file, 0)
        os.ftruncate(file, end)


def _flush_ucx_log() -> None:
    """UCX buffers its log; ucs_log_flush (UCX 1.21, ucs/debug/log.h) writes it out."""
    for path in loaded_libraries("libucs"):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(str(path)).ucs_log_flush()


process_log = UcxLog()
"""The log of the UCX in this process."""


def boot_id(root: Path = Path("/")) -> str:
    """What tells hosts apart as UCX does (Linux boot id); empty where it cannot be read."""
    try:
        return (root / "proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def transport_text(tables: tuple[ReadTable, ...], worker: str, *, is_same_host: bool) -> str | None:
    """What carries a worker's large reads from peers of this host or of others; None if UCX has not told.

    Where UCX chose differently for several peers of a kind, all lanes are named. A peer of this host that
    shares no memory and no network interface with the worker, as one in another pod, is on another to UCX.
    """
    # UCX cuts a worker's name (UCP_ENTITY_NAME_MAX is 32); reads within a process count as of its host.
    near, far = frozenset({"self", "intra-node"}), frozenset({"inter-node"})
    for scopes in (near, far) if is_same_host else (far,):
        fitting = [table for table in tables if worker.startswith(table.worker) and table.scope in scopes]
        if lanes := dict.fromkeys(lane for table in fitting for lane in table.lanes):
            return " ".join(lanes)
    return None


def is_tcp(transport: str) -> bool:
    """Whether a transport, as told by a backend, moves bytes over TCP, be it in part."""
    return bool(re.search(r"(^|\s)tcp(/|\s|$)", transport))


class _TransportEntry(ctypes.Structure):
    _fields_ = (("transport_name", ctypes.c_char_p), ("device_name", ctypes.c_char_p))


class _Transports(ctypes.Structure):
    _fields_ = (
        ("entries", ctypes.POINTER(_TransportEntry)),
        ("num_entries", ctypes.c_uint),
        ("entry_size", ctypes.c_size_t),
    )


class _EndpointAttributes(ctypes.Structure):
    """ucp_ep_attr_t of UCX 1.21 (ucp/api/ucp.h): two addresses of 128 bytes, both left alone here."""

    _fields_ = (
        ("field_mask", ctypes.c_uint64),
        ("name", ctypes.c_char * 32),
        ("local_address", ctypes.c_uint64 * 16),
        ("remote_address", ctypes.c_uint64 * 16),
        ("transports", _Transports),
        ("user_data", ctypes.c_void_p),
    )


_FIELD_TRANSPORTS = 1 << 3
_ENTRIES_MAX = 32


def endpoint_lanes(handle: int) -> tuple[str, ...]:
    """Transports and devices of a UCX endpoint, such as `rc_mlx5/mlx5_0:1`, by ucp_ep_query.

    All lanes, also those for small messages and for setting up; () where UCX does not tell.
    """
    entries = (_TransportEntry * _ENTRIES_MAX)()
    attributes = _EndpointAttributes(field_mask=_FIELD_TRANSPORTS)
    attributes.transports = _Transports(entries, _ENTRIES_MAX, ctypes.sizeof(_TransportEntry))
    query = _endpoint_query()
    if query is None or query(handle, ctypes.byref(attributes)) != 0:
        return ()
    found = entries[: attributes.transports.num_entries]
    names = [(entry.transport_name, entry.device_name) for entry in found]
    return tuple(dict.fromkeys(f"{t.decode()}/{d.decode()}" for t, d in names if t and d))


@functools.cache
def _endpoint_query() -> Callable[..., int] | None:
    """ucp_ep_query of the UCX that is loaded; with two of them it is not known whose handle one is."""
    libraries = loaded_libraries("libucp")
    if len(libraries) != 1:
        return None
    query = ctypes.CDLL(str(*libraries)).ucp_ep_query
    query.argtypes = (ctypes.c_void_p, ctypes.POINTER(_EndpointAttributes))
    query.restype = ctypes.c_int8
    return query
