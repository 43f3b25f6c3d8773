"""Reads through NIXL, by its UCX plugin unless another is named.

Source: NIXL 1.5.1, Python API `nixl._api`.
"""

import importlib
import logging
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from transfer.backends.base import Region
from transfer.backends.commands import Commanding, Commands
from transfer.backends.nixl_thread import NixlThread, memory_of, patient_progress
from transfer.backends.ucx_library import (
    is_tcp,
    loaded_libraries,
    process_log,
    refuse_second_ucx,
    transport_text,
    ucx_environment,
)
from transfer.errors import BackendError, SettingError
from transfer.roce import RoceSettings, check, roce_from_mapping

_log = logging.getLogger(__name__)

NIXL_PACKAGES = ("nixl_cu13", "nixl_cu12", "nixl_rocm", "nixl")
CLOSE_S = 1.0


@dataclass(frozen=True, slots=True)
class NixlSettings:
    """What the NIXL backend is told.

    Attributes:
        plugin: NIXL's name of the transport: UCX, UCCL, LIBFABRIC or another that is installed.
        plugin_parameters: handed to the plugin as they are; `get_plugin_params` tells which there are.
        roce: for the UCX plugin.
        progress_delay_us: how long NIXL's progress thread sleeps at most; it wakes when something comes.
        allow_second_ucx: go on where the process has loaded another UCX already.

    Raises:
        SettingError: if a value is out of its range.
    """

    plugin: str = "UCX"
    plugin_parameters: Mapping[str, str] = field(default_factory=dict)
    roce: RoceSettings = field(default_factory=RoceSettings)
    progress_delay_us: int = 100_000
    allow_second_ucx: bool = False

    def __post_init__(self) -> None:
        if not self.plugin:
            raise SettingError("plugin", self.plugin, "name a NIXL plugin, such as UCX")
        if not 0 <= self.progress_delay_us <= 10_000_000:
            raise SettingError("progress_delay_us", self.progress_delay_us, "give a number in 0..10000000")


def nixl_settings_from_mapping(given: Mapping[str, Any]) -> NixlSettings:
    """Settings from what a person wrote; the fields of RoceSettings stand beside the others.

    Raises:
        SettingError: if a key is unknown or a value is of a wrong type or out of its range.
    """
    own = {f.name for f in fields(NixlSettings)} - {"roce"}
    values: dict[str, Any] = {name: value for name, value in given.items() if name in own}
    roce = {f.name for f in fields(RoceSettings)}
    unknown = sorted(set(given) - own - roce)
    if unknown:
        known = ", ".join(sorted(own | roce))
        raise SettingError(unknown[0], given[unknown[0]], f"no such setting; there are {known}")
    kinds = {"plugin": str, "plugin_parameters": Mapping, "progress_delay_us": int, "allow_second_ucx": bool}
    for name, value in values.items():
        is_bool = isinstance(value, bool)
        if not isinstance(value, kinds[name]) or (name == "progress_delay_us" and is_bool):
            raise SettingError(name, value, f"give a {kinds[name].__name__.lower()}")
    if "plugin_parameters" in values:
        values["plugin_parameters"] = {str(k): str(v) for k, v in values["plugin_parameters"].items()}
    network = roce_from_mapping({name: value for name, value in given.items() if name in roce})
    return NixlSettings(**values, roce=network)


class NixlBackend(Commanding):
    """The Backend over NIXL."""

    def __init__(self, settings: NixlSettings | None = None) -> None:
        self._settings = settings or NixlSettings()
        self._thread: NixlThread | None = None
        self._agent_name = ""

    @property
    def name(self) -> str:
        return "nixl"

    def start(self, region: Region) -> None:
        if self._thread is not None:
            raise BackendError("the NIXL backend was started before")
        agent = self._make_agent()
        registered = self._register(agent, region)
        self._thread = NixlThread(agent, self._settings.plugin, region, registered)
        self._thread.start()

    def metadata(self) -> bytes:
        return self._running().metadata

    def transport(self, peer: str) -> str:
        """Plugin and lanes of large reads, such as `UCX rc_mlx5/mlx5_0:1` or `UCX cma/memory`.

        `UCX (unknown)` before the first read to a host of the peer's kind, this one or another, and where UCX
        does not tell because its log goes elsewhere.
        """
        plugin = self._settings.plugin
        if plugin != "UCX":
            return plugin
        is_same_host = self._running().same_host.get(peer, False)
        lanes = transport_text(process_log.tables(), self._agent_name, is_same_host=is_same_host)
        return f"UCX {lanes}" if lanes else "UCX (unknown)"

    def is_degraded(self, peer: str) -> bool:
        """Whether TCP carries what RDMA was asked for; False while it is unknown."""
        return self._settings.roce.asks_for_rdma and is_tcp(self.transport(peer))

    def close(self) -> None:
        if self._thread is not None and not self._thread.close(CLOSE_S):
            _log.warning("NIXL's thread did not end within %g s", CLOSE_S)

    def _running_commands(self) -> Commands:
        return self._running().commands

    def _running(self) -> NixlThread:
        if self._thread is None:
            raise BackendError("the NIXL backend has not been started")
        return self._thread

    def _make_agent(self) -> Any:
        """An agent with the plugin, made while UCX's settings are in the environment."""
        settings = self._settings
        variables: dict[str, str] = {}
        parameters = dict(settings.plugin_parameters)
        if settings.plugin == "UCX":
            check(settings.roce)
            refuse_second_ucx("nixl", NIXL_PACKAGES, is_allowed=settings.allow_second_ucx)
            variables = settings.roce.environment() | process_log.environment()
            if settings.roce.devices:
                # NIXL does not take UCX_NET_DEVICES from the environment.
                parameters.setdefault("ucx_devices", variables["UCX_NET_DEVICES"])
        # A name of its own for each life: a peer that starts anew is another agent.
        self._agent_name = uuid.uuid4().hex
        with ucx_environment(variables):
            api = import_nixl()
            configuration = api.nixl_agent_config(enable_prog_thread=True, backends=[])
            with patient_progress(api, settings.progress_delay_us):
                agent = api.nixl_agent(self._agent_name, configuration)
            there = sorted(agent.get_plugin_list())
            if settings.plugin not in there:
                raise SettingError("plugin", settings.plugin, f"this NIXL has {', '.join(there)}: name one")
            try:
                agent.create_backend(settings.plugin, parameters)
            except Exception as error:
                remedy = f"NIXL cannot make it ({type(error).__name__}: {error}): see its log and `preflight`"
                raise SettingError("plugin", settings.plugin, remedy) from error
        _warn_of_two()
        return agent

    def _register(self, agent: Any, region: Region) -> Any:
        plugin = self._settings.plugin
        memory, device_index = memory_of(region.device)
        reached = agent.get_backend_mem_types(plugin)
        if f"{memory}_SEG" not in reached:
            remedy = f"NIXL's {plugin} reaches {', '.join(sorted(reached))} only: stage in host memory (cpu)"
            raise SettingError("staging_device", region.device, remedy)
        descriptors = [(region.address, region.length_bytes, device_index, "")]
        try:
            return agent.register_memory(descriptors, memory, [plugin])
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            if memory == "DRAM":
                raise BackendError(f"NIXL cannot register the staging buffer ({reason})") from error
            remedy = (
                f"this build of NIXL's {plugin} cannot register it ({reason}): stage in host memory (cpu),"
                " or use the vendor's build of NIXL and UCX"
            )
            raise SettingError("staging_device", region.device, remedy) from error


def import_nixl() -> Any:
    """NIXL's Python API.

    Raises:
        SettingError: if it is not installed.
    """
    try:
        return importlib.import_module("nixl._api")
    except ImportError as error:
        remedy = f"cannot be imported ({error}): install nixl, or the accelerator vendor's build of it"
        raise SettingError("backends", "nixl", remedy) from error


def _warn_of_two() -> None:
    libraries = sorted(map(str, loaded_libraries("libucp")))
    if len(libraries) > 1:
        _log.warning("this process has loaded more than one UCX, which may hang: %s", ", ".join(libraries))
