"""Starts a stock vLLM API server with two of its waits adjusted for a machine with two cores.

Run with the engines' interpreter and the server's own arguments. Nothing else of the engine differs.

1. NIXL 1.5.1's Python binding sets the delay of its progress thread to 0, and the UCX plugin then polls
   without ever sleeping: each idle engine keeps a core busy. With 1 ms it takes 5 % of one.
2. vLLM 0.32 waits for its shared-memory queue by calling sched_yield in a loop. On Linux 6.18 such a loop,
   once it has competition, was seen waiting for a core for seconds at a time (runqueue wait in
   /proc/PID/task/TID/schedstat), so that a decode leg of 0.1 s took up to 31 s. With a sleep of 0.1 ms in
   place of the yield none of 60 took longer than 0.3 s, and the core is free while it waits.

The engine starts its processes by spawning, which imports this file again in each of them, so what
stands at module level holds there too.
"""

import importlib.util
import runpy
import sys
import time
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

PROGRESS_DELAY_US = 1_000
QUEUE_WAIT_S = 0.000_1


def _let_progress_thread_sleep(bindings: ModuleType) -> None:
    stock = bindings.nixlAgentConfig

    class PatientAgentConfig(stock):  # type: ignore[misc, valid-type]
        def __setattr__(self, name: str, value: object) -> None:
            super().__setattr__(name, PROGRESS_DELAY_US if name == "pthrDelay" else value)

    bindings.nixlAgentConfig = PatientAgentConfig


def _sleep_while_waiting(shm_broadcast: ModuleType) -> None:
    if not hasattr(shm_broadcast, "sched_yield"):
        raise RuntimeError(
            "vLLM's shm_broadcast has no sched_yield: see what it waits with, adjust engine.py"
        )
    shm_broadcast.sched_yield = lambda: time.sleep(QUEUE_WAIT_S)


_ADJUSTMENTS: dict[str, Callable[[ModuleType], None]] = {
    "nixl_cu12._bindings": _let_progress_thread_sleep,
    "vllm.distributed.device_communicators.shm_broadcast": _sleep_while_waiting,
}


class _AdjustingFinder(MetaPathFinder):
    """Finds the modules named above as everyone else would, and adjusts each once it has been loaded."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        adjust = _ADJUSTMENTS.pop(name, None)
        if adjust is None:
            return None
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _AdjustingLoader(spec.loader, adjust)
        return spec


class _AdjustingLoader(Loader):
    def __init__(self, inner: Loader, adjust: Callable[[ModuleType], None]) -> None:
        self._inner = inner
        self._adjust = adjust

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._inner.exec_module(module)
        self._adjust(module)


sys.meta_path.insert(0, _AdjustingFinder())

if __name__ == "__main__":
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
