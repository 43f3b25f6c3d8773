"""Work for an event loop from any thread, in order, with one wake-up for all that waits."""

import asyncio
import threading
from collections import deque
from collections.abc import Callable

BATCH_MAX = 64
"""Done in a row before the loop looks at its sockets again."""


class Mailbox:
    """A thread's way into an event loop.

    A loop's own `call_soon_threadsafe` writes to a socket each time; here it is called only when nothing
    waits yet. What is posted ends by itself: the engine's calls, and answers to orders, which are bounded.

    Args:
        failed: told, inside an exception handler, of a fault in a piece of work; nothing is done after that.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, failed: Callable[[], None]) -> None:
        self._loop = loop
        self._failed = failed
        self._lock = threading.Lock()
        self._waiting: deque[Callable[[], None]] = deque()
        self._is_woken = False
        self._is_closed = False

    def post(self, work: Callable[[], None]) -> bool:
        """Have it done in the loop; False if the mailbox is closed, and then it will not be."""
        with self._lock:
            if self._is_closed:
                return False
            self._waiting.append(work)
            if not self._is_woken:
                self._is_woken = True
                self._loop.call_soon_threadsafe(self._drain)
        return True

    def close(self) -> None:
        """Take nothing more and drop what waits; before the loop is closed. Idempotent."""
        with self._lock:
            self._is_closed = True
            self._waiting.clear()

    def _drain(self) -> None:
        for _ in range(BATCH_MAX):
            with self._lock:
                if not self._waiting:
                    self._is_woken = False
                    return
                work = self._waiting.popleft()
            try:
                work()
            except Exception:  # noqa: BLE001  # a fault of ours must not hang the engine
                self.close()
                self._failed()
        self._loop.call_soon(self._drain)
