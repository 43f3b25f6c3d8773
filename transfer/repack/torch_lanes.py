"""What each calling thread has of its own on a device: a stream and buffers that it uses again."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

HOST = "cpu"


class Lanes(threading.local):
    """One lane for each thread that uses it.

    It has a stream where the device's module in torch has them: cuda, which is also ROCm's name, xpu, hpu.
    """

    def __init__(self, device: Any) -> None:
        self._device = device
        self._stream: Any = None
        self._module: Any = None
        self._buffers: dict[str, Any] = {}
        module = None if device.type == HOST else getattr(torch, device.type, None)
        if module is not None and hasattr(module, "Stream") and hasattr(module, "stream"):
            self._module = module
            with self._current_device():
                self._stream = module.Stream()

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Work in the block goes to this thread's stream; it is done when the block is left.

        After an error too: nothing may be written once the caller has heard of it.
        """
        if self._stream is None:
            try:
                yield
            finally:
                self._wait()
            return
        with self._current_device(), self._module.stream(self._stream):
            try:
                yield
            finally:
                self._stream.synchronize()

    def scratch(self, name: str, count: int, dtype: Any) -> Any:
        """A flat buffer of `count` elements on the device, its content left from before."""
        return self._buffer(name, count * dtype.itemsize, self._device, is_pinned=False).view(dtype)

    def host_scratch(self, length_bytes: int) -> Any:
        """The same in host memory, pinned for the device where torch can."""
        is_pinned = self._device.type == "cuda"
        return self._buffer("host", length_bytes, torch.device(HOST), is_pinned=is_pinned)

    def _buffer(self, name: str, length_bytes: int, device: Any, *, is_pinned: bool) -> Any:
        known = self._buffers.get(name)
        if known is None or known.numel() < length_bytes:
            self._buffers.pop(name, None)
            known = torch.empty(length_bytes, dtype=torch.uint8, device=device, pin_memory=is_pinned)
            self._buffers[name] = known
        return known[:length_bytes]

    def _current_device(self) -> Any:
        """Makes an accelerator of several the current one, where torch can choose."""
        chooser = getattr(self._module, "device", None)
        return nullcontext() if chooser is None else chooser(self._device)

    def _wait(self) -> None:
        module = None if self._device.type == HOST else getattr(torch, self._device.type, None)
        if module is not None and hasattr(module, "synchronize"):
            module.synchronize()
