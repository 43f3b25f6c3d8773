"""The threads that pack and unpack: orders in, and a bounded wait for those under way at the end."""

import queue
import threading
import time
from collections.abc import Callable


class Workers:
    """Daemon threads: one that a device never lets go of does not keep the process from ending.

    Their queue is bounded by who orders: staging memory bounds what is packed, reads in flight what is
    unpacked.
    """

    def __init__(self, thread_count: int, name: str) -> None:
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._is_closed = False
        self._threads = [
            threading.Thread(target=self._run, name=f"{name}-{index}", daemon=True)
            for index in range(thread_count)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def submit(self, work: Callable[[], None]) -> None:
        """Do something soon; it must not raise. Dropped after `close`."""
        self._queue.put(work)

    def close(self, timeout_s: float) -> bool:
        """Drop what has not begun and wait for what has; whether all of it has ended. Idempotent."""
        self._is_closed = True
        for _ in self._threads:
            self._queue.put(None)
        deadline_s = time.monotonic() + timeout_s
        for thread in self._threads:
            if thread.ident is not None and thread is not threading.current_thread():
                thread.join(max(0.0, deadline_s - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        while True:
            work = self._queue.get()
            if self._is_closed or work is None:
                return
            work()
