"""Reads through UCX without NIXL, over ucxx.

Source: ucxx 0.52 (UCX 1.21), the module `ucxx._lib.libucxx`.
"""

import ctypes
import importlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from types import SimpleNamespace
from typing import Any

import numpy as np

from transfer.backends.base import Region
from transfer.backends.commands import Commanding, Commands
from transfer.backends.ucx_library import is_tcp, refuse_second_ucx, ucx_environment
from transfer.backends.ucx_thread import UcxThread
from transfer.errors import BackendError, SettingError
from transfer.roce import RoceSettings, check, roce_from_mapping

_log = logging.getLogger(__name__)

CLOSE_S = 1.0


@dataclass(frozen=True, slots=True)
class UcxSettings:
    """What the UCX backend is told.

    Attributes:
        allow_second_ucx: go on where the process has loaded another UCX already.
    """

    roce: RoceSettings = field(default_factory=RoceSettings)
    allow_second_ucx: bool = False


def ucx_settings_from_mapping(given: Mapping[str, Any]) -> UcxSettings:
    """Settings from what a person wrote; the fields of RoceSettings stand beside the others.

    Raises:
        SettingError: if a key is unknown or a value is of a wrong type or out of its range.
    """
    network = dict(given)
    allow_second_ucx = network.pop("allow_second_ucx", False)
    if not isinstance(allow_second_ucx, bool):
        raise SettingError("allow_second_ucx", allow_second_ucx, "give true or false")
    unknown = sorted(set(network) - {f.name for f in fields(RoceSettings)})
    if unknown:
        known = ", ".join(sorted({f.name for f in fields(RoceSettings)} | {"allow_second_ucx"}))
        raise SettingError(unknown[0], network[unknown[0]], f"no such setting; there are {known}")
    return UcxSettings(roce_from_mapping(network), allow_second_ucx)


class UcxBackend(Commanding):
    """The Backend over ucxx."""

    def __init__(self, settings: UcxSettings | None = None) -> None:
        self._settings = settings or UcxSettings()
        self._thread: UcxThread | None = None

    @property
    def name(self) -> str:
        return "ucx"

    def start(self, region: Region) -> None:
        if self._thread is not None:
            raise BackendError("the UCX backend was started before")
        check(self._settings.roce)
        refuse_second_ucx("ucxx", ("libucx",), is_allowed=self._settings.allow_second_ucx)
        with ucx_environment(self._settings.roce.environment()):
            api = import_ucxx()
            try:
                context = api.UCXContext({}, (api.Feature.TAG, api.Feature.WAKEUP))
                worker = api.UCXWorker(context)
                worker.init_blocking_progress_mode()
            except Exception as error:
                remedy = f"UCX cannot start ({type(error).__name__}: {error}): see its log and `preflight`"
                raise SettingError("backends", "ucx", remedy) from error
        slice_of = _slicer(region, api.array_of, has_cuda=bool(context.cuda_support))
        self._thread = UcxThread(api, worker, region.length_bytes, slice_of)
        self._thread.start()

    def metadata(self) -> bytes:
        return self._running().metadata

    def transport(self, peer: str) -> str:
        """All lanes of the endpoint, such as `UCX rc_mlx5/mlx5_0:1` or `UCX posix/memory cma/memory tcp/lo`.

        UCX sends large messages over the fastest of them.
        """
        lanes = self._running().lanes.get(peer, "")
        return f"UCX {lanes}" if lanes else "UCX (unknown)"

    def is_degraded(self, peer: str) -> bool:
        """Whether TCP carries what RDMA was asked for; False while it is unknown."""
        lanes = self.transport(peer).removeprefix("UCX ").split()
        fast = [lane for lane in lanes if not is_tcp(lane) and not lane.startswith("self")]
        return self._settings.roce.asks_for_rdma and any(map(is_tcp, lanes)) and not fast

    def close(self) -> None:
        if self._thread is not None and not self._thread.close(CLOSE_S):
            _log.warning("UCX's thread did not end within %g s", CLOSE_S)

    def _running_commands(self) -> Commands:
        return self._running().commands

    def _running(self) -> UcxThread:
        if self._thread is None:
            raise BackendError("the UCX backend has not been started")
        return self._thread


def import_ucxx() -> Any:
    """The parts of ucxx that are used here, with its array class as `array_of`.

    Raises:
        SettingError: if it is not installed.
    """
    try:
        library = importlib.import_module("ucxx._lib.libucxx")
        array = importlib.import_module("ucxx._lib.arr")
    except ImportError as error:
        remedy = f"ucxx cannot be imported ({error}): install ucxx-cu12 or ucxx-cu13, or use nixl"
        raise SettingError("backends", "ucx", remedy) from error
    names = ("Feature", "UCXAddress", "UCXContext", "UCXEndpoint", "UCXWorker", "UCXXTag")
    return SimpleNamespace(array_of=array.Array, **{name: getattr(library, name) for name in names})


def _slicer(region: Region, array_of: Callable[[Any], Any], *, has_cuda: bool) -> Callable[[int, int], Any]:
    """What makes arrays over pieces of the region.

    Raises:
        SettingError: if the region is where this UCX does not reach.
    """
    kind = region.device.partition(":")[0]
    if kind == "cpu":
        memory = np.ctypeslib.as_array((ctypes.c_uint8 * region.length_bytes).from_address(region.address))
        return lambda offset, length: array_of(memory[offset : offset + length])
    if kind == "cuda" and has_cuda:
        return lambda offset, length: array_of(_CudaPiece(region.address + offset, length))
    remedy = (
        "this ucxx reaches host memory only" if kind == "cuda" else "ucxx reaches host and CUDA memory only"
    )
    raise SettingError("staging_device", region.device, f"{remedy}: stage in host memory (cpu)")


class _CudaPiece:
    """Device memory by CUDA's array interface, version 3."""

    def __init__(self, address: int, length_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "data": (address, False),
            "shape": (length_bytes,),
            "typestr": "|u1",
            "version": 3,
        }
