"""The staging buffer: the one piece of memory that peers read from and that reads land in."""

import contextlib
import ctypes
import importlib
import mmap
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from transfer.backends.base import Region
from transfer.errors import SettingError

HOST = "cpu"
# Private: pages that could be shared with a child are never huge, and copies between processes (NIXL's cma)
# from and to them ran at half the speed, 4.2 instead of 8.5 GB/s.
_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


def _torch() -> Any:
    """Torch, which is not there in every process."""
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        remedy = "needs torch, which is not installed here: install it, or stage in host memory with numpy"
        raise SettingError("staging_device", "torch", remedy) from error


class Staging(Protocol):
    """A buffer of fixed size and place, zeroed or not.

    Whoever works in torch asks for `tensor()`, which works for both kinds where torch is installed.
    """

    @property
    def region(self) -> Region: ...

    def numpy(self) -> NDArray[np.uint8]:
        """The whole buffer as bytes, not a copy.

        Raises:
            SettingError: if it is device memory.
        """

    def tensor(self) -> Any:
        """The whole buffer as a torch.uint8 tensor, not a copy."""

    def read_bytes(self, offset: int, length_bytes: int) -> bytes:
        """A copy of a piece in host memory; waits for the device."""

    def write_bytes(self, offset: int, data: bytes) -> None:
        """Fill a piece; waits for the device."""

    def close(self) -> None:
        """Give the memory back, once nobody writes or reads there any more. Idempotent."""


class HostStaging:
    """Host memory from anonymous pages, so page-aligned, in huge pages where the system gives them.

    Args:
        length_bytes: its size.
        pin_device: a device as torch names it, whose copies are to be fast: the pages are then locked through
            torch. `cpu` locks nothing, and neither does a runtime that only locks what it has allocated.

    Raises:
        SettingError: if there is not that much memory, or it cannot be pinned.
    """

    def __init__(self, length_bytes: int, *, pin_device: str = HOST) -> None:
        try:
            self._pages: mmap.mmap | None = mmap.mmap(-1, length_bytes, flags=_FLAGS)
        except (OSError, ValueError, OverflowError) as error:
            raise SettingError(
                "staging_bytes", length_bytes, f"cannot be had ({error}): give less"
            ) from error
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # A kernel without huge pages is slower, not wrong.
                self._pages.madvise(mmap.MADV_HUGEPAGE)
        self._view: NDArray[np.uint8] | None = np.frombuffer(self._pages, dtype=np.uint8)
        self._region = Region(self._view.ctypes.data, length_bytes)
        self._pinned = _Pin(self._region, pin_device) if pin_device != HOST else None

    @property
    def region(self) -> Region:
        return self._region

    @property
    def is_pinned(self) -> bool:
        return self._pinned is not None and self._pinned.is_locked

    def numpy(self) -> NDArray[np.uint8]:
        if self._view is None:
            raise SettingError("staging", "closed", "use it before it is closed")
        return self._view

    def tensor(self) -> Any:
        return _torch().from_numpy(self.numpy())

    def read_bytes(self, offset: int, length_bytes: int) -> bytes:
        return self.numpy()[offset : offset + length_bytes].tobytes()

    def write_bytes(self, offset: int, data: bytes) -> None:
        self.numpy()[offset : offset + len(data)] = np.frombuffer(data, dtype=np.uint8)

    def close(self) -> None:
        if self._pinned is not None:
            self._pinned.release()
            self._pinned = None
        self._view = None
        if self._pages is not None:
            with contextlib.suppress(BufferError):  # Where a view is left, the pages go with the last one.
                self._pages.close()
            self._pages = None


class _Pin:
    """Pages locked for a device's copy engine, through the runtime that torch carries."""

    def __init__(self, region: Region, device: str) -> None:
        self._address = region.address
        kind = device.partition(":")[0]
        if kind != "cuda":
            # xpu and hpu have no call that locks memory which exists already; their copies go through a
            # pinned bounce buffer of the driver, which is slower and not wrong.
            self._runtime = None
            return
        self._runtime = _torch().cuda.cudart()
        code = int(self._runtime.cudaHostRegister(region.address, region.length_bytes, 0))
        if code:
            self._runtime = None
            remedy = f"cannot be pinned for {device} (error {code}): give less, or raise the memlock limit"
            raise SettingError("staging_bytes", region.length_bytes, remedy)

    @property
    def is_locked(self) -> bool:
        return self._runtime is not None

    def release(self) -> None:
        if self._runtime is not None:
            self._runtime.cudaHostUnregister(self._address)
            self._runtime = None


class DeviceStaging:
    """Memory of an accelerator, through torch.

    Raises:
        SettingError: if torch does not know the device or it has not that much memory.
    """

    def __init__(self, length_bytes: int, device: str) -> None:
        self._torch = torch = _torch()
        try:
            self._tensor: Any = torch.zeros(length_bytes, dtype=torch.uint8, device=device)
        except (RuntimeError, AssertionError) as error:
            remedy = (
                f"has no {length_bytes} bytes for staging ({type(error).__name__}): give cpu, or fewer bytes"
            )
            raise SettingError("staging_device", device, remedy) from error
        self._region = Region(self._tensor.data_ptr(), length_bytes, str(self._tensor.device))

    @property
    def region(self) -> Region:
        return self._region

    def numpy(self) -> NDArray[np.uint8]:
        raise SettingError("staging_device", self._region.device, "numpy works in host memory only: give cpu")

    def tensor(self) -> Any:
        return self._tensor

    def read_bytes(self, offset: int, length_bytes: int) -> bytes:
        piece = self._tensor[offset : offset + length_bytes].cpu()
        return bytes(piece.numpy().tobytes())

    def write_bytes(self, offset: int, data: bytes) -> None:
        source = self._torch.frombuffer(bytearray(data), dtype=self._torch.uint8)
        self._tensor[offset : offset + len(data)].copy_(source)
        accelerator = getattr(self._torch, self._region.device.partition(":")[0], None)
        if accelerator is not None and hasattr(accelerator, "synchronize"):
            accelerator.synchronize()

    def close(self) -> None:
        self._tensor = None


def make_staging(length_bytes: int, wanted: str, engine_device: str, *, is_reached: bool) -> Staging:
    """The staging buffer that the settings ask for.

    Args:
        length_bytes: its size.
        wanted: `staging_device` of the settings.
        engine_device: where the engine's KV is, as torch names it.
        is_reached: whether the first backend can read and write that device's memory.
    """
    if wanted == "auto":
        wanted = engine_device if is_reached else HOST
    if wanted == HOST:
        return HostStaging(length_bytes, pin_device=engine_device)
    return DeviceStaging(length_bytes, wanted)


def host_view(region: Region) -> memoryview:
    """A host region's bytes; they must outlive the view.

    Raises:
        SettingError: if the region is device memory.
    """
    if region.device != HOST:
        raise SettingError("staging_device", region.device, "this backend moves host memory only: give cpu")
    return memoryview((ctypes.c_char * region.length_bytes).from_address(region.address)).cast("B")
